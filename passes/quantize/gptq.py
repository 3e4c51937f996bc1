"""Rounding a weight so that the products it makes, not its elements, stay what they were. Plain arrays.

With ``H = E[x x^T]`` the squared error of ``x W`` is ``e^T H e`` for each column, ``e = w - rounded``. GPTQ (Frantar,
Ashkboos, Hoefler & Alistarh, 2022, arXiv:2210.17323) rounds one row after the other and makes up for each error in the
rows to come. Here in the form of LDLQ, to which it is equal (Chee, Cai, Kuleshov & De Sa, 2023, arXiv:2307.13304): with
``H = U D U^T``, U unit upper triangular, ``e^T H e = sum_k D_k (e_k + sum_{j<k} e_j U_jk)^2``, so that row k is rounded
at ``w_k + sum_{j<k} e_j U_jk``. One Cholesky factorization and no inverse.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from passes.second_order import damped, feedback

from .arithmetic import Doubles, Floats
from .blocks import Codes, Grid, QuantizedBlocks, Steps, assemble, cut, safe
from .clipping import clipped_steps

SPARSE = 0.25
"""Part of a weight that is exactly 0 from which on its zeros are taken to be meant, and stay."""

Kept = NDArray[np.bool_]

_PANEL = 128
"""Rows that are worked on together before the rest is touched."""
_ELEMENTS = 1 << 22
"""Elements of the weight that are worked on together."""
_PULL = 1e-6
"""Strength of the pull of a scale towards what it was, in parts of its own term."""


def gptq(weight: Floats, second: Doubles, grid: Grid, *, ordered: bool = False, sweeps: int = 2) -> QuantizedBlocks:
    """Round ``W [K, N]`` for inputs with the second moment H.

    Without ``ordered`` the steps of a block are chosen when its first row is reached, for what its rows then are. With
    it rows of large ``H_kk`` are rounded first (act-order) and the steps are chosen before, since blocks stay where
    they are in the weight. Then `refit` and `descend` follow, which only lower the error. Of a weight of many zeros, as
    pruning leaves it (`SPARSE`), the zeros stay: every grid holds them exactly.

    Args:
        weight: float32 [K, N], finite.
        second: H, float64 [K, K]. Damped here.
        grid: What to round to.
        ordered: Whether to round important rows first.
        sweeps: How often scales are fitted again and codes gone over again afterwards.

    Raises:
        numpy.linalg.LinAlgError: H is not positive semidefinite, or not finite.
    """
    matrix = _padded(damped(second), -len(second) % grid.block)
    diagonal = np.diagonal(matrix)
    order = np.argsort(-diagonal, kind="stable") if ordered else np.arange(len(matrix))
    upper = feedback(matrix[np.ix_(order, order)] if ordered else matrix)
    moment = matrix.astype(np.float32)
    del matrix, diagonal
    shape = (weight.shape[1], len(moment) // grid.block)
    codes = np.empty((*shape, grid.block), np.uint8)
    scale, zero = np.empty(shape, np.float32), np.empty(shape, np.float32)
    width = max(1, _ELEMENTS // len(moment))
    sparse = np.count_nonzero(weight) <= (1 - SPARSE) * weight.size
    for start in range(0, len(codes), width):
        part = slice(start, start + width)
        blocks = cut(weight[:, part], grid.block)
        kept = blocks.reshape(len(blocks), -1) != 0 if sparse else None
        found, steps = _rounded(blocks, upper, np.diagonal(moment), order if ordered else None, grid, kept)
        for _ in range(sweeps):
            steps = refit(blocks, found, steps, moment)
            found = descend(blocks, found, steps, moment, grid, kept)
        if sweeps:
            steps = refit(blocks, found, steps, moment)
        codes[part], scale[part], zero[part] = found, steps.scale, steps.zero
    return assemble(codes, Steps(scale, zero), grid)


def descend(blocks: Floats, codes: Codes, steps: Steps, moment: Floats, grid: Grid, kept: Kept | None = None) -> Codes:
    """Go over the codes once more, each put where the error ``e^T H e`` is least while the others stay.

    Args:
        blocks: The weight, float32 [N, C, B].
        codes: uint8 [N, C, B]; left as they are.
        steps: Of the blocks, [N, C].
        moment: H, float32 [C * B, C * B], of positive diagonal.
        grid: What the codes are of.
        kept: Elements whose codes may change, [N, C * B]; None for all.

    Returns:
        Codes of an error that is not larger but for the rounding of float32.
    """
    columns, _, size = blocks.shape
    scale = np.repeat(steps.scale, size, axis=1)
    zero = np.repeat(steps.zero, size, axis=1)
    places = codes.reshape(columns, -1).astype(np.float32)
    errors = blocks.reshape(columns, -1) - (places - zero) * scale
    slope = errors @ moment
    for start in range(0, places.shape[1], _PANEL):
        panel = slice(start, start + _PANEL)
        inside = moment[panel, panel]
        moved = np.zeros_like(slope[:, panel])
        for k in range(moved.shape[1]):
            at = start + k
            wanted = places[:, at] + slope[:, at] / (inside[k, k] * scale[:, at])
            code = np.clip(np.rint(wanted), 0, grid.top)
            if kept is not None:
                code = np.where(kept[:, at], code, places[:, at])
            moved[:, k] = (code - places[:, at]) * scale[:, at]
            places[:, at] = code
            slope[:, at + 1 : start + moved.shape[1]] -= moved[:, k, None] * inside[k, k + 1 :]
        slope[:, start + moved.shape[1] :] -= moved @ moment[panel, start + moved.shape[1] :]
    return places.astype(np.uint8).reshape(codes.shape)


def refit(blocks: Floats, codes: Codes, steps: Steps, moment: Floats) -> Steps:
    """The scales with which the codes have the least ``e^T H e``: least squares over all blocks of a column at once.

    Args:
        blocks: The weight, float32 [N, C, B].
        codes: uint8 [N, C, B].
        steps: Of the blocks, [N, C]; the zeros stay, and so do the scales of blocks whose codes all stand for 0.
        moment: H, float32 [C * B, C * B].
    """
    columns, count, size = blocks.shape
    centred = codes - steps.zero[..., None]
    flat = blocks.reshape(columns, -1)
    normal = np.empty((columns, count, count))
    for i in range(count):
        spread = centred[:, i] @ moment[i * size : (i + 1) * size]
        normal[:, i] = (spread.reshape(columns, count, size) * centred).sum(-1)
    right = ((flat @ moment).reshape(columns, count, size) * centred).sum(-1)
    # A small pull towards the scales that are there keeps blocks of zeros and nearly equal ones in place.
    pull = _PULL * np.maximum(np.einsum("nii->ni", normal), np.finfo(np.float32).tiny)
    normal += np.einsum("ni,ij->nij", pull, np.eye(count))
    scale = np.linalg.solve(normal, (right + pull * steps.scale)[..., None])[..., 0]
    return Steps(np.where(scale == 0, steps.scale, safe(scale.astype(np.float32))), steps.zero)


def _rounded(
    blocks: Floats,
    upper: Floats,
    importance: Floats,
    order: NDArray[np.intp] | None,
    grid: Grid,
    kept: Kept | None,
) -> tuple[Codes, Steps]:
    """The rounding with feedback itself; the steps chosen on the way, or before where there is an order."""
    columns, _, size = blocks.shape
    flat = blocks.reshape(columns, -1)
    places = np.arange(flat.shape[1]) if order is None else order
    weights = importance.reshape(blocks.shape[1:])
    chosen = None if order is None else clipped_steps(blocks, grid, weights)
    scale, zero = np.ones(blocks.shape[:2], np.float32), np.full(blocks.shape[:2], grid.middle, np.float32)
    if chosen is not None:
        scale, zero = chosen.scale, chosen.zero
    codes = np.empty(flat.shape, np.uint8)
    errors = np.empty_like(flat)
    # No block may lie in two panels.
    width = max(_PANEL, size)
    for start in range(0, len(places), width):
        panel = places[start : start + width]
        target = flat[:, panel] + errors[:, :start] @ upper[:start, start : start + width]
        for k, place in enumerate(panel):
            block = place // size
            if chosen is None and k % size == 0:
                met = target[:, k : k + size]
                met = met if kept is None else np.where(kept[:, start + k : start + k + size], met, np.float32(0))
                steps = clipped_steps(met, grid, weights[block])
                scale[:, block], zero[:, block] = steps.scale, steps.zero
            code = np.clip(np.rint(target[:, k] / scale[:, block]) + zero[:, block], 0, grid.top)
            if kept is not None:
                code = np.where(kept[:, place], code, zero[:, block])
            codes[:, place] = code
            error = flat[:, place] - (code - zero[:, block]) * scale[:, block]
            errors[:, start + k] = error
            target[:, k + 1 :] += error[:, None] * upper[start + k, start + k + 1 : start + len(panel)]
    return codes.reshape(blocks.shape), Steps(scale, zero)


def _padded(matrix: Doubles, more: int) -> Doubles:
    """H of a weight that got rows of zeros: they meet inputs of their own, of the mean size of the others."""
    if not more:
        return matrix
    padded = np.zeros((len(matrix) + more, len(matrix) + more))
    padded[: len(matrix), : len(matrix)] = matrix
    added = np.arange(len(matrix), len(padded))
    padded[added, added] = np.trace(matrix) / len(matrix)
    return padded
