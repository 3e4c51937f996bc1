"""prune-heads and prune-kv-heads: structure, numbers in ONNX Runtime, caches, refusals, idempotence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from builders import GraphBuilder, apply, evaluate, random, tolerance
from encoder_graphs import Encoder, feeds, relative
from observing import run_outputs
from structure_graphs import ENCODER, FORM, calibrated, decoder, exported, masked, outputs, prompts, specs
from tiny_decoders import write_decoder
from tiny_models import write_model

from artifacts.signature import decoder_problem
from artifacts.target import CPU
from passes.base import Context, Effect, Pass, Purpose
from passes.grammar import check, signature
from passes.pipeline import parse
from passes.prune import PruneHeads, PruneKvHeads
from passes.prune.structure_prune import DAMPING
from passes.second_order import damped
from passes.sites import linear_sites
from passes.surgery import bypass

HERE = Context(CPU)
SIZE = 8


def attention_nodes(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type in ("MultiHeadAttention", "GroupQueryAttention")]


def counts(model: ir.Model) -> list[tuple[int, int]]:
    return [
        (node.attributes["num_heads"].as_int(), node.attributes.get_int("kv_num_heads", 0))
        for node in attention_nodes(model)
    ]


def shapes(model: ir.Model) -> dict[str, tuple[int, int]]:
    return {str(site.weight.name): site.shape for site in linear_sites(model)}


def encoder(**options: int) -> ir.Model:
    return Encoder(fused=True, **options).build()


def test_they_are_passes() -> None:
    for kind in (PruneHeads, PruneKvHeads):
        assert isinstance(kind(), Pass)
        assert (kind.effect, kind.purpose) == (Effect.LOSSY, Purpose.SPEED)


def test_heads_of_an_encoder() -> None:
    before, after, data = encoder(), encoder(), feeds(batch=12)
    outcome = apply(PruneHeads(0.25, repair=False, uniform=True), after, calibrated(data))
    assert (outcome.changed, outcome.refused) == (2, ())
    assert counts(after) == [(3, 0), (3, 0)]
    for name, shape in shapes(after).items():
        if any(f".{part}.weight" in name for part in ("query", "key", "value")):
            assert shape == (64, 48)
        elif ".dense." in name:
            assert shape == (48, 64)
    assert tuple(after.graph.initializers["encoder.layer.0.query.bias"].shape or ()) == (48,)
    zeros, found = masked(before, after)
    assert all(np.array_equal(np.diff(rows).reshape(-1)[:15], np.ones(15)) for rows in found.values())
    wanted = evaluate(zeros, data)["sentence_embedding"]
    np.testing.assert_allclose(
        evaluate(after, data)["sentence_embedding"], wanted, rtol=0, atol=tolerance(before, wanted)
    )


def test_heads_are_taken_where_the_damage_is_least() -> None:
    model = encoder()
    dense = next(site for site in linear_sites(model) if site.path == "encoder.layer.0.dense")
    weight = dense.weight.const_value.numpy().copy()
    weight[:48] *= 1e-3
    dense.weight.const_value = ir.tensor(weight, name=dense.weight.name)
    assert PruneHeads(0.25).run(model, calibrated(feeds())).changed == 1
    assert counts(model) == [(2, 0), (4, 0)]


def test_the_repair_is_the_least_squares_fit() -> None:
    before, after, data = encoder(layers=1), encoder(layers=1), feeds(batch=12)
    assert PruneHeads(0.5).run(after, calibrated(data)).changed == 1
    old, new = (next(s for s in linear_sites(model) if s.path.endswith(".dense")) for model in (before, after))
    name = str(old.input.name)
    rows = run_outputs(before, data, [name])[name].reshape(-1, 64).astype(np.float64)
    weight, mean = old.weight.const_value.numpy().astype(np.float64), rows.mean(axis=0)
    second = damped(rows.T @ rows / len(rows) - np.outer(mean, mean), DAMPING)
    columns = [
        next(s for s in linear_sites(model) if s.path.endswith(".query")).weight.const_value.numpy()
        for model in (before, after)
    ]
    kept = [int(np.flatnonzero((column == columns[0].T).all(axis=1))[0]) for column in columns[1].T]
    wanted = np.linalg.solve(second[np.ix_(kept, kept)], second[kept] @ weight)
    bound = 2.0**-24 * 64 * np.linalg.cond(second) * np.abs(wanted).max()
    np.testing.assert_allclose(new.weight.const_value.numpy(), wanted, rtol=0, atol=bound)
    plain = encoder(layers=1)
    PruneHeads(0.5, repair=False).run(plain, calibrated(data))
    reference = evaluate(before, data)["sentence_embedding"]
    errors = [relative(evaluate(model, data)["sentence_embedding"], reference) for model in (after, plain)]
    assert errors[0] < errors[1]


def test_query_heads_of_a_decoder_go_evenly_and_the_cache_stays() -> None:
    before, data = decoder()
    after, _ = decoder()
    outcome = apply(PruneHeads(0.5, repair=False), after, calibrated(data))
    assert (outcome.changed, outcome.refused) == (2, ())
    assert counts(after) == [(2, 2), (2, 2)]
    zeros, found = masked(before, after)
    for rows in found.values():
        assert sorted({row // SIZE // 2 for row in rows}) == [0, 1]
        assert len({row // SIZE for row in rows}) == 2
    wanted = outputs(zeros, data)
    np.testing.assert_allclose(outputs(after, data), wanted, rtol=0, atol=tolerance(before, wanted))


def test_kv_heads_take_their_queries_and_their_cache() -> None:
    before, data = decoder()
    after, _ = decoder()
    outcome = PruneKvHeads(0.5, repair=False, uniform=True).run(after, calibrated(data))
    check(after, CPU)
    assert (outcome.changed, outcome.refused) == (2, ())
    assert counts(after) == [(2, 1), (2, 1)]
    assert decoder_problem(*specs(after)) is None
    assert {spec.shape[1] for spec in specs(after)[0][5:]} == {1}
    zeros, found = masked(before, after)
    assert all(rows in (list(range(16)), list(range(16, 32))) for rows in found.values())
    wanted = outputs(zeros, data)
    np.testing.assert_allclose(outputs(after, data), wanted, rtol=0, atol=tolerance(before, wanted))
    assert PruneKvHeads(0.5).run(after, calibrated(data)).changed == 0


def test_layers_may_keep_different_numbers_of_kv_heads() -> None:
    model, data = decoder()
    assert PruneKvHeads(0.25).run(model, calibrated(data)).changed == 1
    check(model, CPU)
    assert sorted(counts(model)) == [(2, 1), (4, 2)]
    assert decoder_problem(*specs(model)) is None
    assert np.isfinite(outputs(model, data)).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "fused"),
    [
        ("Llama tied", False),
        ("Llama tied", True),
        ("Llama narrow heads", False),
        ("Llama one head", True),
        ("Qwen2", False),
        ("Qwen2", True),
        ("Qwen3", False),
        ("Cohere", True),
        ("OPT", False),
        ("GPT-2", False),
    ],
)
def test_exported_decoders(tmp_path: Path, name: str, fused: bool) -> None:
    """Each way from products to attention: rotary embeddings in nodes or one, padding, biases, norms, scales, Split."""
    made = exported(write_decoder(tmp_path / "model", name), f"{FORM}; fuse-rotary" if fused else FORM)
    before, data = made.model.clone(), prompts(made)
    outcome = PruneHeads(0.5, repair=False).run(made.model, calibrated(data))
    check(made.model, CPU)
    assert (outcome.changed, outcome.refused) == (2, ())
    zeros, found = masked(before, made.model)
    assert len(found) == 2
    wanted = outputs(zeros, data)
    np.testing.assert_allclose(outputs(made.model, data), wanted, rtol=0, atol=tolerance(before, wanted))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Bert", "DistilBert"])
def test_exported_encoders(tmp_path: Path, name: str) -> None:
    made = exported(write_model(tmp_path / "model", name), ENCODER)
    before = made.model.clone()
    ids = np.random.default_rng(1).integers(5, 60, (6, 11))
    every = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    data = {str(value.name): every[str(value.name)] for value in before.graph.inputs}
    outcome = apply(PruneHeads(0.25, repair=False), made.model, calibrated(data))
    assert (outcome.changed > 0, outcome.refused) == (True, ())
    zeros, _ = masked(before, made.model)
    wanted = outputs(zeros, data)
    np.testing.assert_allclose(outputs(made.model, data), wanted, rtol=0, atol=tolerance(before, wanted))


def test_attention_in_other_forms_is_refused_with_the_order() -> None:
    unfused = Encoder(fused=False).build()
    outcome = apply(PruneHeads(0.25), unfused, calibrated(feeds()))
    assert (outcome.changed, len(outcome.refused)) == (0, 2)
    assert all("fuse-attention before" in refusal.remedy for refusal in outcome.refused)
    packed, data = in_form("pack-products; pack-attention", turned=False)
    outcome = apply(PruneHeads(0.5), packed, calibrated(data))
    assert (outcome.changed, len(outcome.refused)) == (0, 2)
    assert all("before pack-products" in refusal.remedy for refusal in outcome.refused)


def in_form(pipeline: str, *, turned: bool = True) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """The decoder behind some passes, without its rotary embeddings where nothing may stand before the attention."""
    model, data = decoder()
    for node in [] if turned else [node for node in model.graph if node.op_type == "RotaryEmbedding"]:
        bypass(node, node.inputs[0])
    parse(pipeline).run(model, HERE)
    return model, data


def test_packed_products_are_cut_in_place() -> None:
    for item in (PruneHeads(0.5, repair=False), PruneKvHeads(0.5, repair=False)):
        before, data = in_form("pack-products")
        after = before.clone()
        outcome = item.run(after, calibrated(data))
        check(after, CPU)
        assert (outcome.changed > 0, outcome.refused) == (True, ())
        zeros, found = masked(before, after)
        assert found
        wanted = outputs(zeros, data)
        np.testing.assert_allclose(outputs(after, data), wanted, rtol=0, atol=tolerance(before, wanted))


def test_scores_of_heads_are_cut() -> None:
    rng = np.random.default_rng(2)

    def model(constant: bool) -> ir.Model:
        graph = GraphBuilder()
        x = graph.input("x", ("batch", 5, 32))
        parts = [
            graph.add("MatMul", x, graph.constant(random(seed, 32, 32) / 3, f"w{seed}"), shape=("batch", 5, 32))
            for seed in range(3)
        ]
        scores = rng.normal(size=(1, 4, 5, 5)).astype(np.float32)
        bias = graph.constant(scores, "scores")
        if not constant:
            bias = graph.add("Mul", bias, graph.input("factor", (1,)), shape=(1, 4, 5, 5))
        out = graph.add(
            "MultiHeadAttention", *parts, None, None, bias, domain="com.microsoft", num_heads=4, shape=("batch", 5, 32)
        )
        return graph.finish(graph.add("MatMul", out, graph.constant(random(9, 32, 32), "w9"), shape=("batch", 5, 32)))

    for constant in (True, False):
        before = model(constant)
        after, data = before.clone(), {"x": random(4, 30, 5, 32)}
        if not constant:
            data["factor"] = np.ones(1, np.float32)
        assert apply(PruneHeads(0.5, repair=False), after, calibrated(data)).changed == 1
        zeros, found = masked(before, after)
        assert len(found) == 1
        wanted = outputs(zeros, data)
        np.testing.assert_allclose(outputs(after, data), wanted, rtol=0, atol=tolerance(before, wanted))


def test_a_cache_that_is_read_elsewhere_is_refused() -> None:
    model, data = decoder()
    past = next(value for value in model.graph.inputs if value.name == "past_key_values.0.key")
    node = ir.node("ReduceMax", [past], {"keepdims": 1}, name="seen")
    model.graph.append(node)
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = "seen", ir.DataType.FLOAT, ir.Shape([1] * 4)
    model.graph.outputs.append(node.outputs[0])
    outcome = PruneKvHeads(0.5).run(model, calibrated(data))
    assert [refusal.reason for refusal in outcome.refused] == ["its cache past_key_values.0.key is used elsewhere too"]
    assert counts(model)[0] == (4, 2)


def test_nothing_to_prune_is_said() -> None:
    model = encoder()
    assert PruneHeads(0.25).run(model, HERE).refused[-1].reason == "pruning heads needs calibration data"
    assert PruneKvHeads(0.5).run(model, calibrated(feeds())).changed == 0
    one, data = decoder()
    assert PruneKvHeads(0.5, uniform=True).run(one, calibrated(data)).changed == 2
    for node in attention_nodes(one):
        node.metadata_props.clear()
    outcome = PruneKvHeads(0.5).run(one, calibrated(data))
    assert (outcome.changed, [refusal.reason for refusal in outcome.refused]) == (0, ["it has one KV head"] * 2)


def test_only_and_skip_name_the_product_behind() -> None:
    model = encoder()
    outcome = PruneHeads(0.25, uniform=True, only=("encoder.layer.0.*", "none")).run(model, calibrated(feeds(batch=12)))
    assert (outcome.changed, [refusal.node for refusal in outcome.refused]) == (1, ["none"])
    assert counts(model) == [(3, 0), (4, 0)]


@pytest.mark.parametrize("kind", [PruneHeads, PruneKvHeads])
@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5])
def test_impossible_ratios(kind: type[PruneHeads], ratio: float) -> None:
    with pytest.raises(ValueError, match="not between 0 and 1"):
        kind(ratio)


def test_the_signature_of_a_graph_without_caches_stays() -> None:
    model = encoder()
    before = signature(model)
    PruneHeads(0.25).run(model, calibrated(feeds()))
    assert signature(model) == before
