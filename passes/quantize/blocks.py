"""Weights in blocks along K, as MatMulNBits and GatherBlockQuantized store them. Plain arrays, no graph.

Both operators of com.microsoft turn a code back into ``(code - zero_point) * scale`` and keep the codes of a block side
by side, the first in the lowest bits of the first byte (ContribOperators.md of ONNX Runtime).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .arithmetic import Floats

Codes = NDArray[np.uint8]

WIDTHS = (2, 4, 8)
"""Bits of a code that the operators know."""
BLOCKS = (16, 32, 64, 128, 256)
"""Elements of a block for which ONNX Runtime's CPU provider has kernels."""

_BYTE = 8
_TINY = np.finfo(np.float32).tiny


@dataclass(frozen=True)
class Grid:
    """The numbers that a block may hold: ``(code - zero) * scale`` for the codes 0 to `top`.

    Attributes:
        bits: Of a code: 2, 4 or 8.
        block: Elements that share a scale: 16, 32, 64, 128 or 256.
        symmetric: The zero is `middle` for all blocks; else each block has its own, one of the codes.
    """

    bits: int = 4
    block: int = 32
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.bits not in WIDTHS:
            raise ValueError(f"bits is {self.bits}, not one of {', '.join(map(str, WIDTHS))}")
        if self.block not in BLOCKS:
            raise ValueError(f"block_size is {self.block}, not one of {', '.join(map(str, BLOCKS))}")

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def middle(self) -> int:
        """The code that stands for 0.0 where no zero points are given."""
        return 1 << (self.bits - 1)


@dataclass(frozen=True)
class Steps:
    """Scale and zero of blocks.

    Attributes:
        scale: float32 [...], not 0; negative where that puts the largest element on the code that is furthest out.
        zero: float32 [...], whole numbers from 0 to the largest code.
    """

    scale: Floats
    zero: Floats


@dataclass(frozen=True)
class QuantizedBlocks:
    """``W [K, N]``, each column in blocks of B rows, the last one padded.

    Attributes:
        values: Codes, uint8 [N, ceil(K / B), B].
        scale: float32 [N, ceil(K / B)].
        zero_point: uint8 [N, ceil(K / B)]: the code that stands for 0.0; None for the middle everywhere.
        bits: Of a code.
    """

    values: Codes
    scale: Floats
    zero_point: Codes | None
    bits: int = 8

    def dequantize(self, rows: int) -> Floats:
        """The floats that the codes stand for: ``(values - zero_point) * scale``, float32 [K, N], K = ``rows``."""
        middle = np.uint8(1 << (self.bits - 1))
        zero = np.full(self.scale.shape, middle) if self.zero_point is None else self.zero_point
        centred = self.values.astype(np.float32) - zero[..., None].astype(np.float32)
        floats = centred * self.scale[..., None]
        return np.asarray(floats.reshape(len(floats), -1)[:, :rows].T, dtype=np.float32)

    def packed(self) -> Codes:
        """The codes as the operators store them, uint8 [N, ceil(K / B), B * bits / 8]."""
        return pack(self.values, self.bits)

    def packed_zero_point(self) -> Codes | None:
        """The zero points as the operators store them, uint8 [N, ceil(ceil(K / B) * bits / 8)]."""
        return None if self.zero_point is None else pack(self.zero_point, self.bits)


def pack(codes: Codes, bits: int) -> Codes:
    """Codes along the last axis side by side in bytes, the first in the lowest bits; what fills the last byte is 0.

    Args:
        codes: uint8 [..., n], each below ``2 ** bits``.
        bits: 2, 4 or 8.

    Returns:
        uint8 [..., ceil(n * bits / 8)].
    """
    each = _BYTE // bits
    missing = -codes.shape[-1] % each
    if missing:
        codes = np.concatenate([codes, np.zeros((*codes.shape[:-1], missing), np.uint8)], axis=-1)
    packed = codes[..., 0::each].copy()
    for place in range(1, each):
        packed |= codes[..., place::each] << np.uint8(bits * place)
    return packed


