"""fold-scale: structure, numbers, what is refused, what is none of its business, idempotence."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from builders import Array, GraphBuilder, apply, apply_equal, evaluate, operators, random

from passes.base import Effect, Purpose
from passes.fusion import FoldScale
from passes.sites import NAME_SCOPES, linear_sites

K, N = 24, 12
X = {"x": random(0, 2, 5, K)}
WEIGHT, BIAS = random(1, K, N), random(2, N)
ROOT = np.float32(1 / np.sqrt(3))


def numbers(model: ir.Model, name: str) -> Array:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


class Scaled(GraphBuilder):
    """``x W + b`` ready to be scaled."""

    def __init__(self, weight: Array = WEIGHT, bias: Array | None = BIAS) -> None:
        super().__init__()
        self.x = self.input("x", ("b", "s", K), ir.DataType.from_numpy(weight.dtype))
        self.w = self.constant(weight, "w")
        dtype = self.x.dtype
        width = weight.shape[1]
        self.product = self.add("MatMul", self.x, self.w, shape=("b", "s", width), name="product", dtype=dtype)
        self.y = self.product
        if bias is not None:
            self.b = self.constant(bias, "b")
            self.y = self.add("Add", self.b, self.product, shape=("b", "s", width), name="linear", dtype=dtype)

    def scaled(self, op_type: str, scale: Array | float, shape: tuple[int | str, ...] = ("b", "s", N)) -> ir.Value:
        constant = self.constant(np.asarray(scale, np.float32), "scale")
        return self.add(op_type, self.y, constant, shape=shape, name="scaled")


def behind(op_type: str, scale: Array | float, bias: Array | None = BIAS) -> ir.Model:
    g = Scaled(bias=bias)
    scaled = g.scaled(op_type, scale)
    return g.finish(g.add("Relu", scaled, shape=("b", "s", N), name="last"))


def test_it_is_exact_and_a_form() -> None:
    assert (FoldScale.effect, FoldScale.purpose) == (Effect.EXACT, Purpose.FORM)


@pytest.mark.parametrize("scale", [ROOT, np.array([ROOT]), random(3, N)], ids=["scalar", "one", "vector"])
@pytest.mark.parametrize("bias", [BIAS, None], ids=["bias", "plain"])
@pytest.mark.parametrize("op_type", ["Mul", "Div"])
def test_structure_and_numbers(op_type: str, bias: Array | None, scale: Array) -> None:
    model = behind(op_type, scale, bias)
    (site,) = linear_sites(model)
    site.node.metadata_props[NAME_SCOPES] = "['', 'layer.query', 'product']"
    weight, relu = site.weight, list(model.graph)[-1]
    assert apply_equal(FoldScale(), model, X).changed == 1
    (after,) = linear_sites(model)
    assert (after.node is site.node, after.weight is weight, after.path) == (True, True, "layer.query")
    last = after.output if bias is None else next(iter(after.output.consumers())).outputs[0]
    assert relu.inputs[0] is last
    assert sorted(model.graph.initializers) == (["w"] if bias is None else ["b", "w"])
    expected = WEIGHT * scale if op_type == "Mul" else WEIGHT / scale
    np.testing.assert_array_equal(numbers(model, "w"), expected.astype(np.float32))
    if bias is not None:
        np.testing.assert_array_equal(numbers(model, "b"), bias * scale if op_type == "Mul" else bias / scale)


@pytest.mark.parametrize("when", ["before", "between", "after"])
def test_a_query_is_scaled_before_or_after_its_heads_are_split(when: str) -> None:
    g = Scaled()
    scale = g.constant(np.array(ROOT), "scale")
    value = g.y
    shapes: dict[str, tuple[int | str, ...]] = {"before": ("b", "s", N), "between": ("b", "s", 3, 4)}
    for step in ("before", "between", "after"):
        shape = shapes.get(step, ("b", 3, "s", 4))
        if step == "between":
            value = g.add("Reshape", value, g.constant(np.array([0, 0, 3, 4])), shape=shape)
        if step == "after":
            value = g.add("Transpose", value, perm=[0, 2, 1, 3], shape=shape)
        if step == when:
            value = g.add("Mul", scale, value, shape=shape)
    model = g.finish(g.add("Relu", value, shape=("b", 3, "s", 4)))
    assert apply_equal(FoldScale(), model, X).changed == 1
    assert operators(model) == {"Add": 1, "MatMul": 1, "Relu": 1, "Reshape": 1, "Transpose": 1}


def test_factors_before_and_behind_the_bias_go_in_one_run() -> None:
    g = Scaled(bias=None)
    inner = g.add("Mul", g.y, g.constant(0.5), shape=("b", "s", N))
    linear = g.add("Add", inner, g.constant(BIAS, "b"), shape=("b", "s", N))
    model = g.finish(g.add("Div", linear, g.constant(4.0), shape=("b", "s", N), name="last"))
    assert apply_equal(FoldScale(), model, X, exact=True).changed == 2
    assert operators(model) == {"Add": 1, "MatMul": 1}
    assert model.graph.outputs[0].name == "last_out"
    np.testing.assert_array_equal(numbers(model, "w"), WEIGHT / 8)
    np.testing.assert_array_equal(numbers(model, "b"), BIAS / 4)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_gemm(transposed: bool, biased: bool) -> None:
    g = GraphBuilder()
    x = g.input("x", ("m", K))
    weight = g.constant(np.ascontiguousarray(WEIGHT.T) if transposed else WEIGHT, "w")
    bias = [g.constant(BIAS, "b")] if biased else []
    y = g.add("Gemm", x, weight, *bias, transB=int(transposed), shape=("m", N))
    model = g.finish(g.add("Mul", y, g.constant(random(3, N)), shape=("m", N)))
    assert apply_equal(FoldScale(), model, {"x": random(0, 7, K)}).changed == 1
    assert operators(model) == {"Gemm": 1}


def test_weights_of_constant_nodes_are_scaled_where_they_are() -> None:
    g = GraphBuilder()
    x = g.input("x", ("b", "s", K))
    w = g.add("Constant", value=ir.Tensor(WEIGHT))
    y = g.add("MatMul", x, w, shape=("b", "s", N))
    model = g.finish(g.add("Mul", y, g.add("Constant", value_float=0.25), shape=("b", "s", N)))
    assert apply_equal(FoldScale(), model, X, exact=True).changed == 1
    assert operators(model) == {"Constant": 1, "MatMul": 1}


def shared(what: str) -> ir.Model:
    g = Scaled()
    scaled = g.scaled("Mul", ROOT)
    other = {"product": g.product, "sum": g.y, "bias": g.b, "weight": g.w}[what]
    return g.finish(scaled, g.add("Neg", other, name="other", shape=other.shape))


def of_type(dtype: type[np.generic]) -> ir.Model:
    g = Scaled(WEIGHT.astype(dtype), None)
    shape = ("b", "s", N)
    return g.finish(g.add("Mul", g.y, g.constant(np.array(0.5, dtype)), shape=shape, dtype=g.x.dtype))


def wide() -> ir.Model:
    g = Scaled(WEIGHT[:, :1], None)
    return g.finish(g.scaled("Mul", random(3, 4), ("b", "s", 4)))


def deep() -> ir.Model:
    g = Scaled()
    return g.finish(g.scaled("Mul", np.full((1, 1, 1, 1), ROOT), (1, "b", "s", N)))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (shared("sum"), "what it scales is used elsewhere"),
        (shared("bias"), "bias is used elsewhere"),
        (shared("weight"), "weight is used elsewhere"),
        (behind("Mul", 0.0), "0 or not finite"),
        (behind("Div", 0.0), "0 or not finite"),
        (behind("Mul", np.inf), "0 or not finite"),
        (behind("Mul", np.where(np.arange(N) == 3, np.nan, 1.0)), "0 or not finite"),
        (behind("Mul", 3e38), "range of float32"),
        (behind("Mul", 1e-38), "range of float32"),
        (of_type(np.float16), "not of float32"),
        (of_type(np.float64), "not of float32"),
        (wide(), "not as long as"),
        (deep(), "changes the rank"),
    ],
)
def test_refused(model: ir.Model, reason: str) -> None:
    before, held = operators(model), numbers(model, "w")
    outcome = apply(FoldScale(), model)
    assert outcome.changed == 0
    (refusal,) = outcome.refused
    assert reason in refusal.reason
    assert operators(model) == before
    np.testing.assert_array_equal(numbers(model, "w"), held)


@pytest.mark.parametrize("form", ["reciprocal", "input", "vector of heads", "no site", "product read twice"])
def test_other_products_are_left(form: str) -> None:
    g = Scaled()
    if form == "reciprocal":
        y = g.add("Div", g.constant(2.0), g.y, shape=("b", "s", N))
    elif form == "input":
        y = g.add("Mul", g.y, g.input("s", (N,)), shape=("b", "s", N))
    elif form == "vector of heads":
        split = g.add("Reshape", g.y, g.constant(np.array([0, 0, 3, 4])), shape=("b", "s", 3, 4))
        y = g.add("Mul", split, g.constant(random(3, 4)), shape=("b", "s", 3, 4))
    elif form == "product read twice":
        y = g.add("Add", g.scaled("Mul", 2.0), g.product, shape=("b", "s", N))
    else:
        y = g.add("Mul", g.add("Relu", g.y, shape=("b", "s", N)), g.constant(2.0), shape=("b", "s", N))
    model = g.finish(y)
    before = operators(model)
    outcome = apply(FoldScale(), model)
    assert (outcome.changed, outcome.refused) == (0, ())
    assert operators(model) == before


def test_every_number_is_within_one_rounding() -> None:
    """Folding rounds each weight once: the products differ by at most eps |x| |W| s, eps twice for the sums."""
    model = behind("Mul", ROOT, None)
    before = evaluate(model, X)["last_out"]
    FoldScale().run(model, None)  # type: ignore[arg-type]
    after = evaluate(model, X)["last_out"]
    eps = float(np.finfo(np.float32).eps)
    bound = (2 + np.sqrt(K)) * eps * (np.abs(X["x"]).astype(np.float64) @ np.abs(WEIGHT)) * ROOT
    assert (np.abs(after - before) <= bound).all()
