"""Decompositions of kernels: against Eckart & Young, exact recovery, monotone sweeps, regressions against an oracle."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from builders import random
from convolution_graphs import moments_of

from passes.factor.convolution_forms import MEMORY, DepthwiseSeparable, Form, Geometry, Spatial, Tucker, form_of
from passes.factor.kernels import filters, fit_projected, fit_separable, leading, project, separate
from passes.factor.regression import DAMPING, Regression, of_another, of_itself

OUTPUTS, CHANNELS, SIDE = 12, 10, 3
TAPS = SIDE * SIDE
KERNEL = random(1, OUTPUTS, CHANNELS * TAPS)
ROUNDING = 1e-10
"""Of float64 decompositions of some hundred numbers whose conditions are below 10^4: 10^4 x 10^2 x 2^-53."""
GEOMETRY = Geometry((OUTPUTS, CHANNELS, SIDE, SIDE), (1, 1), (1, 1, 1, 1), (1, 1), (8, 8), (8, 8))
FORMS: dict[str, Form] = {"spatial": Spatial(1), "tucker": Tucker(1), "separable": DepthwiseSeparable()}
RANKS = {"spatial": (9,), "tucker": (5, 6), "separable": (3,)}


def correlated(seed: int, rows: int = 400) -> np.ndarray:
    """Patches whose elements depend on each other and have means and sizes of their own."""
    mixing = random(seed, CHANNELS * TAPS, CHANNELS * TAPS) * np.linspace(0.1, 1, CHANNELS * TAPS, dtype=np.float32)
    return random(seed + 1, rows, CHANNELS * TAPS) @ mixing + random(seed + 2, CHANNELS * TAPS)


def tail(matrix: np.ndarray, rank: int) -> float:
    """Squared error of the best approximation of a rank (Eckart & Young, 1936), of the squared norm."""
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False) ** 2
    return float(values[rank:].sum() / values.sum())


def weighted(method: str, ranks: tuple[int, ...], regression: Regression, sweeps: int) -> float:
    return regression.error(FORMS[method].chain(regression, GEOMETRY, ranks, sweeps).weight)


def test_spatial_without_data_is_the_singular_value_decomposition():
    kernel = KERNEL.reshape(OUTPUTS, CHANNELS, SIDE, SIDE)
    matrix = kernel.transpose(1, 2, 0, 3).reshape(CHANNELS * SIDE, OUTPUTS * SIDE)
    for rank in (1, 7, 20):
        error = weighted("spatial", (rank,), of_itself(KERNEL, None, None), 0)
        assert error == pytest.approx(tail(matrix, rank), abs=ROUNDING)


def test_one_mode_of_tucker_without_data_is_the_singular_value_decomposition():
    regression = of_itself(KERNEL, None, None)
    matrix = KERNEL.reshape(OUTPUTS, CHANNELS, TAPS).transpose(1, 0, 2).reshape(CHANNELS, -1)
    found = project(regression, leading(regression, TAPS)[:4], TAPS)
    assert regression.error(found.weight) == pytest.approx(tail(matrix, 4), abs=ROUNDING)
    # With all channels the other mode is one too.
    found = project(regression, leading(regression, TAPS), TAPS, 5)
    assert regression.error(found.weight) == pytest.approx(tail(KERNEL, 5), abs=ROUNDING)


def test_separable_without_data_is_one_decomposition_for_each_channel():
    regression = of_itself(KERNEL, None, None)
    kernel = KERNEL.reshape(OUTPUTS, CHANNELS, TAPS).astype(np.float64)
    for count in (1, 4):
        lost = sum(
            tail(kernel[:, channel], count) * np.sum(kernel[:, channel] ** 2) for channel in range(CHANNELS)
        ) / np.sum(kernel**2)  # fmt: skip
        found = fit_separable(regression, TAPS, count, 2)
        assert regression.error(found.weight) == pytest.approx(lost, abs=ROUNDING)


def test_all_ranks_are_exact():
    regression = of_itself(KERNEL, None, moments_of(correlated(2)))
    assert regression.error(fit_projected(regression, TAPS, (CHANNELS, OUTPUTS), 0).weight) < ROUNDING
    assert regression.error(separate(regression, filters(regression, TAPS)).weight) < ROUNDING


@pytest.mark.parametrize("method", FORMS)
@pytest.mark.parametrize("data", [False, True])
def test_a_kernel_of_low_rank_comes_back(method, data):
    plain = of_itself(KERNEL, None, None)
    kernel = FORMS[method].chain(plain, GEOMETRY, RANKS[method], 0).weight.astype(np.float32)
    regression = of_itself(kernel, None, moments_of(correlated(3)) if data else None)
    found = FORMS[method].chain(regression, GEOMETRY, RANKS[method], 1)
    # The kernel itself is rounded to float32, so that its rank is full in the last digit.
    np.testing.assert_allclose(found.weight, kernel, atol=2**-20 * float(np.abs(kernel).max()) * CHANNELS)


@pytest.mark.parametrize("method", FORMS)
def test_sweeps_and_data_lower_the_error(method):
    regression = of_itself(KERNEL, None, moments_of(correlated(4)))
    errors = [weighted(method, RANKS[method], regression, sweeps) for sweeps in range(4)]
    assert all(after <= before * (1 + ROUNDING) for before, after in pairwise(errors))
    assert errors[3] < 0.99 * errors[0]
    blind = FORMS[method].chain(of_itself(KERNEL, None, None), GEOMETRY, RANKS[method], 3).weight
    assert errors[3] < 0.7 * regression.error(blind)


@pytest.mark.parametrize("method", FORMS)
def test_predictions_are_the_errors_before_sweeps_and_fall_with_the_rank(method):
    regression = of_itself(KERNEL, None, moments_of(correlated(5)))
    choices = FORMS[method].ranks(GEOMETRY)
    found = FORMS[method].damages(regression, GEOMETRY, choices)
    assert found == sorted(found, reverse=True)
    place = choices.index(RANKS[method])
    assert found[place] == pytest.approx(weighted(method, RANKS[method], regression, 0))


def test_the_rest_of_a_projection_is_a_regression_of_reduced_rank():
    x = correlated(6).astype(np.float64)
    regression = of_itself(KERNEL, None, moments_of(x))
    first = random(7, 4, CHANNELS).astype(np.float64)
    found = project(regression, first, TAPS, 3)
    # The textbook: regress the outputs on what is left of the inputs, then the leading components of the fitted values,
    # with rows for the damping.
    damping = DAMPING * np.trace(np.cov(x.T, bias=True)) / x.shape[1]
    rows = np.concatenate([x - x.mean(0), np.sqrt(damping * len(x)) * np.eye(x.shape[1])])
    y = rows @ KERNEL.T.astype(np.float64)
    z = np.einsum("nat,ra->nrt", rows.reshape(len(rows), CHANNELS, TAPS), first).reshape(len(rows), -1)
    fitted = z @ np.linalg.lstsq(z, y, rcond=None)[0]
    vectors = np.linalg.svd(fitted, full_matrices=False)[2][:3]
    np.testing.assert_allclose(rows @ found.weight.T, fitted @ vectors.T @ vectors, atol=1e-8 * np.abs(y).max())
    np.testing.assert_allclose(found.last.T @ found.last, np.eye(3), atol=1e-12)


def test_regressions_on_other_outputs_find_weight_and_bias():
    x = correlated(8, rows=4000).astype(np.float64)
    other, shift = random(9, OUTPUTS, CHANNELS * TAPS).astype(np.float64), random(10, OUTPUTS).astype(np.float64)
    y = x @ other.T + shift
    regression = of_another(KERNEL, moments_of(np.concatenate([x, y], axis=1)))
    weight = np.linalg.lstsq(x - x.mean(0), y - y.mean(0), rcond=None)[0].T
    covariance = np.cov(x.T, bias=True)
    damping = DAMPING * np.trace(covariance) / len(covariance)
    eye = np.eye(len(covariance))
    expected = np.linalg.solve(covariance + damping * eye, (weight @ covariance + damping * KERNEL).T).T
    np.testing.assert_allclose(regression.best, expected, atol=1e-8)
    np.testing.assert_allclose(regression.bias(regression.best), (y - x @ expected.T).mean(0), atol=1e-4)
    assert regression.spread == pytest.approx(y.var(axis=0).sum())
    assert regression.error(regression.best) == 0


def test_an_operator_of_its_own_outputs_keeps_weight_and_bias():
    bias = random(11, OUTPUTS)
    for moments in (None, moments_of(correlated(12))):
        regression = of_itself(KERNEL, bias, moments)
        np.testing.assert_array_equal(regression.best, KERNEL)
        np.testing.assert_allclose(regression.bias(regression.best), bias, atol=1e-5)


@pytest.mark.parametrize("dead", [0.0, 3.0])
def test_channels_that_never_change_do_no_harm(dead):
    x = correlated(13)
    x[:, 2 * TAPS : 4 * TAPS] = dead
    regression = of_itself(KERNEL, None, moments_of(x))
    for method, form in FORMS.items():
        chain = form.chain(regression, GEOMETRY, RANKS[method], 2)
        assert np.isfinite(chain.weight).all()
        assert all(np.isfinite(step.weight).all() for steps in chain.branches for step in steps)
    still = of_itself(KERNEL, None, moments_of(np.zeros((5, CHANNELS * TAPS))))
    assert np.isfinite(FORMS["tucker"].chain(still, GEOMETRY, RANKS["tucker"], 1).weight).all()


@pytest.mark.parametrize(
    ("method", "ranks", "cost"),
    [
        # 4 x 4 places of the output, 8 x 8 of the input; 4 x 8 within spatial. Then what memory costs.
        ("spatial", (9,), 9 * (10 * 3) * 4 * 8 + 9 * 12 * 3 * 16 + MEMORY * (10 * 64 + 2 * 9 * 32 + 12 * 16)),
        ("tucker", (5, 6), 3200 + 4320 + 1152 + MEMORY * (10 * 64 + 2 * 5 * 64 + 2 * 6 * 16 + 12 * 16)),
        ("separable", (1,), (10 * 9 + 10 * 12) * 16 + MEMORY * (10 * 64 + 2 * 10 * 16 + 12 * 16)),
        ("separable", (3,), 3 * (10 * 9 + 10 * 12) * 16 + MEMORY * (3 * (10 * 64 + 2 * 160 + 192) + 2 * 192)),
    ],
)
def test_costs_are_counted_where_they_arise(method, ranks, cost):
    halving = Geometry((OUTPUTS, CHANNELS, SIDE, SIDE), (2, 2), (1, 1, 1, 1), (1, 1), (8, 8), (4, 4), MEMORY)
    assert halving.dense == 12 * 10 * 9 * 16 + MEMORY * (10 * 64 + 12 * 16)
    assert form_of(method, 1).cost(halving, ranks) == cost
