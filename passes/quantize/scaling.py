"""How far to move loud channels of an activation into the weights that they meet, for the weights' sake. Plain arrays.

Only weights are rounded here, so loud channels cost nothing themselves; but an error of a row that meets one counts for
more, and a row that is made larger before its block is rounded loses less (AWQ: Lin et al., "AWQ: Activation-aware
Weight Quantization for LLM Compression and Acceleration", 2023, arXiv:2306.00978). The rows are scaled back with the
activation, so that nothing but the rounding changes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .arithmetic import Doubles, Floats
from .blocks import Grid, cut, decode, encode, nearest_steps
from .smoothing import Choice, smoothing_factors

GAIN = 0.02
"""Part of the error that must go away for scaling to be worth it."""

_COLUMNS = 4096
"""Columns of a weight that errors are taken of, drawn evenly where there are more."""


def rounding_error(second: Doubles, weights: Sequence[Floats], factors: Floats, grid: Grid) -> float:
    """Mean squared error of the products of ``x / s`` with ``s W`` rounded to nearest: ``sum trace(E^T H E)``.

    Args:
        second: ``H = E[x x^T]``, float64 [K, K].
        weights: Each float32 [K, N].
        factors: s, float32 [K].
        grid: What ``s W`` is rounded to.
    """
    moment = second.astype(np.float32)
    total = 0.0
    for weight in weights:
        part = weight[:, :: -(-weight.shape[1] // _COLUMNS)] * factors[:, None]
        blocks = cut(part, grid.block)
        steps = nearest_steps(blocks, grid)
        rounded = decode(encode(blocks, steps, grid), steps).reshape(part.shape[1], -1)[:, : len(part)].T
        error = (rounded - part) / factors[:, None]
        total += float(np.einsum("kn,kn->", error, moment @ error, dtype=np.float64))
    return total


def best_scaling(second: Doubles, weights: Sequence[Floats], strengths: Sequence[float], grid: Grid) -> Choice:
    """The strength a that leaves the least `rounding_error`, or 0 if that is not smaller by `GAIN`.

    The factors are ``rms(x_k)^a / max_n|W_kn|^(1 - a)``, as in the authors' code; those of `smoothing_factors`, and so
    what scaling again can reach could be reached at once.

    Args:
        second: ``H = E[x x^T]``, float64 [K, K].
        weights: All that x is multiplied with, each float32 [K, N].
        strengths: Exponents to try.
        grid: What the weights will be rounded to.
    """
    loudness = np.sqrt(np.diagonal(second))
    reach = np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0).astype(np.float64)
    ones = np.ones(len(second), np.float32)
    before = rounding_error(second, weights, ones, grid)
    best = Choice(0.0, ones, before, before)
    for strength in strengths:
        factors = smoothing_factors(loudness, reach, strength)
        after = rounding_error(second, weights, factors, grid)
        if after < best.after:
            best = Choice(strength, factors, before, after)
    return best if best.after <= (1.0 - GAIN) * before else Choice(0.0, ones, before, before)
