"""fuse-rms-norm and fuse-skip-layer-norm behind it: structure, numbers, non-matches, idempotence."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx_ir as ir
import pytest
from builders import CONTEXT, GraphBuilder, apply, apply_equal, operators, random

from artifacts.target import TENSORRT
from passes.base import Effect, Purpose
from passes.fusion import FuseRmsNorm, FuseSkipLayerNorm

SHAPE = ("batch", "sequence", 16)
X = {"x": random(0, 2, 5, 16)}
ROOTS = ("divided", "reciprocal", "one over", "power")


def unit(
    g: GraphBuilder,
    x: ir.Value,
    *,
    square: str = "pow",
    root: str = "reciprocal",
    axis: int = -1,
    exponent: float = 2.0,
    epsilon: float = 1e-6,
) -> ir.Value:
    """x over its root mean square, as exporters spell it."""
    shape = x.shape
    kept = (*tuple(x.shape or ())[:-1], 1)
    power = g.add("Pow", x, g.constant(exponent), shape=shape) if square == "pow" else g.add("Mul", x, x, shape=shape)
    mean = g.add("ReduceMean", power, g.constant(np.array([axis])), shape=kept, keepdims=1)
    total = g.add("Add", mean, g.constant(epsilon), shape=kept) if epsilon else mean
    if root == "power":
        return g.add("Mul", x, g.add("Pow", total, g.constant(-0.5), shape=kept), shape=shape)
    rooted = g.add("Sqrt", total, shape=kept)
    if root == "divided":
        return g.add("Div", x, rooted, shape=shape)
    inverse = g.add("Reciprocal", rooted) if root == "reciprocal" else g.add("Div", g.constant(1.0), rooted)
    return g.add("Mul", inverse, x, shape=shape)


def rms_norm(*, scale: int = 16, first: bool = True, opset: int = 23, **form: object) -> ir.Model:
    g = GraphBuilder(opset)
    x = g.input("x", SHAPE)
    weight = g.constant(random(1, scale) + 1, "w")
    y = unit(g, x, **form)  # type: ignore[arg-type]
    return g.finish(g.add("Mul", *((weight, y) if first else (y, weight)), shape=SHAPE, name="last"))


def test_they_are_exact_and_for_speed() -> None:
    assert (FuseRmsNorm.effect, FuseRmsNorm.purpose) == (Effect.EXACT, Purpose.SPEED)


@pytest.mark.parametrize("square", ["pow", "mul"])
@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize("first", [True, False])
def test_structure_and_numbers(square: str, root: str, first: bool) -> None:
    model = rms_norm(square=square, root=root, first=first)
    source, scale = model.graph.inputs[0], model.graph.initializers["w"]
    assert apply_equal(FuseRmsNorm(), model, X).changed == 1
    (node,) = model.graph
    assert (node.op_type, node.domain) == ("RMSNormalization", "")
    assert node.inputs[0] is source
    assert node.inputs[1] is scale
    assert node.outputs[0] is model.graph.outputs[0]
    assert node.attributes["epsilon"].as_float() == pytest.approx(1e-6)
    assert node.attributes["axis"].as_int() == -1
    assert list(model.graph.initializers) == ["w"]


@pytest.mark.parametrize("root", ROOTS)
def test_without_an_epsilon_it_is_0(root: str) -> None:
    model = rms_norm(root=root, epsilon=0.0)
    assert apply_equal(FuseRmsNorm(), model, X).changed == 1
    (node,) = model.graph
    assert node.attributes["epsilon"].as_float() == 0.0


def test_a_norm_of_heads() -> None:
    g = GraphBuilder(23)
    x = g.input("x", ("batch", "sequence", 4, 8))
    y = g.add("Mul", g.constant(random(2, 8), "w"), unit(g, x), shape=x.shape)
    model = g.finish(y)
    assert apply_equal(FuseRmsNorm(), model, {"x": random(3, 2, 5, 4, 8)}).changed == 1
    assert operators(model) == {"RMSNormalization": 1}


@pytest.mark.parametrize("scale", [0, 1])
def test_without_a_vector_scale_it_gets_ones(scale: int) -> None:
    g = GraphBuilder(23)
    x = g.input("x", SHAPE)
    y = unit(g, x)
    model = g.finish(y if not scale else g.add("Mul", y, g.constant(random(4, scale)), shape=SHAPE))
    assert apply_equal(FuseRmsNorm(), model, X).changed == 1
    assert operators(model) == {"RMSNormalization": 1, **({"Mul": 1} if scale else {})}
    ones = model.graph.initializers["norm.ones.16"].const_value
    assert ones is not None
    np.testing.assert_array_equal(ones.numpy(), np.ones(16, np.float32))


def test_of_a_centered_value_it_is_layer_normalization() -> None:
    g = GraphBuilder(23)
    x = g.input("x", SHAPE)
    mean = g.add("ReduceMean", x, g.constant(np.array([-1])), shape=("batch", "sequence", 1), keepdims=1)
    y = unit(g, g.add("Sub", x, mean, shape=SHAPE))
    model = g.finish(g.add("Mul", g.constant(random(6, 16), "w"), y, shape=SHAPE))
    assert apply_equal(FuseRmsNorm(), model, X).changed == 1
    (node,) = model.graph
    assert node.op_type == "LayerNormalization"
    assert [value.name for value in node.inputs if value is not None] == ["x", "w"]


def test_casts_around_it_go_into_the_operator() -> None:
    half, shape = ir.DataType.FLOAT16, SHAPE
    g = GraphBuilder(23)
    x = g.input("x", shape, half)
    wide = g.add("Cast", x, to=int(ir.DataType.FLOAT), shape=shape)
    narrow = g.add("Cast", unit(g, wide), to=int(half), dtype=half, shape=shape)
    weight = g.constant(random(5, 16, dtype=np.float16), "w")
    model = g.finish(g.add("Mul", weight, narrow, dtype=half, shape=shape))
    assert apply_equal(FuseRmsNorm(), model, {"x": X["x"].astype(np.float16)}).changed == 1
    (node,) = model.graph
    assert node.inputs[0] is model.graph.inputs[0]
    assert node.attributes["stash_type"].as_int() == int(ir.DataType.FLOAT)


def test_an_old_opset_is_refused_with_a_remedy() -> None:
    outcome = apply(FuseRmsNorm(), rms_norm(opset=21))
    assert outcome.changed == 0
    (refusal,) = outcome.refused
    assert "opset 23" in refusal.reason
    assert "raise-opset(minimum=23)" in refusal.remedy


def shared() -> ir.Model:
    g = GraphBuilder(23)
    x = g.input("x", SHAPE)
    y = unit(g, x)
    maker = y.producer()
    assert maker is not None
    inverse = maker.inputs[0]
    assert inverse is not None
    return g.finish(g.add("Mul", y, g.constant(random(1, 16)), shape=SHAPE), inverse)


CASES = {
    "other axis": lambda: rms_norm(axis=1),
    "other exponent": lambda: rms_norm(exponent=4.0),
    "shared root": shared,
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_none_is_left(case: str) -> None:
    model = CASES[case]()
    before = operators(model)
    outcome = apply(FuseRmsNorm(), model)
    assert (outcome.changed, outcome.refused) == (0, ())
    assert operators(model) == before


def skip_norm(op_type: str, *, read: bool, biased: bool = False, skip: tuple[int | str, ...] = SHAPE) -> ir.Model:
    g = GraphBuilder(23)
    x, y = g.input("x", SHAPE), g.input("y", skip)
    left = g.add("Add", x, g.constant(random(4, 16), "bias"), shape=SHAPE) if biased else x
    total = g.add("Add", left, y, shape=SHAPE, name="sum")
    early = g.add("Neg", total, shape=SHAPE) if read else None
    norm = g.add(op_type, total, g.constant(random(5, 16), "w"), axis=-1, epsilon=1e-6, shape=SHAPE, name="norm")
    return g.finish(norm) if early is None else g.finish(norm, early)


@pytest.mark.parametrize("read", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_skip(read: bool, biased: bool) -> None:
    model = skip_norm("RMSNormalization", read=read, biased=biased)
    x, y = model.graph.inputs
    assert apply_equal(FuseSkipLayerNorm(), model, {**X, "y": random(7, 2, 5, 16)}).changed == 1
    node = next(iter(model.graph))
    assert (node.domain, node.op_type) == ("com.microsoft", "SkipSimplifiedLayerNormalization")
    assert [value.name for value in node.inputs if value is not None] == ["x", "y", "w", *["bias"] * biased]
    assert (node.inputs[0], node.inputs[1]) == (x, y)
    assert node.attributes["epsilon"].as_float() == pytest.approx(1e-6)
    assert operators(model) == {**({"Neg": 1} if read else {}), "SkipSimplifiedLayerNormalization": 1}
    if read:
        assert list(model.graph)[1].inputs[0] is node.outputs[3]


def test_skip_refuses_unequal_shapes_and_foreign_targets() -> None:
    outcome = apply(FuseSkipLayerNorm(), skip_norm("RMSNormalization", read=True, skip=(1, "sequence", 16)))
    assert (outcome.changed, len(outcome.refused)) == (0, 1)
    context = dataclasses.replace(CONTEXT, target=TENSORRT)
    outcome = FuseSkipLayerNorm().run(skip_norm("RMSNormalization", read=True), context)
    assert (outcome.changed, len(outcome.refused)) == (0, 1)
