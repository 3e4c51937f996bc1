"""Convolution kernels as products of smaller ones, with the least error of what they make of the data. Plain arrays.

A kernel is ``W [N, C, taps]``, seen as ``[N, A, T]``: the channel is projected where A = C and T are the taps
(Tucker-2), the channel and the tap along height where T are the taps along width (spatial). In both
``W[n, a, t] ~ sum_r core[n, r, t] first[r, a]``. The starting point is the decomposition by singular values, whitened
by the part of H that belongs to A; then one side after the other is solved for with all of H, which only lowers the
error (alternating least squares; De Lathauwer, De Moor & Vandewalle, 2000, for the identity as H).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .regression import Doubles, Regression, solve

SOLVER_STEPS = 12
"""Of conjugate gradients, for one side."""
_RIDGE = 1e-9
"""Added to Gram matrices that are only preconditioners, in parts of their mean diagonal."""


def contract(subscripts: str, *arrays: NDArray[np.floating]) -> Doubles:
    """Einstein's sum, in the order of least work."""
    result: Doubles = np.einsum(subscripts, *arrays, optimize=True)
    return result


@dataclass(frozen=True)
class Projected:
    """``W[n, a, t] ~ sum_{m, r} last[n, m] core[m, r, t] first[r, a]``.

    Attributes:
        first: float64 [R, A].
        core: float64 [M, R, T].
        last: float64 [N, M] with orthonormal columns.
    """

    first: Doubles
    core: Doubles
    last: Doubles

    @property
    def weight(self) -> Doubles:
        """The product, float64 [N, A * T]."""
        inner = contract("mrt,ra->mat", self.core, self.first)
        return self.last @ inner.reshape(len(inner), -1)


def leading(regression: Regression, taps: int) -> Doubles:
    """Projections of A in the order of what they carry of the outputs, float64 [A, A]: the first R rows are for rank R.

    With S the root of the mean over the taps of H's diagonal blocks, the left singular vectors Q of ``S W`` make
    ``Q^T S^-1``, whose outputs are uncorrelated and of variance 1.
    """
    outputs, size = regression.best.shape
    sides = size // taps
    moment = contract("atbt->ab", regression.moment.reshape(sides, taps, sides, taps)) / taps
    root, inverse = roots(moment)
    kernel = regression.best.reshape(outputs, sides, taps).transpose(1, 0, 2).reshape(sides, -1)
    vectors = np.linalg.svd(root @ kernel, full_matrices=kernel.shape[1] < sides)[0]
    first: Doubles = vectors.T @ inverse
    return first


def project(regression: Regression, first: Doubles, taps: int, rank: int | None = None) -> Projected:
    """The best rest for a projection: a regression of the outputs, of reduced rank where one is given (Izenman, 1975).

    Args:
        regression: Of ``[N, A * T]``.
        first: ``[R, A]`` of full rank.
        taps: T.
        rank: M; None: N, and ``last`` is the identity.
    """
    sides = first.shape[1]
    outputs = len(regression.best)
    crossed = (regression.best @ regression.moment).reshape(outputs, sides, taps)
    right = contract("nat,ra->nrt", crossed, first).reshape(outputs, -1)
    half = np.tensordot(first, regression.moment.reshape(sides, taps, sides, taps), (1, 0))
    gram = np.tensordot(half, first, (2, 1)).transpose(0, 1, 3, 2).reshape(right.shape[1], -1)
    lower = np.linalg.cholesky(gram)
    whitened = solve(lower, right.T).T
    last = np.eye(outputs) if rank is None else np.linalg.svd(whitened, full_matrices=False)[0][:, :rank]
    core = solve(lower.T, whitened.T).T
    return Projected(first, (last.T @ core).reshape(last.shape[1], len(first), taps), last)


def fit_projected(regression: Regression, taps: int, ranks: tuple[int, int | None], sweeps: int) -> Projected:
    """`leading`, `project` and alternating least squares.

    Args:
        regression: Of ``[N, A * T]``.
        taps: T.
        ranks: R, and M or None.
        sweeps: How often both sides are solved for again.
    """
    rank, outputs = ranks
    found = project(regression, leading(regression, taps)[:rank], taps, outputs)
    for _ in range(sweeps):
        found = project(regression, _better_first(regression, found), taps, outputs)
    return found


@dataclass(frozen=True)
class Separable:
    """``W[n, c, t] ~ sum_m pointwise[n, c, m] depthwise[c, m, t]``.

    Attributes:
        depthwise: float64 [C, M, T].
        pointwise: float64 [N, C, M].
    """

    depthwise: Doubles
    pointwise: Doubles

    @property
    def weight(self) -> Doubles:
        """The product, float64 [N, C * T]."""
        kernel = contract("ncm,cmt->nct", self.pointwise, self.depthwise)
        return kernel.reshape(len(kernel), -1)


def filters(regression: Regression, taps: int) -> Doubles:
    """Depthwise filters of each channel in the order of what they carry, float64 [C, min(N, T), T].

    Each channel for itself: right singular vectors of its ``W_c H_cc^1/2``, back through the inverse root.
    """
    outputs, size = regression.best.shape
    channels = size // taps
    moment = contract("ctcs->cts", regression.moment.reshape(channels, taps, channels, taps))
    kernel = regression.best.reshape(outputs, channels, taps).transpose(1, 0, 2)
    found = []
    for block, own in zip(kernel, moment, strict=True):
        root, inverse = roots(own)
        found.append(np.linalg.svd(block @ root, full_matrices=False)[2] @ inverse)
    return np.stack(found)