def unpack(packed: Codes, bits: int, count: int) -> Codes:
    """The codes that `pack` put side by side, uint8 [..., count]."""
    each = _BYTE // bits
    if each == 1:
        return packed[..., :count]
    parts = [(packed >> np.uint8(bits * place)) & np.uint8((1 << bits) - 1) for place in range(each)]
    codes: Codes = np.stack(parts, axis=-1).reshape(*packed.shape[:-1], -1)[..., :count]
    return codes


def cut(weight: Floats, block: int) -> Floats:
    """``W [K, N]`` in blocks, float32 [N, ceil(K / block), block]; padded with zeros, which any grid holds exactly."""
    rows, columns = weight.shape
    count = -(-rows // block)
    if rows == count * block:
        return np.ascontiguousarray(weight.T, np.float32).reshape(columns, count, block)
    padded = np.zeros((columns, count * block), np.float32)
    padded[:, :rows] = weight.T
    return padded.reshape(columns, count, block)


def encode(blocks: Floats, steps: Steps, grid: Grid) -> Codes:
    """The nearest code of each element, uint8 of the shape of ``blocks [..., B]``; ``steps`` are ``[...]``."""
    places = blocks / steps.scale[..., None]
    np.rint(places, out=places)
    places += steps.zero[..., None]
    codes: Codes = np.clip(places, 0, grid.top, out=places).astype(np.uint8)
    return codes


def decode(codes: Codes, steps: Steps) -> Floats:
    """What codes ``[..., B]`` stand for, float32."""
    floats: Floats = (codes - steps.zero[..., None]) * steps.scale[..., None]
    return floats


def nearest_steps(blocks: Floats, grid: Grid) -> Steps:
    """The steps that clip nothing: round to nearest.

    Symmetric codes reach one step further down than up. 8 bits leave that step out, ``max |w| / 127``; with fewer bits
    it counts, and the element of the largest magnitude is put there, by a negative scale if it is positive. Asymmetric:
    from the smallest to the largest element, widened to contain 0.

    Args:
        blocks: float32 [..., B], finite.
        grid: What to round to.
    """
    low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
    if not grid.symmetric:
        scale = safe((high - low) / np.float32(grid.top))
        return Steps(scale, np.clip(np.rint(-low / scale), 0, grid.top).astype(np.float32))
    middle = np.full_like(low, grid.middle)
    if grid.bits == _BYTE:
        return Steps(safe(np.maximum(-low, high) / np.float32(grid.middle - 1)), middle)
    return Steps(safe(-np.where(high > -low, high, low) / np.float32(grid.middle)), middle)


def safe(scale: Floats) -> Floats:
    """The scale, its magnitude kept out of the subnormal numbers, and 1 where it is 0: blocks of zeros."""
    bounded = np.where(np.abs(scale) < _TINY, np.copysign(_TINY, scale), scale)
    return np.where(scale == 0, np.float32(1), bounded).astype(np.float32)


def assemble(codes: Codes, steps: Steps, grid: Grid) -> QuantizedBlocks:
    """Codes ``[N, C, B]`` and steps ``[N, C]`` as one weight."""
    zero = None if grid.symmetric else steps.zero.astype(np.uint8)
    return QuantizedBlocks(codes, steps.scale, zero, grid.bits)


def quantize_blocks(weight: Floats, block: int, *, symmetric: bool = True, bits: int = 8) -> QuantizedBlocks:
    """Round a weight to nearest with one scale for each block of each column.

    Every element differs from its float by at most half a step. One more half where codes end: at the far end of the
    range opposite the largest element (symmetric, fewer than 8 bits) or where the zero point was rounded.

    Args:
        weight: float32 [K, N], finite.
        block: Rows of a block.
        symmetric: Without zero points.
        bits: Of a code.
    """
    grid = Grid(bits, block, symmetric)
    blocks = cut(weight, block)
    steps = nearest_steps(blocks, grid)
    return assemble(encode(blocks, steps, grid), steps, grid)
