"""8-bit weights in blocks along K, as the operator MatMulNBits of com.microsoft stores them. Plain arrays, no graph."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .arithmetic import FULL_RANGE, Floats

MIDDLE = 128
"""The integer that stands for 0.0 where no zero points are given."""

_STEPS = 255


@dataclass(frozen=True)
class QuantizedBlocks:
    """``W [K, N]``, each column in blocks of B rows, the last one padded with zeros.

    Attributes:
        values: uint8 [N, ceil(K / B), B].
        scale: float32 [N, ceil(K / B)].
        zero_point: uint8 [N, ceil(K / B)]: the integer that stands for 0.0; None for `MIDDLE` everywhere.
    """

    values: NDArray[np.uint8]
    scale: Floats
    zero_point: NDArray[np.uint8] | None

    def dequantize(self, rows: int) -> Floats:
        """The floats that the integers stand for: ``(values - zero_point) * scale``, float32 [K, N], K = ``rows``."""
        zero = np.full(self.scale.shape, MIDDLE, np.uint8) if self.zero_point is None else self.zero_point
        centred = self.values.astype(np.float32) - zero[..., None].astype(np.float32)
        floats = centred * self.scale[..., None]
        return np.asarray(floats.reshape(len(floats), -1)[:, :rows].T, dtype=np.float32)


def quantize_blocks(weight: Floats, block: int, *, symmetric: bool = True) -> QuantizedBlocks:
    """Quantize a weight with one scale for each block of each column.

    Symmetric: steps of ``max |w| / 127`` around `MIDDLE`. Asymmetric: 255 steps from the smallest to the largest w of
    the block, widened to contain 0. Every element differs from its float by at most half a step, where the rounding of
    the zero point cuts an end off by at most one.

    Args:
        weight: float32 [K, N], finite.
        block: Rows of a block.
        symmetric: Without zero points.
    """
    rows, columns = weight.shape
    count = -(-rows // block)
    padded = np.zeros((columns, count * block), np.float32)
    padded[:, :rows] = weight.T
    blocks = padded.reshape(columns, count, block)
    low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
    span = np.maximum(-low, high) / np.float32(FULL_RANGE) if symmetric else (high - low) / np.float32(_STEPS)
    scale = np.where(span == 0, np.float32(1), np.maximum(span, np.finfo(np.float32).tiny))
    zero = np.full_like(scale, MIDDLE) if symmetric else np.clip(np.rint(-low / scale), 0, _STEPS)
    values = np.clip(np.rint(blocks / scale[..., None]) + zero[..., None], 0, _STEPS).astype(np.uint8)
    return QuantizedBlocks(values, scale, None if symmetric else zero.astype(np.uint8))
