"""Scales that lose the least of a block when its elements are rounded: clipping is cheaper than a coarse step.

Each block tries a grid of ranges. For the codes ``c`` of each (0 where the zero is) the best scale is known, ``<w, c> /
<c, c>``, and so is the error that it leaves, ``<w, w> - <w, c>^2 / <c, c>``: the range that leaves the least is kept.
Weighted by the second moment of the channel that each row meets, this is the error of the product without the
correlations between channels.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .arithmetic import Floats
from .blocks import Grid, Steps, nearest_steps, safe

_PARTS = tuple(float(part) for part in np.linspace(1.0, 0.5, 13))
"""Parts of the full range that are tried for 2 and 4 bits."""
_PARTS_8 = tuple(float(part) for part in np.linspace(1.0, 0.94, 4))
"""The same for 8 bits: a step is small, and clipping soon costs more than it saves."""


def clipped_steps(blocks: Floats, grid: Grid, importance: Floats | None = None) -> Steps:
    """Steps of the smallest ``sum_b importance_b (w_b - rounded_b)^2`` among the ranges tried; never worse than RTN's.

    Symmetric ranges are tried with both signs of the scale, so that either end of the block may get the code that has
    no counterpart; asymmetric ones with both ends drawn in, and with either.

    Args:
        blocks: float32 [..., B], finite.
        grid: What to round to.
        importance: float32, not negative, broadcastable to ``blocks``; None for all alike.
    """
    full = nearest_steps(blocks, grid)
    scale, zero = full.scale, full.zero
    most = np.full(scale.shape, -1, np.float32)
    room = (np.empty_like(blocks), np.empty_like(blocks))
    for steps in _candidates(blocks, grid, full):
        for explained, fitted in _fits(blocks, steps, grid, importance, room):
            better = explained > most
            most = np.where(better, explained, most)
            scale, zero = np.where(better, fitted, scale), np.where(better, steps.zero, zero)
    return Steps(scale, zero)


def refitted(blocks: Floats, steps: Steps, grid: Grid) -> Steps:
    """The scale that suits the codes of the blocks best; their zero stays."""
    room = (np.empty_like(blocks), np.empty_like(blocks))
    return Steps(next(_fits(blocks, steps, grid, None, room))[1], steps.zero)


def _candidates(blocks: Floats, grid: Grid, full: Steps) -> Iterator[Steps]:
    """Ranges to try; symmetric ones with one sign of the scale, `_fits` tries the other."""
    parts = _PARTS_8 if grid.bits == 8 else _PARTS
    if grid.symmetric:
        for part in parts:
            yield Steps(full.scale * np.float32(part), full.zero)
        return
    low, high = np.minimum(blocks.min(-1), 0), np.maximum(blocks.max(-1), 0)
    for part in parts:
        for down, up in ((part, part), (part, 1.0), (1.0, part)):
            bottom, upper = low * np.float32(down), high * np.float32(up)
            scale = safe((upper - bottom) / np.float32(grid.top))
            yield Steps(scale, np.clip(np.rint(-bottom / scale), 0, grid.top).astype(np.float32))


def _fits(
    blocks: Floats, steps: Steps, grid: Grid, importance: Floats | None, room: tuple[Floats, Floats]
) -> Iterator[tuple[Floats, Floats]]:
    """How much of ``<w, w>`` the codes of these steps explain at their best scale, and that scale; both [...].

    Symmetric: then the same of the negative scale. Its codes less their zero are those of the positive one, negated:
    one division serves both, and what differs is the end that has a code more.

    ``room`` is of the shape of ``blocks``, twice, and is overwritten: memory that is new for each candidate would cost
    more than what is computed in it.
    """
    places = np.rint(np.divide(blocks, steps.scale[..., None], out=room[0]), out=room[0])
    # The codes less their zero: those are what `encode` gives.
    low = -float(grid.middle) if grid.symmetric else -steps.zero[..., None]
    yield _fit(blocks, np.clip(places, low, low + grid.top, out=room[1]), steps.scale, importance)
    if grid.symmetric:
        negated = np.clip(places, 1.0 - grid.middle, float(grid.middle), out=room[1])
        explained, scale = _fit(blocks, negated, steps.scale, importance)
        yield explained, -scale


def _fit(blocks: Floats, centred: Floats, scale: Floats, importance: Floats | None) -> tuple[Floats, Floats]:
    """What codes less their zero explain at their best scale, and that scale; ``scale`` where it would be 0."""
    weighted = centred if importance is None else centred * importance
    square = np.einsum("...b,...b->...", weighted, centred)
    product = np.einsum("...b,...b->...", weighted, blocks)
    best = product / np.where(square > 0, square, np.float32(1))
    return product * best, np.where(best == 0, scale, safe(best))
