"""The ways to round a weight to a grid, by name, in bounded memory. Plain arrays, no graph."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum

import numpy as np

from .arithmetic import Doubles, Floats
from .blocks import Grid, QuantizedBlocks, Steps, assemble, cut, encode, nearest_steps
from .clipping import clipped_steps
from .gptq import gptq
from .hqq import half_quadratic_steps

_ELEMENTS = 1 << 17
"""Elements that are worked on together: what is made of them on the way stays in the cache of a core."""


class Method(StrEnum):
    """How the codes and scales of a weight are chosen."""

    RTN = "rtn"
    """Round to nearest: the whole range of each block."""
    MSE = "mse"
    """The range of the least squared error of each block."""
    WEIGHTED = "weighted-mse"
    """The same, each row weighted by the second moment of the channel that it meets."""
    HQQ = "hqq"
    """Half-quadratic: an l_p norm with p < 1, which forgives outliers."""
    GPTQ = "gptq"
    """The least error of the product: what rounding one row loses is made up for in the others."""

    @property
    def calibrated(self) -> bool:
        """Whether it needs the second moment of the input."""
        return self in (Method.WEIGHTED, Method.GPTQ)


def round_weight(
    weight: Floats, grid: Grid, method: Method, second: Doubles | None = None, *, ordered: bool = False
) -> QuantizedBlocks:
    """Round ``W [K, N]`` to a grid.

    Args:
        weight: float32 [K, N], finite; a view of transposed storage is as good.
        grid: What to round to.
        method: How.
        second: ``H = E[x x^T]`` of the input, float64 [K, K]; for methods that are `Method.calibrated`.
        ordered: Whether GPTQ rounds important rows first.

    Raises:
        ValueError: The method needs the second moment and there is none.
        numpy.linalg.LinAlgError: The second moment is not positive semidefinite.
    """
    if method.calibrated and second is None:
        raise ValueError(f"{method} needs the second moment of the input")
    if method is Method.GPTQ and second is not None:
        return gptq(weight, second, grid, ordered=ordered)
    rows, columns = weight.shape
    importance = None if second is None or method is not Method.WEIGHTED else _importance(second, rows, grid)
    width = max(1, _ELEMENTS // rows)
    shape = (columns, -(-rows // grid.block))
    codes = np.empty((*shape, grid.block), np.uint8)
    whole = Steps(np.empty(shape, np.float32), np.empty(shape, np.float32))

    def part(start: int) -> None:
        end = start + width
        blocks = cut(weight[:, start:end], grid.block)
        steps = _steps(blocks, grid, method, importance)
        codes[start:end] = encode(blocks, steps, grid)
        whole.scale[start:end], whole.zero[start:end] = steps.scale, steps.zero

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        # Read to the end, so that what a part raises is raised here.
        list(pool.map(part, range(0, columns, width)))
    return assemble(codes, whole, grid)


def _steps(blocks: Floats, grid: Grid, method: Method, importance: Floats | None) -> Steps:
    if method is Method.RTN:
        return nearest_steps(blocks, grid)
    if method is Method.HQQ:
        return half_quadratic_steps(blocks, grid)
    return clipped_steps(blocks, grid, importance)


def _importance(second: Doubles, rows: int, grid: Grid) -> Floats:
    """Diagonal of H in blocks, float32 [C, B]; a thousandth of its mean is added, so that no row counts for nothing."""
    diagonal = np.diagonal(second)
    padded = np.zeros(-(-rows // grid.block) * grid.block)
    padded[:rows] = diagonal + 1e-3 * diagonal.mean() if diagonal.any() else 1.0
    return padded.astype(np.float32).reshape(-1, grid.block)
