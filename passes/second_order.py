"""What methods share that work on ``H = E[x x^T]``, the second moment of what a weight meets. Plain arrays.

The squared error of ``x W`` is ``trace(E^T H E)`` for an error E of the weight.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

DAMPING = 0.01
"""Part of the mean of H's diagonal that is added to it, as in GPTQ and SparseGPT."""
_UNUSED = 1e-6


def damped(second: Doubles, damping: float = DAMPING) -> Doubles:
    """``H`` with a part of the mean of its diagonal added there, float64 [K, K]; the identity where H is 0."""
    added = damping * float(np.trace(second)) / len(second)
    matrix = np.array(second, np.float64)
    matrix[np.diag_indices_from(matrix)] += added if added != 0 else 1.0
    return matrix


def damped_by_use(second: Doubles) -> Doubles:
    """As `damped`, but what nothing comes through counts for next to nothing: its weights are the first to go."""
    matrix, unused = damped(second), np.diagonal(second) == 0
    if not unused.all():
        matrix[unused, unused] *= _UNUSED
    return matrix


def factors(second: Doubles) -> tuple[Floats, Floats]:
    """``U`` and ``D`` of ``H = U D U^T``, U unit upper triangular and D diagonal.

    With them ``e^T H e = sum_k D_k (e_k + sum_{j<k} e_j U_jk)^2``: row k can make up for the errors before it. ``D_k``
    is the inverse of the diagonal of the inverse of what is left of H at row k, the denominator of OBS.

    Args:
        second: H, float64 [K, K], positive definite.

    Returns:
        U, float32 [K, K], and the diagonal of D, float32 [K].

    Raises:
        numpy.linalg.LinAlgError: H is not positive definite.
    """
    # The lower Cholesky factor of H read backwards, read backwards, is the upper one of H.
    upper = np.linalg.cholesky(second[::-1, ::-1])[::-1, ::-1]
    diagonal = np.diagonal(upper)
    return np.asarray(upper / diagonal, dtype=np.float32), np.square(diagonal).astype(np.float32)


def feedback(second: Doubles) -> Floats:
    """``U`` of `factors`: how far the error of each row moves those after it, float32 [K, K].

    Raises:
        numpy.linalg.LinAlgError: H is not positive definite.
    """
    return factors(second)[0]
