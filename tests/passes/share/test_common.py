"""One matrix in the place of several, against least squares on the data in float64."""

from __future__ import annotations

import numpy as np
import pytest

from passes.share.common import damage, distance, shared

K, N, ROWS = 12, 5, 200
RNG = np.random.default_rng(2)
INPUTS = [RNG.normal(size=(ROWS, K)) @ RNG.normal(size=(K, K)) for _ in range(3)]
WEIGHTS = [RNG.normal(size=(K, N)).astype(np.float32) for _ in range(3)]
SECONDS = [x.T @ x / ROWS for x in INPUTS]


def test_damage_is_what_the_products_move_by() -> None:
    x, weight, other = INPUTS[0], WEIGHTS[0].astype(np.float64), WEIGHTS[1].astype(np.float64)
    exact = np.linalg.norm(x @ (weight - other)) / np.linalg.norm(x @ weight)
    assert damage(WEIGHTS[0], WEIGHTS[1], SECONDS[0]) == pytest.approx(exact, rel=1e-9)
    exact = np.linalg.norm(weight - other) / np.linalg.norm(weight)
    assert damage(WEIGHTS[0], WEIGHTS[1], None) == pytest.approx(exact, rel=1e-9)
    assert damage(WEIGHTS[0], WEIGHTS[0], SECONDS[0]) == 0.0
    assert damage(0 * WEIGHTS[0], WEIGHTS[0], None) == np.inf
    assert damage(0 * WEIGHTS[0], 0 * WEIGHTS[0], None) == 0.0


def test_the_shared_matrix_is_that_of_ridge_regression_to_the_mean() -> None:
    mean = np.mean(np.array(WEIGHTS, np.float64), axis=0)
    pull = 0.01 * np.trace(sum(SECONDS)) / K
    rows = np.concatenate([*INPUTS, np.sqrt(ROWS * pull) * np.eye(K)])
    wanted = [x @ (weight - mean) for x, weight in zip(INPUTS, WEIGHTS, strict=True)]
    exact = mean + np.linalg.lstsq(rows, np.concatenate([*wanted, np.zeros((K, N))]), rcond=None)[0]
    found = shared(WEIGHTS, SECONDS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, exact, rtol=2.0**-23, atol=1e-9)
    total = [sum(damage(w, one, h) ** 2 * np.vdot(w, h @ w) for w, h in zip(WEIGHTS, SECONDS, strict=True)) for one in
             (found, mean, *WEIGHTS)]  # fmt: skip
    assert total[0] == min(total)


def test_without_moments_it_is_the_mean() -> None:
    np.testing.assert_allclose(
        shared(WEIGHTS, [None] * 3), np.mean(np.array(WEIGHTS, np.float64), axis=0), rtol=2.0**-23
    )


def test_distance_takes_each_channel_by_itself() -> None:
    size = np.diagonal(SECONDS[0])
    exact = damage(WEIGHTS[0], WEIGHTS[1], np.diag(size))
    assert distance(WEIGHTS[0], WEIGHTS[1], (size,)) == pytest.approx(exact, rel=1e-6)
    assert distance(WEIGHTS[0], WEIGHTS[1], (None,)) == damage(WEIGHTS[0], WEIGHTS[1], None)
    both = distance(WEIGHTS[0], WEIGHTS[1], (size, None))
    assert both == min(distance(WEIGHTS[0], WEIGHTS[1], (one,)) for one in (size, None))
