"""order-columns: structure, numbers, what is refused, what is left, idempotence."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from builders import Array, GraphBuilder, apply, apply_equal, operators, random

from passes.base import Effect, Purpose
from passes.fusion import OrderColumns

HEADS, WIDTH, K = 4, 8, 12
COLUMNS = 3 * HEADS * WIDTH
X = {"x": random(0, 2, 5, K)}
INT64 = ir.DataType.INT64
LEAD = ("batch", "sequence")


def weight() -> Array:
    return random(1, K, COLUMNS)


def bias() -> Array:
    return random(2, COLUMNS)


class Product(GraphBuilder):
    """``x W + b [batch, sequence, 96]`` and what takes its columns."""

    def __init__(self, *, biased: bool = True) -> None:
        super().__init__()
        self.x = self.input("x", (*LEAD, K))
        self.held = self.constant(weight(), "w")
        self.whole = self.add("MatMul", self.x, self.held, shape=(*LEAD, COLUMNS), name="product")
        if biased:
            self.whole = self.add("Add", self.whole, self.constant(bias(), "b"), shape=self.whole.shape)

    def by_heads(self) -> list[ir.Value]:
        """Query, key and value of each head side by side, as GPT-NeoX has them."""
        lengths = [self.add("Shape", self.x, start=axis, end=axis + 1, dtype=INT64, shape=(1,)) for axis in (0, 1)]
        split = self.add("Concat", *lengths, self.constant([HEADS, 3 * WIDTH]), axis=0, dtype=INT64, shape=(4,))
        heads = self.add("Reshape", self.whole, split, shape=(*LEAD, HEADS, 3 * WIDTH))
        swapped = self.add("Transpose", heads, perm=[0, 2, 1, 3], shape=("batch", HEADS, "sequence", 3 * WIDTH))
        node = self.add("Split", swapped, axis=3, num_outputs=3, outputs=3).producer()
        assert node is not None
        merged = self.add("Concat", *lengths, self.constant([HEADS * WIDTH]), axis=0, dtype=INT64, shape=(3,))
        ends = []
        for part in node.outputs:
            part.shape, part.dtype = ir.Shape(("batch", HEADS, "sequence", WIDTH)), ir.DataType.FLOAT
            back = self.add("Transpose", part, perm=[0, 2, 1, 3], shape=(*LEAD, HEADS, WIDTH))
            ends.append(self.add("Reshape", back, merged, shape=(*LEAD, HEADS * WIDTH)))
        return ends

    def slices(self, *ranges: tuple[int, int]) -> list[ir.Value]:
        return [
            self.add("Slice", self.whole, *map(self.constant, ([start], [stop], [2])), shape=(*LEAD, stop - start))
            for start, stop in ranges
        ]

    def read(self, *ends: ir.Value) -> ir.Model:
        """Each of the values goes through an operator that moves nothing, in this order."""
        return self.finish(*(self.add("Relu", end, shape=end.shape, name=f"end{i}") for i, end in enumerate(ends)))


def test_it_is_exact_and_for_speed() -> None:
    assert (OrderColumns.effect, OrderColumns.purpose) == (Effect.EXACT, Purpose.SPEED)


@pytest.mark.parametrize("biased", [False, True])
def test_structure_and_numbers(biased: bool) -> None:
    product = Product(biased=biased)
    model = product.read(*product.by_heads())
    assert apply_equal(OrderColumns(), model, X, exact=True).changed == 1
    assert operators(model) == {"MatMul": 1, "Relu": 3, "Split": 1, **({"Add": 1} if biased else {})}
    order = np.arange(COLUMNS).reshape(HEADS, 3, WIDTH).swapaxes(0, 1).reshape(-1)
    held = product.held.const_value
    assert held is not None
    np.testing.assert_array_equal(held.numpy(), weight()[:, order])
    split = next(node for node in model.graph if node.op_type == "Split")
    assert split.inputs[0] is product.whole
    assert [str(value.shape) for value in split.outputs] == ["[batch,sequence,32]"] * 3
    assert [value.producer() for value in split.outputs] == [split] * 3
    assert [node.inputs[0] for node in model.graph if node.op_type == "Relu"] == list(split.outputs)


def test_parts_get_the_order_in_which_they_are_read() -> None:
    product = Product()
    model = product.read(*product.slices((64, COLUMNS), (0, 64)))
    assert apply_equal(OrderColumns(), model, X, exact=True).changed == 1
    split = next(node for node in model.graph if node.op_type == "Split")
    assert [str(value.shape) for value in split.outputs] == ["[batch,sequence,32]", "[batch,sequence,64]"]


def test_slices_in_order_become_a_split_and_the_weight_stays() -> None:
    product = Product()
    model = product.read(*product.slices((0, 32), (32, COLUMNS)))
    before = product.held.const_value
    assert apply_equal(OrderColumns(), model, X, exact=True).changed == 1
    assert product.held.const_value is before
    assert operators(model) == {"Add": 1, "MatMul": 1, "Relu": 2, "Split": 1}


def test_weights_that_others_read_are_refused() -> None:
    product = Product()
    second = product.add("MatMul", product.x, product.held, shape=(*LEAD, COLUMNS))
    model = product.read(*product.by_heads(), second)
    before = operators(model)
    (refusal,) = apply(OrderColumns(), model).refused
    assert "used elsewhere" in refusal.reason
    assert operators(model) == before


@pytest.mark.parametrize("case", ["twice", "never", "whole", "output", "heads"])
def test_what_cannot_be_sorted_is_left(case: str) -> None:
    product = Product()
    ranges = {"twice": ((0, 64), (32, COLUMNS)), "never": ((0, 32), (64, COLUMNS))}
    if case in ranges:
        model = product.read(*product.slices(*ranges[case]))
    elif case == "whole":
        model = product.read(*product.slices((0, 32), (32, COLUMNS)), product.whole)
    elif case == "output":
        model = product.finish(*product.slices((0, 32), (32, COLUMNS)))
    else:
        heads = product.add("Reshape", product.whole, product.constant([0, 0, 12, 8]), shape=(*LEAD, 12, 8))
        model = product.read(heads)
    before = operators(model)
    outcome = apply(OrderColumns(), model)
    assert (outcome.changed, outcome.refused) == (0, ())
    assert operators(model) == before
