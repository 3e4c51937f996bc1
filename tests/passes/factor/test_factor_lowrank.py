"""Low-rank factors against textbook float64: Eckart–Young's equality, optimality, singular second moments."""

from __future__ import annotations

import numpy as np
import pytest

from passes.factor.lowrank import DAMPING, energies, factorize, root
from passes.second_order import damped

RNG = np.random.default_rng(3)
EPS32, EPS64 = float(np.finfo(np.float32).eps), float(np.finfo(np.float64).eps)
SHAPES = [(40, 24), (24, 40), (32, 32)]


def second_moment(channels: int, rows: int = 400) -> np.ndarray:
    """Of correlated inputs, some channels loud, with a mean."""
    x = RNG.normal(size=(rows, channels)) @ RNG.normal(size=(channels, channels)) * np.geomspace(0.1, 5, channels) + 0.3
    return x.T @ x / rows


def oracle(weight: np.ndarray, second: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """SVD-LLM as printed: ``S = cholesky(H)``, the decomposition of ``Sᵀ W`` cut, and solved back; all σ² with it."""
    lower = np.linalg.cholesky(second)
    u, sigma, vt = np.linalg.svd(lower.T @ weight, full_matrices=False)
    return np.linalg.solve(lower.T, (u[:, :rank] * sigma[:rank]) @ vt[:rank]), sigma**2


def damage(error: np.ndarray, second: np.ndarray) -> float:
    return float(np.einsum("kn,kl,ln->", error, second, error))


def product(weight: np.ndarray, second: np.ndarray | None, rank: int) -> np.ndarray:
    made = factorize(weight, second, rank)
    assert made.first.dtype == made.second.dtype == np.float32
    assert (made.first.shape, made.second.shape) == ((len(weight), rank), (rank, weight.shape[1]))
    return made.first.astype(np.float64) @ made.second


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("rank", [1, 7, 23])
def test_it_is_the_textbook_and_its_damage_is_the_sum_of_what_was_cut(shape, rank):
    weight, second = RNG.normal(size=shape), damped(second_moment(shape[0]), DAMPING)
    expected, squares = oracle(weight, second, rank)
    found = energies(weight, second)
    # Eigenvalues of a Gram matrix are off by its norm times the roundoff, and a few from the products that made it.
    np.testing.assert_allclose(found, squares, rtol=0, atol=100 * EPS64 * squares[0] * max(shape))
    made = product(weight, second, rank)
    # The factors are rounded to float32: E moves by at most 2 eps |A| |B|, the damage near its minimum by the square.
    reach = 2 * EPS32 * np.sqrt(np.trace(second)) * np.linalg.norm(weight) * np.sqrt(rank)
    least = squares[rank:].sum()
    assert damage(weight - made, second) == pytest.approx(
        least, abs=reach**2 + 2 * reach * EPS32 + 1e-10 * squares.sum()
    )
    assert damage(made - expected, second) <= reach**2 + 1e-10 * squares.sum()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_nothing_else_of_the_rank_does_less_damage(shape):
    weight, second, rank = RNG.normal(size=shape), damped(second_moment(shape[0]), DAMPING), 6
    made = factorize(weight, second, rank)
    least = damage(weight - made.first.astype(np.float64) @ made.second, second)
    for _ in range(20):
        first = made.first * (1 + 0.01 * RNG.normal(size=made.first.shape))
        # The best second factor for this first one: least squares.
        normal = first.T @ second @ first
        best = np.linalg.solve(normal, first.T @ second @ weight)
        assert damage(weight - first @ best, second) >= least * (1 - 1e-6)
    plain = product(weight, None, rank)
    assert damage(weight - plain, second) > least


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_a_second_moment_it_is_the_plain_decomposition(shape):
    weight = RNG.normal(size=shape)
    sigma = np.linalg.svd(weight, compute_uv=False)
    np.testing.assert_allclose(energies(weight, None), sigma**2, rtol=0, atol=100 * EPS64 * sigma[0] ** 2 * max(shape))
    made = product(weight, None, 9)
    assert np.linalg.norm(weight - made) == pytest.approx(np.linalg.norm(sigma[9:]), rel=1e-6)


def test_the_channels_between_the_factors_are_alike_and_the_second_is_orthonormal():
    weight, second = RNG.normal(size=(40, 24)), damped(second_moment(40), DAMPING)
    made = factorize(weight, second, 10)
    np.testing.assert_allclose(made.second @ made.second.T, np.eye(10), rtol=0, atol=24 * EPS32)
    between = made.first.T.astype(np.float64) @ second @ made.first
    squares = energies(weight, second)[:10]
    np.testing.assert_allclose(np.linalg.eigvalsh(between)[::-1], squares, rtol=0, atol=10 * EPS32 * squares.sum())
    # Turned at random no channel has it all: the largest part of ten is far from the first of the squares.
    assert np.diagonal(between).max() < 0.6 * squares[0]
    np.testing.assert_array_equal(made.first, factorize(weight, second, 10).first)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inputs_that_fill_few_directions(shape):
    """Fewer rows than channels, and a dead channel: H is singular. What was seen is kept exactly at its rank."""
    rows = RNG.normal(size=(5, shape[0]))
    rows[:, 3] = 0.0
    weight = RNG.normal(size=shape)
    second = rows.T @ rows / 5
    for made in (product(weight, second, 5), product(weight, damped(second, DAMPING), 5)):
        assert np.isfinite(made).all()
    exact = rows @ weight
    np.testing.assert_allclose(rows @ product(weight, second, 5), exact, rtol=0, atol=1e-5 * np.abs(exact).max())
    # Ranks that nothing fills are no harm.
    assert np.isfinite(product(weight, second, 12)).all()


def test_the_root_of_a_singular_matrix():
    rows = RNG.normal(size=(4, 9))
    second = rows.T @ rows
    half = root(second)
    np.testing.assert_allclose(half.T @ half, second, rtol=0, atol=1e-12 * np.abs(second).max())


def test_a_weight_of_zeros_stays_one():
    assert not product(np.zeros((8, 6)), damped(second_moment(8), DAMPING), 3).any()


@pytest.mark.parametrize("rank", [0, 25])
def test_ranks_that_are_none(rank):
    with pytest.raises(ValueError, match=rf"^rank is {rank}, not 1 to 24$"):
        factorize(RNG.normal(size=(40, 24)), None, rank)
