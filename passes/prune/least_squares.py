"""The least error ``e^T H e`` of each column of a weight that is pruned, ``e = w - v``. Plain arrays, in place."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .amounts import Floats

Kept = NDArray[np.bool_]

_ROUNDS = 30
"""Steps of conjugate gradients, at most."""
_SETTLED = 1e-4
"""Part of the first residual, in its preconditioned norm, at which they end."""
_PANEL = 128
"""Rows that are worked on together before the rest is touched."""
_PAIRS = 1 << 16
"""Pairs of rows, of all columns, that are compared together: they stay in the cache of a core."""
_GAIN = 1e-5
"""Part of what an element is worth that an exchange must gain: more than rounding."""


def refit(weight: Floats, values: Floats, kept: Kept, moment: Floats, rounds: int = _ROUNDS) -> None:
    """Put the elements that stay where the error is least, by conjugate gradients over all columns at once.

    Preconditioned with the diagonal (Hestenes & Stiefel, 1952); each step lowers the error of each column.

    Args:
        weight: What is approximated, float32 [K, N].
        values: What to begin with, float32 [K, N], 0 where not ``kept``; holds the result.
        kept: Which elements may differ from 0, [K, N].
        moment: H, float32 [K, K], positive definite.
        rounds: Steps, at most.
    """
    inverse = 1 / np.diagonal(moment)[:, None]
    residual = (moment @ (weight - values)) * kept
    direction = residual * inverse
    size = np.einsum("kn,kn->n", residual, direction)
    enough = size * np.float32(_SETTLED**2)
    for _ in range(rounds):
        if (size <= enough).all():
            return
        met = (moment @ direction) * kept
        curvature = np.einsum("kn,kn->n", direction, met)
        step = np.where(curvature > 0, size / np.where(curvature > 0, curvature, 1), 0)
        values += step * direction
        residual -= step * met
        scaled = residual * inverse
        after = np.einsum("kn,kn->n", residual, scaled)
        direction *= after / np.where(size > 0, size, 1)
        direction += scaled
        size = after


def exchange(weight: Floats, values: Floats, kept: Kept, moment: Floats, near: int) -> None:
    """Let elements that stay and pruned ones of the same column change places where that lowers the error.

    In each group of ``near`` rows of each column the best pair does: with ``r = H e``, dropping p costs ``v_p^2 H_pp +
    2 v_p r_p``, and q in its place then wins back ``(r_q + v_p H_pq)^2 / H_qq`` at its best. Both numbers are exact
    while the others stay, so that each exchange lowers the error. How many stay in a group does not change.

    Args:
        weight: What is approximated, float32 [K, N].
        values: float32 [K, N], 0 where not ``kept``; holds the result.
        kept: Which elements may differ from 0, [K, N]; holds the result.
        moment: H, float32 [K, K], of positive diagonal.
        near: Rows of a group; at most `_PANEL`.
    """
    slope = moment @ (weight - values)
    panel, width = max(near, _PANEL // near * near), max(1, _PAIRS // near**2)
    for start in range(0, len(weight), panel):
        stop = min(start + panel, len(weight))
        moved = np.zeros((stop - start, weight.shape[1]), np.float32)
        for first in range(start, stop, near):
            rows = slice(first, min(first + near, stop))
            inside = moment[rows, rows]
            for left in range(0, weight.shape[1], width):
                part = (rows, slice(left, left + width))
                before = values[part].copy()
                _exchange_best(values[part], kept[part], slope[part], inside)
                moved[first - start : rows.stop - start, part[1]] = values[part] - before
            slope[rows.stop : stop] -= moment[rows.stop : stop, rows] @ moved[first - start : rows.stop - start]
        slope[stop:] -= moment[stop:, start:stop] @ moved


def _exchange_best(values: Floats, kept: Kept, slope: Floats, inside: Floats) -> None:
    """Exchange the best pair of each column of ``values [n, N]`` in place, where one gains."""
    diagonal = np.diagonal(inside)
    cost = np.where(kept, values * (values * diagonal[:, None] + 2 * slope), np.float32(np.inf))
    # [p, q, N]: the slope at q once p is gone.
    after = slope[None] + values[:, None] * inside[:, :, None]
    change = np.where(kept[None], np.float32(np.inf), cost[:, None] - np.square(after) / diagonal[None, :, None])
    change = change.reshape(-1, values.shape[1])
    best, every = change.argmin(axis=0), np.arange(values.shape[1])
    out, into = np.divmod(best, len(values))
    columns = np.flatnonzero(change[best, every] < -_GAIN * np.abs(cost[out, every]))
    out, into = out[columns], into[columns]
    values[into, columns] = after[out, into, columns] / diagonal[into]
    values[out, columns] = 0
    kept[into, columns], kept[out, columns] = True, False
