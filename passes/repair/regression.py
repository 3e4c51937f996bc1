"""Least squares that makes up for what a linear map gets wrong, from second moments alone. Plain arrays.

A map computes ``x W + b`` and should compute y. With the rest ``r = y - x W - b``, a change D of the weight and d of
the bias leave ``E||r - x D - d||^2``, least for ``D = C^-1 E_c[x r^T]`` and ``d = E[r] - E[x] D`` with the covariances
``C = E[x x^T] - E[x] E[x]^T`` and ``E_c[x r^T] = E[x r^T] - E[x] E[r]^T``; without a bias for
``D = E[x x^T]^-1 E[x r^T]``. Of the rest itself the error is known to full precision, however small it is next to y.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from passes.second_order import damped

Doubles = NDArray[np.float64]

STEPS = 64
"""Steps of conjugate gradients, at most."""
ACCURACY = 1e-3
"""Where they end: the rest in parts of what it was, in the norm of the preconditioner. What is lost of the gain goes by
its square."""


@dataclass(frozen=True, eq=False)
class Rest:
    """Moments of what a linear map reads and of what it gets wrong.

    Attributes:
        second: Mean of ``x xᵀ``, float64 [K, K].
        cross: Mean of ``x rᵀ``, float64 [K, N].
        square: Mean of ``r²``, float64 [N].
        mean: Mean of x, float64 [K].
        offset: Mean of r, float64 [N].
    """

    second: Doubles
    cross: Doubles
    square: Doubles
    mean: Doubles
    offset: Doubles

    @classmethod
    def of(cls, second: Doubles, mean: Doubles, channels: int) -> Rest:
        """From the moments of ``[x, r]``, float64 [K + N, K + N] and [K + N]; ``channels`` is K."""
        return cls(
            second[:channels, :channels],
            second[:channels, channels:],
            np.diagonal(second)[channels:],
            mean[:channels],
            mean[channels:],
        )

    @property
    def error(self) -> float:
        """Mean of ``||r||²``."""
        return float(self.square.sum())


@dataclass(frozen=True, eq=False)
class Change:
    """What to add to a weight and to a bias.

    Attributes:
        weight: float64 [K, N]; None to leave it.
        bias: float64 [N]; None to leave it.
        gain: By how much the mean of ``||r||²`` falls.
    """

    weight: Doubles | None
    bias: Doubles | None
    gain: float


def product_square(second: Doubles, weight: NDArray[np.floating]) -> float:
    """Mean of ``||x W||²``, for the second moment of x, float64 [K, K], and W [K, N]."""
    return float(np.vdot(weight, second @ weight))


def bias_change(rest: Rest) -> Change:
    """The change of the bias alone: the mean of the rest."""
    return Change(None, rest.offset, float(np.square(rest.offset).sum()))


def affine_change(rest: Rest, damping: float, *, bias: bool, support: NDArray[np.bool_] | None = None) -> Change:
    """The change of the weight, and of the bias where there is one.

    Args:
        rest: Of the map as it is.
        damping: Part of the mean diagonal of C that is added to it: a pull of the weight towards what it is.
        bias: Whether there is a bias to change too.
        support: Elements of the weight that may change, bool [K, N]; None for all. Others stay, and the columns are
            solved by conjugate gradients on their supports.
    """
    second, cross = rest.second, rest.cross
    if bias:
        second = second - np.outer(rest.mean, rest.mean)
        cross = cross - np.outer(rest.mean, rest.offset)
    matrix = damped(second, damping)
    if support is None:
        change: Doubles = np.asarray(np.linalg.solve(matrix, cross), np.float64)
    else:
        change = on_support(matrix, cross, support)
    gain = float(2.0 * (change * cross).sum() - (change * (second @ change)).sum())
    if not bias:
        return Change(change, None, gain)
    return Change(change, rest.offset - rest.mean @ change, gain + bias_change(rest).gain)


def on_support(
    matrix: Doubles, right: Doubles, support: NDArray[np.bool_], steps: int = STEPS, accuracy: float = ACCURACY
) -> Doubles:
    """For each column n the least ``x^T A x / 2 - b^T x`` over x that are 0 outside the column's support.

    Conjugate gradients on all columns at once, preconditioned by the diagonal (Golub & Van Loan, 2013, section 11.5).
    Every step lowers every column, so that stopping early is safe. A step costs ``2 K² N`` operations; to solve each
    column by itself would cost ``N K_s³ / 3`` for a support of K_s rows.

    Args:
        matrix: A, float64 [K, K], positive definite.
        right: b, float64 [K, N].
        support: bool [K, N].
        steps: At most.
        accuracy: See `ACCURACY`; of every column.
    """
    inverse = 1.0 / np.diagonal(matrix)[:, None]
    solution = np.zeros_like(right)
    rest = np.where(support, right, 0.0)
    direction = rest * inverse
    slope = (rest * direction).sum(0)
    enough = accuracy**2 * slope
    for _ in range(steps):
        if (slope <= enough).all():
            break
        image = np.where(support, matrix @ direction, 0.0)
        curvature = (direction * image).sum(0)
        step = np.divide(slope, curvature, out=np.zeros_like(slope), where=curvature > 0.0)
        solution += step * direction
        rest -= step * image
        conditioned = rest * inverse
        before, slope = slope, (rest * conditioned).sum(0)
        direction = conditioned + np.divide(slope, before, out=np.zeros_like(slope), where=before > 0.0) * direction
    return solution
