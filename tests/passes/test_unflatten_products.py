"""unflatten-products: structure, numbers, what is left, idempotence."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from builders import GraphBuilder, apply, apply_equal, operators, random

from passes.base import Effect, Purpose
from passes.cleanup import UnflattenProducts
from passes.sites import linear_sites

X = {"x": random(0, 2, 5, 12)}
INT64 = ir.DataType.INT64


def flattened(
    *, transposed: bool = False, biased: bool = True, alpha: float = 1.0, read: bool = False, heads: bool = False
) -> ir.Model:
    g = GraphBuilder()
    x = g.input("x", ("batch", "sequence", 12))
    lengths = [g.add("Shape", x, start=axis, end=axis + 1, dtype=INT64, shape=(1,)) for axis in (0, 1)]
    flat = g.add("Reshape", x, g.constant([-1, 12]), shape=("batch*sequence", 12))
    weight = random(1, 8, 12) if transposed else random(1, 12, 8)
    operands = [flat, g.constant(weight, "w"), *([g.constant(random(2, 8), "b")] if biased else [])]
    product = g.add("Gemm", *operands, transB=int(transposed), alpha=alpha, shape=("batch*sequence", 8))
    last = (2, 4) if heads else (8,)
    target = g.add("Concat", *lengths, g.constant(last), axis=0, dtype=INT64, shape=(2 + len(last),))
    y = g.add("Reshape", product, target, shape=("batch", "sequence", *last), name="y")
    return g.finish(y, product) if read else g.finish(y)


def test_it_is_exact_and_for_form() -> None:
    assert (UnflattenProducts.effect, UnflattenProducts.purpose) == (Effect.EXACT, Purpose.FORM)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_structure_and_numbers(transposed: bool, biased: bool) -> None:
    model = flattened(transposed=transposed, biased=biased)
    assert apply_equal(UnflattenProducts(), model, X).changed == 1
    assert [node.op_type for node in model.graph] == ["MatMul", *["Add"] * biased]
    (site,) = linear_sites(model)
    assert site.input is model.graph.inputs[0]
    assert (site.shape, site.transposed) == ((12, 8), False)
    assert site.weight.name == ("w.transposed" if transposed else "w")
    assert model.graph.outputs[0].name == "y_out"
    assert len(model.graph.initializers) == 1 + biased


@pytest.mark.parametrize("form", [{"alpha": 2.0}, {"read": True}, {"heads": True}], ids=lambda form: next(iter(form)))
def test_what_is_none_is_left(form: dict[str, float | bool]) -> None:
    model = flattened(**form)  # type: ignore[arg-type]
    before = operators(model)
    outcome = apply(UnflattenProducts(), model)
    assert (outcome.changed, outcome.refused) == (0, ())
    assert operators(model) == before


def test_products_that_are_flat_anyway_are_left() -> None:
    g = GraphBuilder()
    x = g.input("x", ("tokens", 12))
    model = g.finish(g.add("Gemm", x, g.constant(random(1, 12, 8)), shape=("tokens", 8)))
    assert apply(UnflattenProducts(), model).changed == 0
    assert np.array_equal(list(operators(model).values()), [1])
