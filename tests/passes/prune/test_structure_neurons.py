"""prune-neurons: structure, numbers in ONNX Runtime, redundancy without loss, refusals, idempotence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from builders import GraphBuilder, apply, evaluate, operators, random, tolerance
from encoder_graphs import Encoder, feeds, relative
from observing import run_outputs
from structure_graphs import (
    ENCODER,
    HIDDEN,
    WIDE,
    block,
    block_feeds,
    calibrated,
    decoder,
    exported,
    linear,
    masked,
    outputs,
    prompts,
)
from tiny_decoders import write_decoder
from tiny_models import write_model

from artifacts.target import CPU
from passes.base import Context, Effect, Pass, Purpose
from passes.pipeline import parse
from passes.prune.prune_neurons import PruneNeurons
from passes.prune.structure_prune import DAMPING
from passes.second_order import damped
from passes.sites import linear_sites

HERE = Context(CPU)
SHAPES = {"layers.0.up": (HIDDEN, WIDE), "layers.0.down": (WIDE, HIDDEN)}


def shapes(model: ir.Model) -> dict[str, tuple[int, int]]:
    return {site.path: site.shape for site in linear_sites(model)}


def test_it_is_a_pass() -> None:
    assert isinstance(PruneNeurons(), Pass)
    assert (PruneNeurons.effect, PruneNeurons.purpose) == (Effect.LOSSY, Purpose.SPEED)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("uniform", [False, True])
def test_structure(gated: bool, biased: bool, uniform: bool) -> None:
    model = block(gated=gated, biased=biased)
    before, count = operators(model), len(linear_sites(model))
    outcome = apply(PruneNeurons(0.25, uniform=uniform), model, calibrated(block_feeds()))
    assert (outcome.changed, outcome.refused) == (2, ())
    assert operators(model) == before
    found = shapes(model)
    assert len(found) == count
    for layer in range(2):
        rows = found[f"layers.{layer}.down"][0]
        assert found[f"layers.{layer}.down"] == (rows, HIDDEN)
        assert found[f"layers.{layer}.up"] == (HIDDEN, rows)
        assert rows % 4 == 0
        if gated:
            assert found[f"layers.{layer}.gate"] == (HIDDEN, rows)
        if biased:
            assert tuple(model.graph.initializers[f"layers.{layer}.up.bias"].shape or ()) == (rows,)
        if uniform:
            assert rows == 48
    assert sum(found[f"layers.{layer}.down"][0] for layer in range(2)) == 96


@pytest.mark.parametrize("gated", [False, True])
def test_without_repair_it_is_the_model_with_zeros(gated: bool) -> None:
    before, after, data = block(gated=gated), block(gated=gated), block_feeds()
    assert PruneNeurons(0.5, repair=False).run(after, calibrated(data)).changed == 2
    zeros, found = masked(before, after)
    assert sorted(found) == ["layers.0.down", "layers.1.down"]
    wanted = outputs(zeros, data)
    np.testing.assert_allclose(outputs(after, data), wanted, rtol=0, atol=tolerance(before, wanted))


@pytest.mark.parametrize("biased", [False, True])
def test_the_repair_is_the_least_squares_fit(biased: bool) -> None:
    before, after, data = block(biased=biased), block(biased=biased), block_feeds()
    assert PruneNeurons(0.25, only=("layers.0.down",)).run(after, calibrated(data)).changed == 1
    read = str(next(site for site in linear_sites(before) if site.path == "layers.0.down").input.name)
    rows = run_outputs(before, data, [read])[read].reshape(-1, WIDE).astype(np.float64)
    old, new = ({site.path: site for site in linear_sites(model)} for model in (before, after))
    ups = [one["layers.0.up"].weight.const_value.numpy() for one in (old, new)]
    kept = [int(np.flatnonzero((column == ups[0].T).all(axis=1))[0]) for column in ups[1].T]
    weight = old["layers.0.down"].weight.const_value.numpy().astype(np.float64)
    mean = rows.mean(axis=0) if biased else np.zeros(WIDE)
    second = damped(rows.T @ rows / len(rows) - np.outer(mean, mean), DAMPING)
    wanted = np.linalg.solve(second[np.ix_(kept, kept)], second[kept] @ weight)
    found = new["layers.0.down"].weight.const_value.numpy()
    # Moments are of values rounded to float32, and so is the result.
    bound = 2.0**-24 * WIDE * np.linalg.cond(second) * np.abs(wanted).max()
    np.testing.assert_allclose(found, wanted, rtol=0, atol=bound)
    if biased:
        bias = [model.graph.initializers["layers.0.down.bias"].const_value.numpy() for model in (before, after)]
        shift = mean @ weight - mean[kept] @ wanted
        np.testing.assert_allclose(bias[1] - bias[0], shift, rtol=0, atol=WIDE * bound)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_repair_lowers_the_error(gated: bool, biased: bool) -> None:
    data = block_feeds()
    wanted = outputs(block(gated=gated, biased=biased), data)
    errors = {}
    for repair in (True, False):
        model = block(gated=gated, biased=biased)
        PruneNeurons(0.25, repair=repair).run(model, calibrated(data))
        errors[repair] = relative(outputs(model, data), wanted)
    assert errors[True] < 0.8 * errors[False]


@pytest.mark.parametrize("gated", [False, True])
def test_neurons_that_are_there_twice_cost_nothing(gated: bool) -> None:
    data = block_feeds()
    model = block(gated=gated, repeats=2)
    wanted = outputs(model, data)
    assert PruneNeurons(0.5, uniform=True).run(model, calibrated(data)).changed == 2
    assert shapes(model)["layers.0.down"] == (WIDE // 2, HIDDEN)
    # Damping holds weights to what they were: to first order each of the two misses its part of the damping, relative
    # to the second moment of the neurons.
    assert relative(outputs(model, data), wanted) < 3 * DAMPING**0.5
    plain = block(gated=gated, repeats=2)
    PruneNeurons(0.5, uniform=True, repair=False).run(plain, calibrated(data))
    assert relative(outputs(plain, data), wanted) > 10 * relative(outputs(model, data), wanted)


def test_blocks_lose_as_many_as_their_damage_allows() -> None:
    data = block_feeds()
    model = block()
    weight = model.graph.initializers["layers.1.down.weight"]
    weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(0.01), name=weight.name)
    assert PruneNeurons(0.25).run(model, calibrated(data)).changed >= 1
    found = shapes(model)
    assert found["layers.1.down"][0] < 48 < found["layers.0.down"][0]


def test_fused_biases_and_encoders() -> None:
    data = feeds()
    for fused in (True, False):
        before, after = Encoder(fused=fused).build(), Encoder(fused=fused).build()
        outcome = apply(PruneNeurons(0.25, repair=False), after, calibrated(data))
        assert outcome.changed == 2
        zeros, found = masked(before, after)
        assert len(found) == 2
        wanted = evaluate(zeros, data)["sentence_embedding"]
        got = evaluate(after, data)["sentence_embedding"]
        np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance(before, wanted))


def test_decoders() -> None:
    before, data = decoder()
    after, _ = decoder()
    outcome = apply(PruneNeurons(0.25, repair=False), after, calibrated(data))
    assert (outcome.changed, outcome.refused) == (2, ())
    zeros, _ = masked(before, after)
    wanted = outputs(zeros, data)
    np.testing.assert_allclose(outputs(after, data), wanted, rtol=0, atol=tolerance(before, wanted))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama tied", "GPT-2", "OPT", "Phi"])
def test_exported_decoders(tmp_path: Path, name: str) -> None:
    made = exported(write_decoder(tmp_path / "model", name))
    before, data = made.model.clone(), prompts(made)
    outcome = apply(PruneNeurons(0.25, repair=False), made.model, calibrated(data))
    assert outcome.changed == 2
    zeros, _ = masked(before, made.model)
    wanted = outputs(zeros, data)
    np.testing.assert_allclose(outputs(made.model, data), wanted, rtol=0, atol=tolerance(before, wanted))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Bert", "ModernBert"])
def test_exported_encoders(tmp_path: Path, name: str) -> None:
    made = exported(write_model(tmp_path / "model", name), ENCODER)
    before, data = made.model.clone(), encoder_feeds(made.model)
    outcome = PruneNeurons(0.25, repair=False).run(made.model, calibrated(data))
    assert outcome.changed == 2
    zeros, _ = masked(before, made.model)
    wanted = outputs(zeros, data)
    np.testing.assert_allclose(outputs(made.model, data), wanted, rtol=0, atol=tolerance(before, wanted))


def encoder_feeds(model: ir.Model) -> dict[str, np.ndarray]:
    ids = np.random.default_rng(1).integers(5, 60, (6, 11))
    every = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return {str(value.name): every[str(value.name)] for value in model.graph.inputs}


@pytest.mark.parametrize("biased", [False, True])
def test_gates_packed_with_their_products_are_cut_in_place(biased: bool) -> None:
    before, data = block(gated=True, biased=biased), block_feeds()
    parse("infer-shapes; pack-products").run(before, HERE)
    after = before.clone()
    outcome = apply(PruneNeurons(0.25, repair=False), after, calibrated(data))
    assert (outcome.changed, outcome.refused) == (2, ())
    sizes = shapes(after)
    assert [shape for path, shape in sizes.items() if path.endswith(".gate")] == [
        (HIDDEN, 2 * sizes[f"layers.{layer}.down"][0]) for layer in range(2)
    ]
    zeros, _ = masked(before, after)
    wanted = outputs(zeros, data)
    np.testing.assert_allclose(outputs(after, data), wanted, rtol=0, atol=tolerance(before, wanted))


def test_parts_that_are_sliced_off_are_refused_with_the_order() -> None:
    graph = GraphBuilder()
    x = graph.input("x", ("batch", "sequence", HIDDEN))
    both = linear(graph, x, random(1, HIDDEN, 2 * WIDE), "a.both", False)
    both.shape = ir.Shape(("batch", "sequence", 2 * WIDE))
    gate, up = (
        graph.add("Slice", both, *(graph.constant([item]) for item in (start, start + WIDE, 2)), shape=("b", "s", WIDE))
        for start in (0, WIDE)
    )
    act = graph.add("Mul", graph.add("Relu", gate), up)
    y = linear(graph, act, random(2, WIDE, HIDDEN), "a.down", False)
    y.shape = ir.Shape(("batch", "sequence", HIDDEN))
    outcome = apply(PruneNeurons(0.25), graph.finish(y), calibrated(block_feeds()))
    assert (outcome.changed, [one.reason for one in outcome.refused]) == (0, ["a.down: Slice works along the channels"])
    assert "before pack-products" in outcome.refused[0].remedy


@pytest.mark.parametrize(("op_type", "axis"), [("Softmax", -1), ("LpNormalization", -1), ("CumSum", 2)])
def test_what_mixes_neurons_is_left(op_type: str, axis: int) -> None:
    graph = GraphBuilder()
    x = graph.input("x", ("batch", "sequence", HIDDEN))
    act = graph.add("Relu", linear(graph, x, random(1, HIDDEN, WIDE), "a.up", False))
    inputs, options = ((act, graph.constant(np.array(axis))), {}) if op_type == "CumSum" else ((act,), {"axis": axis})
    act = graph.add("Sigmoid", graph.add(op_type, *inputs, **options))
    y = linear(graph, act, random(2, WIDE, HIDDEN), "a.down", False)
    y.shape = ir.Shape(("batch", "sequence", HIDDEN))
    outcome = apply(PruneNeurons(0.25), graph.finish(y), calibrated(block_feeds()))
    assert (outcome.changed, len(outcome.refused)) == (0, 1)


def test_a_shared_weight_is_refused() -> None:
    model = block()
    up = next(site for site in linear_sites(model) if site.path == "layers.1.up")
    up.node.replace_input_with(1, model.graph.initializers["layers.0.up.weight"])
    outcome = PruneNeurons(0.25).run(model, calibrated(block_feeds()))
    assert outcome.changed == 0
    assert all("used elsewhere too" in refusal.reason for refusal in outcome.refused)


def test_neurons_that_are_read_elsewhere_are_refused() -> None:
    model = block()
    site = next(site for site in linear_sites(model) if site.path == "layers.0.down")
    output = ir.node("ReduceMax", [site.input], {"keepdims": 1}, name="seen")
    model.graph.insert_after(site.input.producer(), output)
    output.outputs[0].name, output.outputs[0].dtype, output.outputs[0].shape = (
        "seen",
        ir.DataType.FLOAT,
        ir.Shape([1, 1, 1]),
    )
    model.graph.outputs.append(output.outputs[0])
    outcome = PruneNeurons(0.25).run(model, calibrated(block_feeds()))
    assert outcome.changed == 1
    assert [refusal.node for refusal in outcome.refused] == [site.node.name]


def test_without_data_it_refuses() -> None:
    model = block()
    outcome = PruneNeurons(0.25).run(model, HERE)
    assert (outcome.changed, [one.reason for one in outcome.refused]) == (0, ["pruning neurons needs calibration data"])


def test_few_rows_are_told() -> None:
    outcome = PruneNeurons(0.25).run(block(), calibrated(block_feeds(rows=5)))
    assert outcome.changed == 2
    assert [one.reason.startswith("calibration saw 25 rows for 64 channels") for one in outcome.refused] == [True] * 2


def test_nothing_to_prune_is_said() -> None:
    graph = GraphBuilder()
    x = graph.input("x", ("n", HIDDEN))
    y = linear(graph, x, random(1, HIDDEN, HIDDEN), "only", False)
    y.shape = ir.Shape(("n", HIDDEN))
    outcome = PruneNeurons().run(graph.finish(y), calibrated({"x": random(2, 50, HIDDEN)}))
    assert (outcome.changed, len(outcome.refused)) == (0, 1)
    outcome = PruneNeurons(0.01).run(block(), calibrated(block_feeds()))
    assert (outcome.changed, [one.remedy for one in outcome.refused]) == (0, ["Raise the ratio"])


def test_only_and_skip() -> None:
    model = block()
    outcome = PruneNeurons(0.25, skip=("layers.0.*",)).run(model, calibrated(block_feeds()))
    assert (outcome.changed, len(outcome.refused)) == (1, 1)
    assert shapes(model)["layers.0.down"] == (WIDE, HIDDEN)
    assert shapes(model)["layers.1.down"] == (48, HIDDEN)
    again = PruneNeurons(0.25, only=("layers.0.*", "none.*")).run(model, calibrated(block_feeds()))
    assert (again.changed, [one.node for one in again.refused]) == (1, ["none.*"])
    assert PruneNeurons(0.25).run(model, calibrated(block_feeds())).changed == 0


def test_marks_outlive_strip_metadata() -> None:
    model = block()
    context = calibrated(block_feeds())
    pipeline = "strip-metadata"
    assert PruneNeurons(0.25).run(model, context).changed == 2
    parse(pipeline).run(model, context)
    assert PruneNeurons(0.25).run(model, context).changed == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [({"ratio": 0.0}, "ratio is 0.0"), ({"ratio": 1.0}, "ratio is 1.0"), ({"multiple": 0}, "multiple is 0")],
)
def test_impossible_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruneNeurons(**options)
