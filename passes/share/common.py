"""One matrix in the place of several that are nearly it. Plain arrays.

A matrix R in the place of W moves the products ``x W`` by ``x (W - R)``: with ``H = E[x xᵀ]`` the mean square of it is
``tr((W - R)ᵀ H (W - R))``. The sum of that over several matrices is least for ``(sum H_i)^-1 sum H_i W_i``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from passes.second_order import damped

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


def damage(weight: Floats | Doubles, replacement: Floats | Doubles, second: Doubles | None) -> float:
    """Root mean square of what the products of a weight move by, in parts of their own root mean square.

    Args:
        weight: W, [K, N].
        replacement: R, [K, N].
        second: H, float64 [K, K]; None for the identity: then this is the relative Frobenius distance.
    """
    moved = np.asarray(weight, np.float64) - replacement
    size, whole = _square(moved, second), _square(np.asarray(weight, np.float64), second)
    if whole <= 0.0:
        return 0.0 if size <= 0.0 else np.inf
    return float(np.sqrt(max(size, 0.0) / whole))


def shared(weights: Sequence[Floats], seconds: Sequence[Doubles | None]) -> Floats:
    """The matrix that moves the products of all least, float32 [K, N]; their mean where there are no second moments.

    Args:
        weights: W_i, float32 [K, N] each, at least one.
        seconds: H_i, float64 [K, K] each, or None for all. Their sum is damped, with a pull to the mean of the weights.
    """
    mean = sum(np.asarray(weight, np.float64) for weight in weights) / len(weights)
    pairs = [(weight, second) for weight, second in zip(weights, seconds, strict=True) if second is not None]
    if len(pairs) < len(weights):
        return np.asarray(mean, np.float32)
    total = np.sum([second for _, second in pairs], axis=0)
    right = np.sum([second @ (weight - mean) for weight, second in pairs], axis=0)
    return np.asarray(mean + np.linalg.solve(damped(total), right), np.float32)


def distance(weight: Floats, other: Floats, sizes: Iterable[Doubles | None]) -> float:
    """`damage` as it would be if no two channels of the input went together: K N operations instead of K² N.

    Args:
        weight: W, float32 [K, N].
        other: R, float32 [K, N].
        sizes: Diagonals of second moments, float64 [K] each; the least distance of all counts. None for ones.
    """
    found = np.inf
    for size in sizes:
        scale = 1.0 if size is None else np.sqrt(size)[:, None]
        found = min(found, damage(weight * scale, other * scale, None))
    return found


def _square(matrix: Doubles, second: Doubles | None) -> float:
    return float(np.vdot(matrix, matrix if second is None else second @ matrix))
