"""fuse-gelu, fuse-bias-gelu, fuse-layer-norm, fuse-skip-layer-norm: structure, numbers, non-matches, idempotence."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx_ir as ir
import pytest
from builders import CONTEXT, GraphBuilder, apply, apply_equal, operators, random

from artifacts.target import TENSORRT
from passes.fusion import FuseBiasGelu, FuseGelu, FuseLayerNorm, FuseSkipLayerNorm

SHAPE = ("batch", "sequence", 16)
X = {"x": random(0, 2, 5, 16)}
NO_MICROSOFT = dataclasses.replace(CONTEXT, target=TENSORRT)


def erf_gelu(order: str, *, root: float = math.sqrt(2.0), opset: int = 21, shared: bool = False) -> ir.Model:
    g = GraphBuilder(opset)
    x = g.input("x", SHAPE)
    half = g.constant(0.5) if order != "div by two" else g.constant(2.0)
    erf = g.add("Erf", g.add("Div", x, g.constant(root), shape=SHAPE), shape=SHAPE)
    total = g.add("Add", erf, g.constant(1.0), shape=SHAPE)
    if order == "half last":
        y = g.add("Mul", g.add("Mul", x, total), half, name="last")
    elif order == "half first":
        y = g.add("Mul", g.add("Mul", half, x), total, name="last")
    elif order == "half inside":
        y = g.add("Mul", x, g.add("Mul", total, half), name="last")
    else:
        y = g.add("Div", g.add("Mul", total, x), half, name="last")
    y.shape = ir.Shape(SHAPE)
    return g.finish(y, total) if shared else g.finish(y)


def tanh_gelu(form: str, cubic: float = 0.044715) -> ir.Model:
    g = GraphBuilder()
    x = g.input("x", SHAPE)
    if form == "pow":
        inner = g.add("Add", x, g.add("Mul", g.constant(cubic), g.add("Pow", x, g.constant(3.0))))
        argument = g.add("Mul", g.constant(math.sqrt(2 / math.pi)), inner)
    else:
        square = g.add("Mul", g.add("Mul", x, x), g.constant(cubic))
        scaled = g.add("Mul", x, g.constant(math.sqrt(2 / math.pi)))
        argument = g.add("Mul", scaled, g.add("Add", g.constant(1.0), square))
    total = g.add("Add", g.constant(1.0), g.add("Tanh", argument))
    return g.finish(g.add("Mul", g.add("Mul", g.constant(0.5), x), total, shape=SHAPE, name="last"))


@pytest.mark.parametrize("order", ["half last", "half first", "half inside", "div by two"])
def test_erf_gelu_is_fused_in_every_order(order: str) -> None:
    model = erf_gelu(order)
    source = model.graph.inputs[0]
    assert apply_equal(FuseGelu(), model, X).changed == 1
    (node,) = model.graph
    assert (node.op_type, node.domain, node.inputs[0] is source) == ("Gelu", "", True)
    assert node.attributes["approximate"].as_string() == "none"
    assert not model.graph.initializers


@pytest.mark.parametrize("form", ["pow", "square"])
def test_tanh_gelu_is_fused(form: str) -> None:
    model = tanh_gelu(form)
    assert apply_equal(FuseGelu(), model, X).changed == 1
    (node,) = model.graph
    assert node.op_type == "Gelu"
    assert node.attributes["approximate"].as_string() == "tanh"


def test_gelu_of_another_constant_is_none() -> None:
    for model in (erf_gelu("half last", root=1.5), tanh_gelu("pow", cubic=0.05), tanh_gelu("square", cubic=0.04)):
        before = operators(model)
        assert apply(FuseGelu(), model).changed == 0
        assert operators(model) == before


def test_gelu_whose_inside_is_used_elsewhere_is_left() -> None:
    model = erf_gelu("half last", shared=True)
    assert apply(FuseGelu(), model).changed == 0


def test_gelu_in_an_old_opset_is_refused_with_a_remedy() -> None:
    outcome = apply(FuseGelu(), erf_gelu("half last", opset=17))
    assert outcome.changed == 0
    (refusal,) = outcome.refused
    assert "opset 20" in refusal.reason
    assert "raise-opset" in refusal.remedy


def bias_gelu(form: str = "none", width: int = 16, *, shared: bool = False) -> ir.Model:
    g = GraphBuilder()
    x = g.input("x", SHAPE)
    total = g.add("Add", g.constant(random(1, width), "bias"), x, shape=SHAPE, name="sum")
    y = g.add("Gelu", total, approximate=form, shape=SHAPE)
    return g.finish(y, total) if shared else g.finish(y)


@pytest.mark.parametrize(("form", "op_type"), [("none", "BiasGelu"), ("tanh", "FastGelu")])
def test_bias_gelu(form: str, op_type: str) -> None:
    model = bias_gelu(form)
    source, bias = model.graph.inputs[0], model.graph.initializers["bias"]
    assert apply_equal(FuseBiasGelu(), model, X).changed == 1
    (node,) = model.graph
    assert (node.domain, node.op_type) == ("com.microsoft", op_type)
    assert node.inputs[0] is source
    assert node.inputs[1] is bias


def test_bias_gelu_refuses() -> None:
    cases = ((bias_gelu(shared=True), CONTEXT), (bias_gelu(width=1), CONTEXT), (bias_gelu(), NO_MICROSOFT))
    for model, context in cases:
        outcome = FuseBiasGelu().run(model, context)
        assert (outcome.changed, len(outcome.refused)) == (0, 1)
        assert "BiasGelu" not in operators(model)


def layer_norm(square: str = "pow", axis: int = -1, bias: bool = True, scale: int = 16, eps: float = 1e-5) -> ir.Model:
    g = GraphBuilder()
    x = g.input("x", SHAPE)
    kept = ("batch", "sequence", 1)
    axes = g.constant(np.array([axis]))
    d = g.add("Sub", x, g.add("ReduceMean", x, axes, shape=kept), shape=SHAPE)
    power = g.add("Pow", d, g.constant(2.0), shape=SHAPE) if square == "pow" else g.add("Mul", d, d, shape=SHAPE)
    variance = g.add("Add", g.add("ReduceMean", power, axes, shape=kept), g.constant(eps), shape=kept)
    unit = g.add("Div", d, g.add("Sqrt", variance, shape=kept), shape=SHAPE)
    y = g.add("Mul", unit, g.constant(random(2, scale), "w"), shape=SHAPE)
    if bias:
        y = g.add("Add", y, g.constant(random(3, 16), "b"), shape=SHAPE)
    return g.finish(y)


@pytest.mark.parametrize("square", ["pow", "mul"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("eps", [1e-5, 1e-12])
def test_layer_norm(square: str, bias: bool, eps: float) -> None:
    model = layer_norm(square, bias=bias, eps=eps)
    source, scale = model.graph.inputs[0], model.graph.initializers["w"]
    assert apply_equal(FuseLayerNorm(), model, X).changed == 1
    (node,) = model.graph
    assert node.op_type == "LayerNormalization"
    assert node.inputs[0] is source
    assert node.inputs[1] is scale
    assert len(node.inputs) == 2 + bias
    assert node.attributes["epsilon"].as_float() == pytest.approx(eps)


def test_layer_norm_over_another_axis_is_left() -> None:
    assert apply(FuseLayerNorm(), layer_norm(axis=1)).changed == 0


def test_layer_norm_without_a_vector_scale_is_refused() -> None:
    outcome = apply(FuseLayerNorm(), layer_norm(scale=1))
    assert (outcome.changed, len(outcome.refused)) == (0, 1)


def skip_norm(*, shared: bool = False, biased: bool = False, skip: tuple[int | str, ...] = SHAPE) -> ir.Model:
    g = GraphBuilder()
    x, y = g.input("x", SHAPE), g.input("y", skip)
    if biased:
        x = g.add("Add", x, g.constant(random(4, 16), "projection"), shape=SHAPE)
    total = g.add("Add", x, y, shape=SHAPE, name="sum")
    early = g.add("Neg", total, shape=SHAPE) if shared else None
    scale, shift = g.constant(random(5, 16)), g.constant(random(6, 16))
    norm = g.add("LayerNormalization", total, scale, shift, axis=-1, epsilon=1e-12, shape=SHAPE, name="norm")
    return g.finish(norm) if early is None else g.finish(norm, early)


XY = {**X, "y": random(7, 2, 5, 16)}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_skip_layer_norm(shared: bool, biased: bool) -> None:
    model = skip_norm(shared=shared, biased=biased)
    x, y = model.graph.inputs
    assert apply_equal(FuseSkipLayerNorm(), model, XY).changed == 1
    node = next(iter(model.graph))
    assert (node.domain, node.op_type) == ("com.microsoft", "SkipLayerNormalization")
    assert node.inputs[0] is x
    assert node.inputs[1] is y
    assert len(node.inputs) == 4 + biased
    assert operators(model) == {**({"Neg": 1} if shared else {}), "SkipLayerNormalization": 1}
    if shared:
        assert list(model.graph)[1].inputs[0] is node.outputs[3]


def test_skip_layer_norm_refuses_unequal_shapes_and_foreign_targets() -> None:
    outcome = apply(FuseSkipLayerNorm(), skip_norm(skip=(1, "sequence", 16)))
    assert (outcome.changed, len(outcome.refused)) == (0, 1)
    assert "shape" in outcome.refused[0].reason
    outcome = FuseSkipLayerNorm().run(skip_norm(), NO_MICROSOFT)
    assert (outcome.changed, len(outcome.refused)) == (0, 1)
