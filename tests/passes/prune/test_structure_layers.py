"""prune-layers: structure, numbers against the model without the block, caches, refusals, idempotence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from builders import apply, evaluate, tolerance
from decoder_graphs import tiny_llama
from encoder_graphs import Encoder, feeds
from observing import run_outputs
from structure_graphs import ENCODER, calibrated, decoder, exported, llama, outputs, prompts, specs
from tiny_decoders import write_decoder
from tiny_models import write_model

from artifacts.signature import cache_names, decoder_problem
from artifacts.target import CPU
from passes.base import Context, Effect, Pass, Purpose
from passes.grammar import check
from passes.pipeline import parse
from passes.prune.layers_blocks import blocks_of
from passes.prune.prune_layers import PruneLayers, measured_angles

HERE = Context(CPU)


def encoder(layers: int = 3, *, fused: bool = True) -> ir.Model:
    """The fused encoder with its skip connections apart: what a recipe has before fuse-skip-layer-norm."""

    class Apart(Encoder):
        def _norm(self, x: ir.Value, path: str, skip: ir.Value | None = None) -> ir.Value:
            self.fused, fused_before = False, self.fused
            try:
                return super()._norm(x, path, skip)
            finally:
                self.fused = fused_before

    model = Apart(fused=True, layers=layers).build()
    for node in model.graph:
        for value in node.outputs:
            if value.name.endswith(".norm"):
                value.shape = ir.Shape(["batch", "sequence", 64])
    return model


def test_it_is_a_pass() -> None:
    assert isinstance(PruneLayers(), Pass)
    assert (PruneLayers.effect, PruneLayers.purpose) == (Effect.LOSSY, Purpose.SPEED)


def test_blocks_of_an_encoder() -> None:
    model = encoder()
    found = blocks_of(model)
    names = [f"encoder.layer.{layer}.output.norm" for layer in range(3)]
    assert [block.source.name for block in found] == ["embeddings.norm", *names[:2]]
    assert [block.result.name for block in found] == names


def test_blocks_of_a_decoder() -> None:
    model, _ = decoder(layers=3)
    found = blocks_of(model)
    assert len(found) == 3
    assert found[0].source.producer().op_type == "Gather"
    assert all(block.result.producer().op_type == "Add" for block in found)
    assert [block.result for block in found[:2]] == [block.source for block in found[1:]]


def test_angles_are_those_of_the_values() -> None:
    model, data = encoder(), feeds()
    blocks = blocks_of(model)
    found = measured_angles(model, calibrated(data).moments, blocks)
    for block, angle in zip(blocks, found, strict=True):
        values = run_outputs(model, data, [str(block.source.name), str(block.result.name)])
        before, behind = (array.astype(np.float64) for array in values.values())
        cosines = (before * behind).sum(-1) / np.linalg.norm(before, axis=-1) / np.linalg.norm(behind, axis=-1)
        assert angle == pytest.approx(float(np.arccos(cosines).mean() / np.pi), abs=1e-5)


def still(model: ir.Model, layer: int) -> ir.Model:
    """Let a block of a decoder nearly give back what it reads."""
    for part in ("o", "down"):
        weight = model.graph.initializers[f"model.layers.{layer}.{part}"]
        weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(1e-7), name=weight.name)
    return model


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_the_block_that_turns_least_goes_with_its_cache(layer: int) -> None:
    model, data = decoder(layers=4)
    still(model, layer)
    wanted = outputs(model, data)
    outcome = PruneLayers(count=1).run(model, calibrated(data))
    check(model, CPU)
    assert (outcome.changed, outcome.refused) == (1, ())
    assert decoder_problem(*specs(model)) is None
    names = [name for number in range(3) for name, _ in cache_names(number)]
    assert [value.name for value in model.graph.inputs][5:] == names
    assert sum(node.op_type == "GroupQueryAttention" for node in model.graph) == 3
    assert not any(name.startswith(f"model.layers.{layer}.") for name in model.graph.initializers)
    # What the block adds is 1e-7 of what others add; each of the three others may make a hundred times as much of it.
    assert np.abs(outputs(model, data) - wanted).max() < 1e-1 * np.abs(wanted).max()
    assert PruneLayers(count=1).run(model, calibrated(data)).changed == 0


def test_the_rest_computes_what_a_model_of_those_layers_does() -> None:
    torch_model = tiny_llama(1, layers=4)
    model, data = llama(torch_model)
    assert PruneLayers(count=2).run(model, calibrated(data)).changed == 2
    left = [int(name.split(".")[2]) for name in model.graph.initializers if name.endswith(".down")]
    assert len(left) == 2
    torch_model.model.layers = type(torch_model.model.layers)([torch_model.model.layers[layer] for layer in left])
    torch_model.config.num_hidden_layers = 2
    for number, one in enumerate(torch_model.model.layers):
        one.self_attn.layer_idx = number
    small, _ = llama(torch_model)
    wanted = outputs(small, data)
    np.testing.assert_allclose(outputs(model, data), wanted, rtol=0, atol=tolerance(small, wanted))


@pytest.mark.parametrize("layer", [0, 2])
def test_blocks_of_an_encoder_go(layer: int) -> None:
    model, data = encoder(), feeds()
    paths = [block.path for block in blocks_of(model)]
    outcome = apply(PruneLayers(count=1, only=(paths[layer],)), model, calibrated(data))
    assert outcome.changed == 1
    assert sum(node.op_type == "MultiHeadAttention" for node in model.graph) == 2
    assert not any(name.startswith(f"encoder.layer.{layer}.") for name in model.graph.initializers)
    assert np.isfinite(evaluate(model, data)["sentence_embedding"]).all()


def test_a_block_that_makes_the_output_goes() -> None:
    model, data = encoder(2), feeds()
    hidden = blocks_of(model)[-1].result
    model.graph.outputs[:] = [hidden]
    parse("remove-unused").run(model, HERE)
    paths = [block.path for block in blocks_of(model)]
    wanted = run_outputs(model, data, ["encoder.layer.0.output.norm"])["encoder.layer.0.output.norm"]
    assert apply(PruneLayers(count=1, only=(paths[1],)), model, calibrated(data)).changed == 1
    np.testing.assert_allclose(evaluate(model, data)["encoder.layer.1.output.norm"], wanted, rtol=0, atol=1e-5)


def test_ratio_counts_from_the_model_as_it_was() -> None:
    model, data = decoder(layers=4)
    assert PruneLayers(ratio=0.5).run(model, calibrated(data)).changed == 2
    assert PruneLayers(ratio=0.5).run(model, calibrated(data)).changed == 0
    parse("strip-metadata").run(model, HERE)
    assert PruneLayers(count=2).run(model, calibrated(data)).changed == 0
    assert PruneLayers(ratio=0.25).run(model, calibrated(data)).changed == 0
    assert PruneLayers(count=3).run(model, calibrated(data)).changed == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama tied", "GPT-2", "Gemma 2", "GPT-J", "Olmo2"])
def test_exported_decoders(tmp_path: Path, name: str) -> None:
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2} if name == "Gemma 2" else {}
    made = exported(write_decoder(tmp_path / "model", name, num_hidden_layers=4, **kinds))
    data = prompts(made)
    outcome = PruneLayers(count=2).run(made.model, calibrated(data))
    check(made.model, CPU)
    assert (outcome.changed, outcome.refused) == (2, ())
    assert decoder_problem(*specs(made.model)) is None
    assert np.isfinite(outputs(made.model, data)).all()
    assert PruneLayers(count=2).run(made.model, calibrated(data)).changed == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Bert", "ModernBert"])
def test_exported_encoders(tmp_path: Path, name: str) -> None:
    folder = write_model(tmp_path / "model", name, num_hidden_layers=3)
    made = exported(folder, ENCODER)
    ids = np.random.default_rng(1).integers(5, 60, (6, 11))
    every = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    data = {str(value.name): every[str(value.name)] for value in made.model.graph.inputs}
    outcome = apply(PruneLayers(count=1), made.model, calibrated(data))
    assert (outcome.changed, outcome.refused) == (1, ())
    assert np.isfinite(outputs(made.model, data)).all()


def test_what_is_read_outside_its_block_is_refused() -> None:
    model, data = decoder()
    inner = next(node for node in model.graph if node.op_type == "Sigmoid")
    seen = ir.node("Shape", [inner.outputs[0]], name="seen")
    model.graph.insert_after(inner, seen)
    seen.outputs[0].name, seen.outputs[0].dtype, seen.outputs[0].shape = "seen", ir.DataType.INT64, ir.Shape([3])
    model.graph.outputs.append(seen.outputs[0])
    before = ir.to_proto(model).SerializeToString()
    outcome = PruneLayers(count=1, only=(blocks_of(model)[0].path,)).run(model, calibrated(data))
    reason = "what it makes is read outside of its block"
    assert (outcome.changed, [one.reason for one in outcome.refused]) == (0, [reason])
    assert ir.to_proto(model).SerializeToString() == before
    model.graph.outputs.append(inner.outputs[0])
    assert PruneLayers(count=1).run(model, calibrated(data)).changed == 0


def test_refusals_say_why() -> None:
    model, data = decoder()
    assert PruneLayers(count=1).run(model, HERE).refused[0].reason == "pruning layers needs calibration data"
    outcome = PruneLayers(count=2).run(model, calibrated(data))
    assert (outcome.changed, [one.reason for one in outcome.refused]) == (0, ["2 of 2 blocks cannot go"])
    fused, _ = decoder()
    parse("fuse-skip-layer-norm").run(fused, HERE)
    assert "fuse-skip-layer-norm" in PruneLayers(count=1).run(fused, calibrated(data)).refused[0].remedy
    shapeless = Encoder(fused=True).build()
    assert "infer-shapes" in PruneLayers(count=1).run(shapeless, calibrated(feeds())).refused[0].remedy
    plain = Encoder(fused=False).build()
    assert "fuse-attention" in PruneLayers(count=1).run(plain, calibrated(feeds())).refused[0].remedy
    blocks = blocks_of(model)
    outcome = PruneLayers(count=1, skip=tuple(block.path for block in blocks)).run(model, calibrated(data))
    assert (outcome.changed, len(outcome.refused)) == (0, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"count": -1}, "count is -1"), ({"ratio": 1.5}, "ratio is 1.5"), ({"count": 1, "ratio": 0.5}, "leave ratio out")],
)
def test_impossible_options(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruneLayers(**options)