def separate(regression: Regression, depthwise: Doubles) -> Separable:
    """The best pointwise convolution behind depthwise filters ``[C, M, T]``, each channel's linearly independent."""
    channels, count, taps = depthwise.shape
    outputs = len(regression.best)
    crossed = (regression.best @ regression.moment).reshape(outputs, channels, taps)
    right = contract("nct,cmt->ncm", crossed, depthwise).reshape(outputs, -1)
    half = contract("cmt,cts->cms", depthwise, regression.moment.reshape(channels, taps, -1))
    half = half.reshape(channels * count, channels, taps)
    gram = contract("pct,cmt->pcm", half, depthwise).reshape(channels * count, -1)
    pointwise = solve(gram, right.T).T
    return Separable(depthwise, pointwise.reshape(outputs, channels, count))


def fit_separable(regression: Regression, taps: int, count: int, sweeps: int) -> Separable:
    """`filters`, `separate` and alternating least squares.

    Args:
        regression: Of ``[N, C * T]``.
        taps: T.
        count: M, filters of each channel; at most min(N, T).
        sweeps: How often both sides are solved for again.
    """
    found = separate(regression, filters(regression, taps)[:, :count])
    for _ in range(sweeps):
        found = separate(regression, _better_filters(regression, found))
    return found


def roots(moment: Doubles) -> tuple[Doubles, Doubles]:
    """The symmetric square root of a positive definite matrix, and its inverse."""
    values, vectors = np.linalg.eigh(moment)
    scale = np.sqrt(np.maximum(values, np.finfo(np.float64).eps * values[-1]))
    return (vectors * scale) @ vectors.T, (vectors / scale) @ vectors.T


def _better_first(regression: Regression, found: Projected) -> Doubles:
    """The projection with which core and last make the least error."""
    sides, (count, _, taps) = found.first.shape[1], found.core.shape
    core, moment = found.core, regression.moment
    side = contract("atbt->ab", moment.reshape(sides, taps, sides, taps)) / taps
    inner = np.linalg.inv(_ridged(contract("mrt,mst->rs", core, core)))
    inverse = np.linalg.inv(side)

    def kernel(first: Doubles) -> Doubles:
        return contract("mrt,ra->mat", core, first).reshape(count, -1)

    def back(weight: Doubles) -> Doubles:
        shaped = (weight @ moment).reshape(count, sides, taps)
        return contract("mrt,mat->ra", core, shaped)

    residual = back(found.last.T @ regression.best - kernel(found.first))
    return _solved(found.first, residual, lambda step: back(kernel(step)), lambda slope: inner @ slope @ inverse)


def _better_filters(regression: Regression, found: Separable) -> Doubles:
    """The filters with which the pointwise convolution makes the least error."""
    channels, _, taps = found.depthwise.shape
    outputs, moment, pointwise = len(regression.best), regression.moment, found.pointwise
    own = contract("ctcs->cts", moment.reshape(channels, taps, channels, taps))
    inner = contract("ncm,nck->cmk", pointwise, pointwise)
    inner = np.stack([np.linalg.inv(_ridged(block)) for block in inner])
    inverse = np.linalg.inv(own)

    def back(weight: Doubles) -> Doubles:
        shaped = (weight @ moment).reshape(outputs, channels, taps)
        return contract("ncm,nct->cmt", pointwise, shaped)

    def curved(step: Doubles) -> Doubles:
        return back(Separable(step, pointwise).weight)

    residual = back(regression.best - found.weight)
    return _solved(found.depthwise, residual, curved, lambda slope: inner @ slope @ inverse)


def _solved(
    start: Doubles,
    residual: Doubles,
    curved: Callable[[Doubles], Doubles],
    precondition: Callable[[Doubles], Doubles],
) -> Doubles:
    """`SOLVER_STEPS` of preconditioned conjugate gradients (Hestenes & Stiefel, 1952), each of which lowers the error.

    Args:
        start: Where to begin.
        residual: Half the slope downwards there.
        curved: Multiplies by half the Hessian.
        precondition: Multiplies by about its inverse, symmetric and positive definite.
    """
    found = start.copy()
    direction = shaped = precondition(residual)
    size = first_size = float(np.vdot(residual, shaped))
    for _ in range(SOLVER_STEPS):
        if not size > np.finfo(np.float64).eps ** 2 * first_size or size <= 0:
            break
        bent = curved(direction)
        curvature = float(np.vdot(direction, bent))
        if curvature <= 0:
            break
        found += size / curvature * direction
        residual = residual - size / curvature * bent
        shaped = precondition(residual)
        size, before = float(np.vdot(residual, shaped)), size
        direction = shaped + size / before * direction
    return found


def _ridged(gram: Doubles) -> Doubles:
    added = _RIDGE * float(np.trace(gram)) / len(gram)
    return gram + (added if added > 0 else 1.0) * np.eye(len(gram))
