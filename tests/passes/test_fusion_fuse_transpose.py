"""fuse-transpose: structure, numbers, what is refused, what is none of its business, idempotence."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest
from builders import CONTEXT, GraphBuilder, apply, apply_equal, operators, random

from artifacts.target import CUDA, OPENVINO, TENSORRT
from passes.base import Context, Effect, Purpose
from passes.fusion import FuseTranspose
from passes.sites import NAME_SCOPES

B, H, S, T, D = 2, 3, 5, 7, 4
Q, KEY = random(0, B, H, S, D), random(1, B, T, H, D)


def permuted(shape: Sequence[int | str], perm: Sequence[int]) -> list[int | str]:
    return [shape[axis] for axis in perm]


def scores(perm: Sequence[int] | None = (0, 2, 3, 1), *, shape: Sequence[int | str] = ("b", "t", H, D)) -> ir.Model:
    """``q k^T`` with a key that is transposed once, from ``shape``."""
    g = GraphBuilder()
    q, k = g.input("q", ("b", H, "s", D)), g.input("k", shape)
    options = {} if perm is None else {"perm": list(perm)}
    turned = permuted(shape, perm or range(len(shape))[::-1])
    keys = g.add("Transpose", k, shape=turned, name="keys", **options)
    return g.finish(g.add("MatMul", q, keys, shape=("b", H, "s", "t"), name="scores"))


def test_it_is_exact_and_for_speed() -> None:
    assert (FuseTranspose.effect, FuseTranspose.purpose) == (Effect.EXACT, Purpose.SPEED)


@pytest.mark.parametrize("target", [CONTEXT.target, OPENVINO], ids=lambda target: target.name)
def test_the_key_of_an_attention_keeps_the_move_of_whole_rows(target: object) -> None:
    model = scores()
    q, k = model.graph.inputs
    list(model.graph)[1].metadata_props[NAME_SCOPES] = "['', 'layer.attention', 'scores']"
    context = dataclasses.replace(CONTEXT, target=target)  # type: ignore[arg-type]
    assert apply_equal(FuseTranspose(), model, {"q": Q, "k": KEY}, context, exact=True).changed == 1
    transpose, product = model.graph
    assert (product.domain, product.op_type) == ("com.microsoft", "FusedMatMul")
    assert product.attributes["transB"].as_int() == 1
    assert product.inputs[0] is q
    assert product.inputs[1] is transpose.outputs[0]
    assert transpose.inputs[0] is k
    assert tuple(transpose.attributes["perm"].as_ints()) == (0, 2, 1, 3)
    assert str(transpose.outputs[0].shape) == f"[b,{H},t,{D}]"
    assert product.outputs[0] is model.graph.outputs[0]
    assert product.metadata_props[NAME_SCOPES] == "['', 'layer.attention', 'scores']"


def test_a_plain_swap_goes_away() -> None:
    model = scores((0, 1, 3, 2), shape=("b", H, "t", D))
    q, k = model.graph.inputs
    assert apply_equal(FuseTranspose(), model, {"q": Q, "k": random(1, B, H, T, D)}, exact=True).changed == 1
    (product,) = model.graph
    assert product.inputs[0] is q
    assert product.inputs[1] is k


def test_a_matrix_that_is_transposed_whole() -> None:
    model = scores(None, shape=("t", D))
    k = model.graph.inputs[1]
    assert apply_equal(FuseTranspose(), model, {"q": Q, "k": random(1, T, D)}).changed == 1
    (product,) = model.graph
    assert product.inputs[1] is k


@pytest.mark.parametrize("both", [False, True])
def test_the_left_operand(both: bool) -> None:
    g = GraphBuilder()
    a, b = g.input("a", ("b", "k", "n", 6)), g.input("b", ("b", "n", "m", "k") if both else ("b", "n", "k", "m"))
    left = g.add("Transpose", a, perm=[0, 2, 3, 1], shape=("b", "n", 6, "k"))
    right = g.add("Transpose", b, perm=[0, 1, 3, 2], shape=("b", "n", "k", "m")) if both else b
    model = g.finish(g.add("MatMul", left, right, shape=("b", "n", 6, "m")))
    feeds = {"a": random(2, 2, 4, 3, 6), "b": random(3, 2, 3, 5, 4) if both else random(3, 2, 3, 4, 5)}
    assert apply_equal(FuseTranspose(), model, feeds).changed == 1 + both
    product = list(model.graph)[-1]
    assert product.attributes["transA"].as_int() == 1
    assert ("transB" in product.attributes) is both
    assert operators(model) == {"FusedMatMul": 1, "Transpose": 1}
    if both:
        assert product.inputs[1] is b


def read_twice(by: str) -> ir.Model:
    model = scores()
    keys = next(iter(model.graph)).outputs[0]
    if by == "output":
        model.graph.outputs.append(keys)
    else:
        other = ir.node("Neg", [keys], name="other")
        other.outputs[0].name, other.outputs[0].dtype, other.outputs[0].shape = "neg", keys.dtype, keys.shape
        model.graph.append(other)
        model.graph.outputs.append(other.outputs[0])
    return model


def of_halves() -> ir.Model:
    model = scores()
    for value in (*model.graph.inputs, *(node.outputs[0] for node in model.graph)):
        value.dtype = ir.DataType.FLOAT16
    return model


def vector() -> ir.Model:
    g = GraphBuilder()
    q, k = g.input("q", (D,)), g.input("k", ("t", D))
    keys = g.add("Transpose", k, perm=[1, 0], shape=(D, "t"))
    return g.finish(g.add("MatMul", q, keys, shape=("t",)))


@pytest.mark.parametrize(
    ("model", "context", "reason"),
    [
        (scores(), Context(CUDA), "target cuda"),
        (scores(), Context(TENSORRT), "target tensorrt"),
        (read_twice("output"), CONTEXT, "used elsewhere too"),
        (read_twice("node"), CONTEXT, "used elsewhere too"),
        (of_halves(), CONTEXT, "not known to be of float32"),
        (vector(), CONTEXT, "not known to be matrices"),
    ],
)
def test_refused(model: ir.Model, context: Context, reason: str) -> None:
    before = operators(model)
    outcome = FuseTranspose().run(model, context)
    assert outcome.changed == 0
    (refusal,) = outcome.refused
    assert reason in refusal.reason
    assert operators(model) == before


@pytest.mark.parametrize("form", ["rows", "constant", "weight"])
def test_other_products_are_left(form: str) -> None:
    g = GraphBuilder()
    if form == "rows":  # whole rows move already
        x, k = g.input("x", ("b", H, "s", "t")), g.input("k", ("b", "t", H, D))
        y = g.add("MatMul", x, g.add("Transpose", k, perm=[0, 2, 1, 3], shape=("b", H, "t", D)))
    elif form == "constant":
        x = g.input("x", ("b", D))
        y = g.add("MatMul", x, g.add("Transpose", g.constant(random(0, 6, D)), perm=[1, 0], shape=(D, 6)))
    else:
        x = g.input("x", (D, "b"))
        turned = g.add("Transpose", x, perm=[1, 0], shape=("b", D))
        y = g.add("MatMul", turned, g.constant(np.ones((D, 3), np.float32)))
    y.shape = ir.Shape(("b", H, "s", D) if form == "rows" else ("b", 6 if form == "constant" else 3))
    model = g.finish(y)
    before = operators(model)
    outcome = apply(FuseTranspose(), model)
    assert (outcome.changed, outcome.refused) == (0, ())
    assert operators(model) == before
