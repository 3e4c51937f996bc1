"""Constants that are made each time they are read: weights that stay in their files, and what is joined of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

_TILE = 128


class DeferredTensor(ir.LazyTensor):
    """A constant that nothing holds in memory: every read makes it anew, so a pass reads it once and lets go of it.

    Attributes:
        key: What it is made of. Equal keys mean equal bytes, so that nobody has to read two tensors to compare them.
    """

    def __init__(
        self, make: Callable[[], NDArray[Any]], dtype: ir.DataType, shape: Sequence[int], key: Hashable, name: str = ""
    ) -> None:
        """``make`` gives an array of that type and shape, in any memory order; it may not change between calls."""
        super().__init__(lambda: ir.Tensor(make(), dtype=dtype), dtype, ir.Shape(shape), name=name)
        self.key = key

    def contiguous(self) -> NDArray[Any]:
        """The array in C order."""
        return in_order(self.numpy())

    def tobytes(self) -> bytes:
        """Its bytes, in C order."""
        return self.contiguous().tobytes()

    def tofile(self, file: BinaryIO) -> None:
        """Write the same."""
        file.write(self.contiguous().data.cast("B"))


def in_order(array: NDArray[Any]) -> NDArray[Any]:
    """The array in C order. Transposed matrices are copied in tiles: ten times as fast as row by row."""
    if array.ndim != 2 or not array.flags.f_contiguous or array.flags.c_contiguous:
        return np.ascontiguousarray(array)
    rows, columns = array.shape
    copy = np.empty_like(array, order="C")
    for top in range(0, rows, _TILE):
        for left in range(0, columns, _TILE):
            copy[top : top + _TILE, left : left + _TILE] = array[top : top + _TILE, left : left + _TILE]
    return copy


def side_by_side(matrices: Sequence[tuple[ir.TensorProtocol, bool]]) -> ir.TensorProtocol:
    """``[W1 W2 …]``, deferred where one of them is.

    Args:
        matrices: Constants ``[K, N]`` of one type, or ``[N, K]`` where the flag says that they are stored transposed.
    """
    tensors = tuple(tensor for tensor, _ in matrices)

    def make() -> NDArray[Any]:
        arrays = (tensor.numpy().T if transposed else tensor.numpy() for tensor, transposed in matrices)
        return np.concatenate(list(arrays), axis=1)

    if not any(isinstance(tensor, DeferredTensor) for tensor in tensors):
        return ir.Tensor(in_order(make()))
    shapes = [tensor.shape.numpy()[:: -1 if transposed else 1] for tensor, transposed in matrices]
    # The tensors themselves are part of the key where they have none: they live as long as it does.
    keys = tuple((tensor.key if isinstance(tensor, DeferredTensor) else tensor, flag) for tensor, flag in matrices)
    shape = (shapes[0][0], sum(columns for _, columns in shapes))
    return DeferredTensor(make, tensors[0].dtype, shape, ("side by side", keys))
