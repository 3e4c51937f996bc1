"""Least squares for what an operator of constant weight makes of what it sees. Plain arrays.

A convolution is a product too: with patches ``x [C * taps]``, the inputs under the kernel, it makes ``W x + b``. The
weights of any set (of low rank, on fewer channels) that bring this nearest to wanted outputs ``y`` have the least
``tr((W - B) H (W - B)^T)``, with the covariance ``H`` of ``x`` and the unrestricted regression ``B = Cov(y, x) H^-1``;
the bias is then ``E[y] - W E[x]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from passes.affine import Floats
from passes.statistics import Moments

Doubles = NDArray[np.float64]

DAMPING = 1e-3
"""Part of the mean of the covariance's diagonal that is added to it: a pull towards the weight that is there."""


@dataclass(frozen=True)
class Regression:
    """What to fit: see the module.

    Attributes:
        best: ``B``, float64 [N, K].
        moment: ``H``, float64 [K, K], symmetric, damped and so positive definite.
        inputs: ``E[x]``, float64 [K].
        outputs: ``E[y]``, float64 [N].
        spread: Variance of ``y``, all N together: what errors are parts of.
        rows: How many the moments are of; 0 where there are none.
    """

    best: Doubles
    moment: Doubles
    inputs: Doubles
    outputs: Doubles
    spread: float
    rows: int

    def error(self, weight: Doubles) -> float:
        """``tr((W - B) H (W - B)^T)`` for ``W [N, K]`` as a part of `spread`; 0 is as good as no restriction."""
        off = weight - self.best
        return float(np.vdot(off @ self.moment, off)) / self.spread

    def bias(self, weight: Doubles) -> Floats:
        """``b`` float32 [N], best for ``W [N, K]``."""
        return np.asarray(self.outputs - weight @ self.inputs, np.float32)


def of_itself(weight: Floats, bias: Floats | None, moments: Moments | None) -> Regression:
    """What the operator makes now is wanted.

    Args:
        weight: ``W``, float32 [N, K].
        bias: ``b``, float32 [N].
        moments: Of ``x``; None: as if its elements were of variance 1, mean 0 and independent.
    """
    best = weight.astype(np.float64)
    constant = np.zeros(len(best)) if bias is None else bias.astype(np.float64)
    if moments is None:
        size = best.shape[1]
        return Regression(best, np.eye(size), np.zeros(size), constant, _positive(float(np.vdot(best, best))), 0)
    covariance = _covariance(moments)
    spread = float(np.vdot(best @ covariance, best))
    outputs = best @ moments.mean + constant
    damped = covariance + _damping(covariance) * np.eye(len(covariance))
    return Regression(best, damped, moments.mean, outputs, _positive(spread), moments.rows)


def of_another(weight: Floats, moments: Moments) -> Regression:
    """What something else made of the same data is wanted: the operator before its inputs were changed.

    Args:
        weight: ``W``, float32 [N, K], which directions without data keep.
        moments: Of ``x`` and ``y`` side by side, K + N channels.
    """
    size = weight.shape[1]
    covariance = _covariance(moments)
    own = covariance[:size, :size]
    damping = _damping(own)
    crossed = covariance[size:, :size] + damping * weight.astype(np.float64)
    damped = own + damping * np.eye(size)
    best = solve(damped, crossed.T).T
    spread = float(np.trace(covariance[size:, size:]))
    return Regression(best, damped, moments.mean[:size], moments.mean[size:], _positive(spread), moments.rows)


def solve(matrix: NDArray[np.floating], right: NDArray[np.floating]) -> Doubles:
    """``matrix^-1 right``, float64; of stacks of matrices too."""
    result: Doubles = np.asarray(np.linalg.solve(matrix, right), np.float64)
    return result


def _covariance(moments: Moments) -> Doubles:
    return moments.second - np.outer(moments.mean, moments.mean)


def _damping(covariance: Doubles) -> float:
    added = DAMPING * float(np.trace(covariance)) / len(covariance)
    return added if added > 0 else 1.0


def _positive(number: float) -> float:
    return number if number > 0 else 1.0
