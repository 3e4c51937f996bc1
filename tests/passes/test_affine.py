"""Linear sites with their biases, and constants rewritten in place or copied."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from builders import CONTEXT, GraphBuilder, evaluate, random

from passes.affine import affine_of, constant_floats, keeps_precision, matrix_of, put_behind, put_matrix, revise
from passes.grammar import check, signature
from passes.sites import linear_sites
from passes.splice import Names

W, B = random(0, 4, 3), random(1, 3)
X = {"x": random(2, 5, 4)}


def product(*, bias: str = "vector", transposed: bool = False) -> ir.Model:
    g = GraphBuilder()
    x = g.input("x", ("m", 4))
    if bias == "gemm":
        w = g.constant(np.ascontiguousarray(W.T) if transposed else W, "w")
        return g.finish(g.add("Gemm", x, w, g.constant(B, "b"), transB=int(transposed), shape=("m", 3)))
    y = g.add("MatMul", x, g.constant(W, "w"), shape=("m", 3))
    if bias == "none":
        return g.finish(y)
    other = g.input("c", (3,)) if bias == "input" else g.constant(B if bias == "vector" else B[None], "b")
    total = g.add("Add", other, y, shape=("m", 3))
    return g.finish(total, y) if bias == "twice" else g.finish(total)


def test_the_bias_behind_a_product() -> None:
    model = product()
    affine = affine_of(linear_sites(model)[0])
    assert affine is not None
    assert affine.add is model.graph.outputs[0].producer()
    assert affine.bias is model.graph.initializers["b"]
    assert affine.bias_use == (affine.add, 0)
    assert affine.output is model.graph.outputs[0]


@pytest.mark.parametrize("bias", ["none", "input", "row", "twice"])
def test_products_without_a_bias_of_their_own(bias: str) -> None:
    affine = affine_of(linear_sites(product(bias=bias))[0])
    assert affine is not None
    assert (affine.add, affine.bias, affine.bias_use) == (None, None, None)
    assert affine.output is affine.site.output


def test_a_gemm_has_its_bias_inside() -> None:
    affine = affine_of(linear_sites(product(bias="gemm"))[0])
    assert affine is not None
    assert affine.bias_use == (affine.site.node, 2)
    assert affine.add is None


@pytest.mark.parametrize("transposed", [False, True])
def test_a_matrix_is_seen_and_put_one_way(transposed: bool) -> None:
    model = product(bias="gemm", transposed=transposed)
    (site,) = linear_sites(model)
    np.testing.assert_array_equal(matrix_of(site), W)
    put_matrix(site, 2 * W)
    check(model, CONTEXT.target)
    np.testing.assert_allclose(evaluate(model, X)["Gemm_3_out"], X["x"] @ (2 * W) + B, atol=1e-5)


def test_a_constant_that_others_read_is_copied() -> None:
    g = GraphBuilder()
    x, c = g.input("x", (3,)), g.constant(B, "c")
    left, right = g.add("Mul", x, c, shape=(3,), name="left"), g.add("Add", x, c, shape=(3,), name="right")
    model = g.finish(left, right)
    node, other = model.graph
    revise(model.graph, Names(model.graph), (node, 1), 2 * B)
    assert other.inputs[1] is c
    np.testing.assert_array_equal(constant_floats(node.inputs[1], 3), 2 * B)
    np.testing.assert_array_equal(constant_floats(c, 3), B)
    copy = node.inputs[1]
    revise(model.graph, Names(model.graph), (node, 1), 3 * B)
    assert node.inputs[1] is copy
    check(model, CONTEXT.target)


def test_nodes_behind_a_value_take_its_name_and_its_readers() -> None:
    g = GraphBuilder()
    x = g.input("x", ("m", 4))
    y = g.add("Relu", x, shape=("m", 4), name="y")
    stays, moves = g.add("Abs", y, shape=("m", 4), name="stays"), g.add("Exp", y, shape=("m", 4), name="moves")
    model = g.finish(y, stays, moves)
    before = signature(model)
    neg = ir.node("Neg", [y], name="neg")
    neg.outputs[0].name = "temporary"
    reader = stays.producer()
    assert reader is not None
    put_behind(y, [neg], "inner", [(reader, 0)])
    check(model, CONTEXT.target)
    assert signature(model) == before
    assert (y.name, neg.outputs[0].name, str(neg.outputs[0].shape)) == ("inner", "y_out", "[m,4]")
    assert reader.inputs[0] is y
    assert moves.producer().inputs[0] is neg.outputs[0]  # type: ignore[union-attr]
    assert model.graph.outputs[0] is neg.outputs[0]


@pytest.mark.parametrize(
    ("after", "kept"),
    [([1.0, 0.0], True), ([np.inf, 0.0], False), ([1e-39, 0.0], False), ([0.0, 0.0], False), ([1e-37, 0.0], True)],
)
def test_precision_is_kept_unless_numbers_vanish_or_overflow(after: list[float], kept: bool) -> None:
    before = np.array([2.0, 0.0], np.float32)
    assert keeps_precision(before, np.array(after, np.float32)) is kept
