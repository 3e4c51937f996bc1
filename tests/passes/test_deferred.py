from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from builders import GraphBuilder, evaluate, random
from numpy.typing import NDArray

from artifacts.target import CPU
from passes.base import Context
from passes.cleanup import ShareInitializers
from passes.deferred import DeferredTensor, side_by_side
from passes.fusion import PackProducts

FEEDS = {"x": random(0, 3, 64)}


class Counting:
    """Makes an array, and counts how often."""

    def __init__(self, array: NDArray[np.float32]) -> None:
        self.array = array
        self.count = 0

    def __call__(self) -> NDArray[np.float32]:
        self.count += 1
        return self.array

    def tensor(self, key: str = "") -> DeferredTensor:
        return DeferredTensor(self, ir.DataType.FLOAT, self.array.shape, key or id(self))


def test_it_is_made_each_time_it_is_read_and_not_before() -> None:
    made = Counting(random(1, 4, 6))
    tensor = made.tensor()
    assert (tensor.shape, tensor.dtype, tensor.nbytes, tensor.size) == ((4, 6), ir.DataType.FLOAT, 96, 24)
    assert made.count == 0
    assert np.array_equal(tensor.numpy(), made.array)
    assert tensor.tobytes() == made.array.tobytes()
    assert made.count == 2


def test_any_memory_order_gives_the_same_bytes() -> None:
    array = random(1, 6, 4).T
    assert Counting(array).tensor().tobytes() == np.ascontiguousarray(array).tobytes()


@pytest.mark.parametrize("which", [(), (0,), (1,), (0, 1)])
def test_matrices_side_by_side(which: tuple[int, ...]) -> None:
    one, other = random(1, 4, 6), random(2, 3, 4)
    makers = [Counting(one), Counting(other)]
    tensors = [make.tensor() if index in which else ir.Tensor(make.array) for index, make in enumerate(makers)]
    joined = side_by_side([(tensors[0], False), (tensors[1], True)])
    assert isinstance(joined, DeferredTensor) is bool(which)
    assert not any(make.count for make in makers)
    assert tuple(joined.shape) == (4, 9)
    assert np.array_equal(joined.numpy(), np.concatenate([one, other.T], axis=1))


def test_equal_keys_of_what_is_joined_of_the_same() -> None:
    tensors = [Counting(random(seed, 4, 4)).tensor(f"w{seed}") for seed in (1, 2)]
    keys = [side_by_side([(tensor, flag) for tensor in tensors]) for flag in (False, False, True)]
    assert all(isinstance(joined, DeferredTensor) for joined in keys)
    first, again, transposed = (joined.key for joined in keys if isinstance(joined, DeferredTensor))
    assert first == again != transposed


def graph(weights: list[DeferredTensor]) -> ir.Model:
    """y = x @ w0 + x @ w1, the weights [64, 64]."""
    builder = GraphBuilder()
    x = builder.input("x", ["n", 64])
    values = [builder.constant(np.zeros((64, 64), np.float32), f"w{index}") for index in range(2)]
    for value, tensor in zip(values, weights, strict=True):
        value.const_value = tensor
    products = [builder.add("MatMul", x, value, shape=["n", 64]) for value in values]
    return builder.finish(builder.add("Add", *products, shape=["n", 64]))


def test_products_are_packed_without_reading_them() -> None:
    makers = [Counting(random(seed, 64, 64)) for seed in (1, 2)]
    model = graph([make.tensor() for make in makers])
    expected = next(iter(evaluate(model, FEEDS).values()))
    read = sum(make.count for make in makers)
    assert PackProducts().run(model, Context(CPU)).changed == 1
    assert sum(make.count for make in makers) == read
    np.testing.assert_allclose(next(iter(evaluate(model, FEEDS).values())), expected, rtol=1e-5, atol=1e-4)
    assert PackProducts().run(model, Context(CPU)).changed == 0


def test_sharing_reads_nothing_and_goes_by_what_they_are_made_of() -> None:
    makers = [Counting(random(1, 64, 64)) for _ in range(2)]
    assert ShareInitializers().run(graph([make.tensor("same") for make in makers]), Context(CPU)).changed == 1
    assert ShareInitializers().run(graph([make.tensor() for make in makers]), Context(CPU)).changed == 0
    assert not any(make.count for make in makers)
