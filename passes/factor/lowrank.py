"""The best product of two thin matrices in the place of one, for the inputs that it meets. Plain arrays.

For inputs of second moment ``H = E[x xᵀ]`` the squared error of ``x (W - A B)`` is ``trace(Eᵀ H E)``, ``E = W - A B``.
With ``H = Cᵀ C`` that is the squared Frobenius norm of ``C W - C A B``, so that cutting the singular value
decomposition of ``C W`` is optimal, and the error is the sum of the squared singular values left out (Eckart & Young,
1936; for products of language models: Wang, Zheng, Wan & Zhang, "SVD-LLM", 2024, arXiv:2403.07378). Its right singular
vectors Q are the principal components of the outputs, and the optimum is ``W Q Qᵀ`` (Yu & Wu, "Compressing
Transformers: Features Are Low-Rank, but Weights Are Not!", 2023): H is never inverted, so that it may be singular.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

DAMPING = 1e-4
"""Part of the mean of H's diagonal that is added to it: what inputs never showed is kept where that costs nothing."""


@dataclass(frozen=True)
class Factors:
    """``W ≈ first @ second``.

    Attributes:
        first: float32 [K, r]. Its products with the inputs are principal components of the outputs, turned at random:
            all channels have about the same energy, as a quantizer of them wants it, and are correlated, without which
            GPTQ could not make up for errors in ``second``.
        second: float32 [r, N], orthonormal rows.
    """

    first: Floats
    second: Floats


def energies(weight: Floats | Doubles, second: Doubles | None) -> Doubles:
    """The squared singular values of ``C W``: what each rank takes of ``E||x W||²``, largest first.

    Args:
        weight: W [K, N], finite.
        second: ``H = Cᵀ C``, float64 [K, K], as it is to be used; None: the identity, the plain decomposition.

    Returns:
        float64 [min(K, N)]; their sum is ``trace(Wᵀ H W)``.

    Raises:
        numpy.linalg.LinAlgError: H is not finite.
    """
    values = np.linalg.eigvalsh(_gram(np.asarray(weight, np.float64), _half(weight, second), second))
    largest_first: Doubles = np.maximum(values[::-1], 0.0)
    return largest_first


def factorize(weight: Floats | Doubles, second: Doubles | None, rank: int) -> Factors:
    """The best product of two matrices of that rank.

    Args:
        weight: W [K, N], finite.
        second: As for `energies`.
        rank: r, 1 to min(K, N).

    Raises:
        ValueError: The rank is none of these.
        numpy.linalg.LinAlgError: H is not finite.
    """
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(f"rank is {rank}, not 1 to {min(weight.shape)}")
    wide, half = np.asarray(weight, np.float64), _half(weight, second)
    values, vectors = np.linalg.eigh(_gram(wide, half, second))
    values, vectors = values[::-1][:rank], vectors[:, ::-1][:, :rank]
    # The singular vectors of zero singular values may be anything; their part of the product is zero.
    floor = max(float(values[0]), np.finfo(np.float64).tiny) * max(wide.shape) * np.finfo(np.float64).eps
    squares = np.maximum(values, floor)
    outputs = vectors if half is None else wide.T @ (half.T @ vectors) / np.sqrt(squares)
    turned = outputs @ _rotation(rank)
    return Factors((wide @ turned).astype(np.float32), np.ascontiguousarray(turned.T, dtype=np.float32))


def _rotation(size: int) -> Doubles:
    """A random rotation, the same for the same size."""
    rotation: Doubles = np.linalg.qr(np.random.default_rng(size).normal(size=(size, size)))[0]
    return rotation


def root(second: Doubles) -> Doubles:
    """``C`` with ``Cᵀ C = H``, float64 [K, K]: by eigenvalues, of which those below zero by rounding count as zero.

    Raises:
        numpy.linalg.LinAlgError: H is not finite.
    """
    values, vectors = np.linalg.eigh(second)
    half: Doubles = np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T
    return half


def _half(weight: Floats | Doubles, second: Doubles | None) -> Doubles | None:
    """``C`` for a weight of more columns than rows; None for another, of which H itself does."""
    rows, columns = weight.shape
    if columns <= rows:
        return None
    return np.eye(rows) if second is None else root(second)


def _gram(weight: Doubles, half: Doubles | None, second: Doubles | None) -> Doubles:
    """``Mᵀ M`` of ``M = C W``; with C itself ``M Mᵀ``, which is then the smaller."""
    if half is not None:
        return half @ (weight @ weight.T) @ half.T
    gram = weight.T @ (weight if second is None else second @ weight)
    symmetric: Doubles = (gram + gram.T) / 2
    return symmetric
