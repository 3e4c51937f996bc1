"""Half-quadratic quantization: steps of blocks found without data, robust to outliers among the weights.

Badri & Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023 (mobiusml.github.io/hqq_blog): the
error is measured by an l_p norm with p < 1, which forgives few large errors and not many small ones. It is split off as
E, ``min |E|_p^p + beta / 2 |E - (W - W_rounded)|^2``, and E, by generalized soft thresholding, and the steps take turns
while beta grows. The paper turns the zero point; those of MatMulNBits' fast kernels are codes, so here the zero is
rounded and the scale is fitted along with it.
"""

from __future__ import annotations

import numpy as np

from .arithmetic import Floats
from .blocks import Grid, Steps, decode, encode, nearest_steps
from .clipping import refitted

_NORM = 0.7
_BETA = 10.0
_GROWTH = 1.01
_ROUNDS = 20
"""p, the first beta, its growth in a round and the number of rounds, as in the authors' code."""


def half_quadratic_steps(blocks: Floats, grid: Grid) -> Steps:
    """Steps of the least ``sum |w - rounded|^p``, p = 0.7, found on the way; never worse than RTN's.

    Args:
        blocks: float32 [..., B], finite.
        grid: What to round to.
    """
    best = steps = nearest_steps(blocks, grid)
    least = _error(blocks, best, grid)
    # In units of a step, as beta is.
    unit: Floats = np.abs(steps.scale)[..., None]
    beta = _BETA
    for _ in range(_ROUNDS):
        errors: Floats = (blocks - decode(encode(blocks, steps, grid), steps)) / unit
        target: Floats = blocks - _shrunk(errors, beta) * unit
        steps = refitted(target, steps, grid)
        if not grid.symmetric:
            centre = (encode(blocks, steps, grid) - target / steps.scale[..., None]).mean(-1)
            steps = Steps(steps.scale, np.clip(np.rint(centre), 0, grid.top).astype(np.float32))
        error = _error(blocks, steps, grid)
        better = error < least
        least = np.where(better, error, least)
        best = Steps(np.where(better, steps.scale, best.scale), np.where(better, steps.zero, best.zero))
        beta *= _GROWTH
    return best


def _shrunk(errors: Floats, beta: float) -> Floats:
    """``sign(e) max(|e| - |e|^(p-1) / beta, 0)``: the proximal step of ``|.|_p^p / beta``."""
    size = np.abs(errors)
    kept = size - np.power(np.maximum(size, np.float32(1e-8)), np.float32(_NORM - 1)) / np.float32(beta)
    shrunk: Floats = np.sign(errors) * np.maximum(kept, 0)
    return shrunk


def _error(blocks: Floats, steps: Steps, grid: Grid) -> Floats:
    errors: Floats = np.power(np.abs(blocks - decode(encode(blocks, steps, grid), steps)), np.float32(_NORM)).sum(-1)
    return errors
