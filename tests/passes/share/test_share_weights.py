"""share-weights: structure, numbers, what is left, a second run; and what is equal is stored once in a bundle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from encoder_graphs import FLOAT, Array, Builder, relative, run
from lent_moments import lent, shown

from artifacts.target import CPU
from passes.affine import matrix_of
from passes.base import Context, Effect, Pass, Purpose
from passes.grammar import check, signature
from passes.pipeline import Pipeline
from passes.share import ShareWeights
from passes.share.common import damage, shared
from passes.sites import linear_sites

X = {"x": np.random.default_rng(4).normal(size=(200, 32)).astype(np.float32)}
HERE = Context(CPU)


def layers(*noise: float, seeds: tuple[int, ...] = ()) -> ir.Model:
    """x -> tanh(x @ w0) -> tanh(... @ w1) ...: one matrix with noise of so much of its size in each layer."""
    graph = Builder()
    x = graph.input("x", FLOAT, ["n", 32])
    for index, size in enumerate(noise):
        base = np.random.default_rng(seeds[index] if seeds else 0).normal(size=(32, 32)) / np.sqrt(32)
        moved = base * (1 + size * np.random.default_rng(100 + index).normal(size=(32, 32)))
        weight = graph.constant(f"w{index}", moved.astype(np.float32))
        path = f"layer.{index}/layer.{index}.dense"
        x = graph.add("Tanh", graph.add("MatMul", x, weight, name=f"product{index}", path=path), name=f"y{index}")
    return graph.model(x, shape=["n", 32])


def weights(model: ir.Model) -> list[Array]:
    return [matrix_of(site) for site in linear_sites(model)]


def test_it_is_a_pass() -> None:
    assert isinstance(ShareWeights(), Pass)
    assert (ShareWeights.name, ShareWeights.effect, ShareWeights.purpose) == (
        "share-weights",
        Effect.LOSSY,
        Purpose.SIZE,
    )


@pytest.mark.parametrize("calibrated", [True, False])
def test_near_weights_become_one(calibrated: bool) -> None:
    model = layers(0.01, 0.01, 0.01)
    before, form, reference = weights(model), signature(model), run(model, X)
    context = Context(CPU, moments=lent(X)) if calibrated else HERE
    seconds = [None] * 3
    if calibrated:
        inputs = shown(model, ["x", "y0", "y1"], X)
        seconds = [array.T.astype(np.float64) @ array / len(array) for array in inputs.values()]
    outcome = ShareWeights().run(model, context)
    check(model, CPU)
    assert (outcome.changed, outcome.refused) == (2, ())
    assert signature(model) == form
    assert len({id(site.weight) for site in linear_sites(model)}) == 1
    assert [name for name in model.graph.initializers if name.startswith("w")] == ["w0"]
    np.testing.assert_allclose(weights(model)[0], shared(before, seconds), rtol=0, atol=2.0**-22)
    # Each product moves by at most 2 %, which tanh does not make more of; three of them, one behind the other.
    assert relative(run(model, X), reference) < 3 * 0.02


def test_each_joins_the_cluster_it_is_nearest_to() -> None:
    model = layers(0.0, 0.0, 0.01, 0.01, seeds=(0, 1, 1, 0))
    assert ShareWeights().run(model, HERE).changed == 2
    held = [site.weight.name for site in linear_sites(model)]
    assert held == ["w0", "w1", "w1", "w0"]


def test_no_site_is_damaged_by_more_than_the_tolerance() -> None:
    model = layers(*(0.012 * index for index in range(6)))
    before = weights(model)
    changed = ShareWeights(tolerance=0.03).run(model, HERE).changed
    assert 0 < changed < 5
    damages = [damage(old, new, None) for old, new in zip(before, weights(model), strict=True)]
    assert max(damages) <= 0.03
    assert max(damages) > 0.0


def test_what_is_far_apart_is_left_and_said() -> None:
    model = layers(0.0, 0.0, seeds=(0, 1))
    outcome = ShareWeights().run(model, HERE)
    assert outcome.changed == 0
    assert [refusal.reason for refusal in outcome.refused] == ["no two weights are within 2.0% of one"]
    single = ShareWeights().run(layers(0.0), HERE)
    assert [refusal.reason for refusal in single.refused] == ["no two weights have the same shape"]


def test_what_the_data_never_shows_does_not_count() -> None:
    """The weights differ in rows that meet zeros only."""
    model = layers(0.0, 0.0)
    data = {"x": X["x"].copy()}
    data["x"][:, :4] = 0.0
    first, second = linear_sites(model)
    assert second.weight.const_value is not None
    array = second.weight.const_value.numpy().copy()
    array[:, :] += 0.0
    quiet = model.graph.initializers["w0"]
    assert quiet.const_value is not None
    changed = quiet.const_value.numpy().copy()
    changed[:4] += 0.1
    quiet.const_value = ir.tensor(changed, name="w0")
    assert first.weight is quiet
    assert ShareWeights().run(layers_of(changed, array), HERE).changed == 0
    assert ShareWeights().run(model, Context(CPU, moments=lent(data))).changed == 1


def layers_of(*arrays: Array) -> ir.Model:
    model = layers(*(0.0 for _ in arrays))
    for index, array in enumerate(arrays):
        model.graph.initializers[f"w{index}"].const_value = ir.tensor(array, name=f"w{index}")
    return model


def test_within_a_layer_only() -> None:
    model = layers(0.0, 0.001, 0.001)
    outcome = ShareWeights(across_layers=False).run(model, HERE)
    assert outcome.changed == 0
    for site in linear_sites(model):
        site.node.metadata_props["pkg.torch.onnx.name_scopes"] = repr(["", f"layer.0.{site.output.name}", ""])
    assert ShareWeights(across_layers=False).run(model, HERE).changed == 2


def test_skip_and_only() -> None:
    assert ShareWeights(skip=("layer.0.*",)).run(layers(0.0, 0.001, 0.001), HERE).changed == 1
    assert ShareWeights(only=("layer.0.*", "layer.1.*")).run(layers(0.0, 0.001, 0.001), HERE).changed == 1


def test_a_second_run_changes_nothing() -> None:
    model = layers(*(0.012 * index for index in range(6)))
    assert ShareWeights(tolerance=0.03).run(model, HERE).changed
    before = ir.to_proto(model).SerializeToString()
    assert ShareWeights(tolerance=0.03).run(model, HERE).changed == 0
    assert ir.to_proto(model).SerializeToString() == before


def test_the_text_form_reads_back() -> None:
    assert (
        str(Pipeline((ShareWeights(0.1, across_layers=False),))) == "share-weights(tolerance=0.1, across_layers=false)"
    )


@pytest.mark.parametrize("tolerance", [0.0, 1.0, -1.0])
def test_impossible_options_are_errors(tolerance: float) -> None:
    with pytest.raises(ValueError, match=f"tolerance is {tolerance}"):
        ShareWeights(tolerance)


def test_what_is_equal_is_stored_once_in_a_bundle(tmp_path: Path) -> None:
    """Two large weights are one file, and two small ones, which lie in the graph, one tensor."""
    from compiler.compile import compile_model

    graph = Builder()
    x = graph.input("x", FLOAT, ["n", 96])
    large = np.random.default_rng(0).normal(size=(96, 96)).astype(np.float32)
    small = np.random.default_rng(1).normal(size=96).astype(np.float32)
    for index in range(2):
        product = graph.add("MatMul", x, graph.constant(f"w{index}", large.copy()), name=f"product{index}")
        x = graph.add("Tanh", graph.add("Add", product, graph.constant(f"b{index}", small.copy()), name=f"s{index}"),
                      name=f"y{index}")  # fmt: skip
    ir.save(graph.model(x, shape=["n", 96]), tmp_path / "model.onnx")
    bundle = compile_model(
        tmp_path / "model.onnx", tmp_path / "bundle", task="tensors", recipe="safe", targets=("cpu",)
    )
    (variant,) = bundle.manifest.variants
    assert len(variant.weights) == 1
    assert len(list((bundle.path / "weights").iterdir())) == 1
    stored = ir.load(bundle.path / variant.model).graph.initializers.values()
    assert sum(1 for value in stored if value.const_value is not None and value.const_value.nbytes == 96 * 4) == 1
    assert sum(1 for value in stored if value.const_value is not None and value.const_value.nbytes == 96 * 96 * 4) == 1
