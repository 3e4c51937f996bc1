"""Least squares from moments against least squares from the data, in float64."""

from __future__ import annotations

import numpy as np
import pytest

from passes.repair.regression import Rest, affine_change, bias_change, on_support

ROWS, K, N = 400, 24, 7
RNG = np.random.default_rng(3)
X = RNG.normal(size=(ROWS, K)) @ RNG.normal(size=(K, K)) + RNG.normal(size=K)
R = X @ RNG.normal(size=(K, N)) * 0.3 + RNG.normal(size=(ROWS, N)) + RNG.normal(size=N)


def rest() -> Rest:
    z = np.concatenate([X, R], axis=1)
    return Rest.of(z.T @ z / ROWS, z.mean(0), K)


def error(weight: np.ndarray, bias: np.ndarray | float) -> float:
    return float(np.square(R - X @ weight - bias).sum(1).mean())


def ridge(x: np.ndarray, r: np.ndarray, damping: float) -> np.ndarray:
    """The least of ``mean ||r - x d||² + damping mean(x²) ||d||²``, by least squares on rows put below the data."""
    pull = np.sqrt(len(x) * damping * np.square(x).sum(1).mean() / x.shape[1])
    below = np.concatenate([x, pull * np.eye(x.shape[1])])
    return np.linalg.lstsq(below, np.concatenate([r, np.zeros((x.shape[1], r.shape[1]))]), rcond=None)[0]


@pytest.mark.parametrize("damping", [1e-9, 0.01, 1.0])
def test_the_weight_alone(damping: float) -> None:
    found = affine_change(rest(), damping, bias=False)
    assert found.bias is None
    assert found.weight is not None
    np.testing.assert_allclose(found.weight, ridge(X, R, damping), rtol=1e-6, atol=1e-9)
    assert found.gain == pytest.approx(error(np.zeros((K, N)), 0.0) - error(found.weight, 0.0), rel=1e-9)


@pytest.mark.parametrize("damping", [1e-9, 0.01, 1.0])
def test_the_weight_and_the_bias(damping: float) -> None:
    found = affine_change(rest(), damping, bias=True)
    assert found.weight is not None
    assert found.bias is not None
    x, r = X - X.mean(0), R - R.mean(0)
    np.testing.assert_allclose(found.weight, ridge(x, r, damping), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.bias, R.mean(0) - X.mean(0) @ found.weight, rtol=1e-9)
    assert found.gain == pytest.approx(error(np.zeros((K, N)), 0.0) - error(found.weight, found.bias), rel=1e-9)


def test_the_bias_alone() -> None:
    found = bias_change(rest())
    assert found.weight is None
    np.testing.assert_allclose(found.bias, R.mean(0))
    assert found.gain == pytest.approx(error(np.zeros((K, N)), 0.0) - error(np.zeros((K, N)), R.mean(0)), rel=1e-9)


def test_each_column_on_its_support_is_solved_as_by_itself() -> None:
    support = RNG.random((K, N)) < 0.5
    support[:, 2] = False
    matrix = rest().second + 0.01 * np.trace(rest().second) / K * np.eye(K)
    found = on_support(matrix, rest().cross, support, accuracy=1e-8)
    assert (found[~support] == 0.0).all()
    for column in range(N):
        rows = np.flatnonzero(support[:, column])
        exact = np.linalg.solve(matrix[np.ix_(rows, rows)], rest().cross[rows, column])
        # The last rest is 1e-8 of the first, and the condition number about 10,000: its root.
        np.testing.assert_allclose(found[rows, column], exact, rtol=0, atol=1e-6 * np.abs(exact).max(initial=0))


def test_zeros_stay_and_next_to_nothing_of_the_gain_is_lost() -> None:
    support = RNG.random((K, N)) < 0.5
    found = affine_change(rest(), 0.01, bias=False, support=support)
    assert found.weight is not None
    assert (found.weight[~support] == 0.0).all()
    matrix = rest().second + 0.01 * np.trace(rest().second) / K * np.eye(K)
    exact = on_support(matrix, rest().cross, support, accuracy=1e-10)
    best = error(np.zeros((K, N)), 0.0) - error(exact, 0.0)
    assert found.gain == pytest.approx(error(np.zeros((K, N)), 0.0) - error(found.weight, 0.0), rel=1e-9)
    assert found.gain == pytest.approx(best, rel=1e-4)


def test_stopping_early_loses_no_column() -> None:
    matrix = rest().second + 1e-3 * np.eye(K)
    right, every = rest().cross, np.ones((K, N), bool)
    values = []
    for steps in range(6):
        x = on_support(matrix, right, every, steps)
        values.append((x * (matrix @ x)).sum(0) / 2 - (x * right).sum(0))
    assert (np.diff(values, axis=0) <= 1e-12 * np.abs(values[-1])).all()


def test_a_map_that_gets_nothing_wrong_is_left_as_it_is() -> None:
    z = np.concatenate([X, 0.0 * R], axis=1)
    found = affine_change(Rest.of(z.T @ z / ROWS, z.mean(0), K), 0.01, bias=True, support=np.ones((K, N), bool))
    assert found.gain == 0.0
    assert found.weight is not None
    assert (found.weight == 0.0).all()


def test_an_input_that_is_always_the_same_leaves_the_weight_alone() -> None:
    z = np.concatenate([np.ones((ROWS, K)), R], axis=1)
    found = affine_change(Rest.of(z.T @ z / ROWS, z.mean(0), K), 0.01, bias=True)
    assert found.weight is not None
    assert found.bias is not None
    np.testing.assert_allclose(found.weight, 0.0, atol=1e-9)
    np.testing.assert_allclose(found.bias, R.mean(0), rtol=1e-6)
