"""The arithmetic of smoothing: the factors, the error they are chosen by, and that choosing twice changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
from builders import random
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.quantize.smoothing import GAIN, best_factors, products_error, smoothing_factors
from passes.statistics import Activation, ActivationAccumulator

Array = np.ndarray
STRENGTHS = (0.25, 0.5, 0.65, 0.8)


def seen(x: Array) -> Activation:
    accumulator = ActivationAccumulator("x")
    accumulator.update(x)
    return accumulator.result()


def outlying(seed: int, rows: int = 200, width: int = 32, times: float = 40.0, channels: int = 2) -> Array:
    x = random(seed, rows, width)
    x[:, :channels] *= times
    return x


def reaches(x: Array, *weights: Array) -> tuple[Array, Array]:
    rows = np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0)
    return np.abs(x).max(axis=0).astype(np.float64), rows.astype(np.float64)


def oracle(x: Array, weight: Array) -> float:
    """The relative error of one product in 8 bits, in float64 and without any of the code under test."""
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    step = (high - low) / 255
    zero = np.clip(np.rint(-low / step), 0, 255)
    rounded = (np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step
    steps = np.abs(weight).max(axis=0) / 127
    columns = np.rint(weight / steps) * steps
    exact = x.astype(np.float64) @ weight
    return float(np.linalg.norm(rounded @ columns - exact) / np.linalg.norm(exact))


@pytest.mark.parametrize("strength", [0.0, 0.5, 0.8, 1.0])
def test_the_factors_are_those_of_the_paper(strength: float) -> None:
    reach, rows = reaches(outlying(0), random(1, 32, 8))
    expected = reach**strength / rows ** (1 - strength)
    factors = smoothing_factors(reach, rows, strength)
    assert factors.dtype == np.float32
    np.testing.assert_allclose(factors, expected / np.exp(np.log(expected).mean()), rtol=1e-6)


def test_factors_stay_finite_where_nothing_was_seen() -> None:
    dead = np.array([0.0, 1.0, 1e-30, 2.0])
    for reach, rows in ((dead, np.ones(4)), (np.ones(4), dead), (np.zeros(4), np.zeros(4))):
        factors = smoothing_factors(reach, rows, 0.5)
        assert np.isfinite(factors).all()
        # A channel counts as at least 1e-4 of the largest: at strength 1/2 factors differ by at most the root of that.
        assert factors.max() / factors.min() <= 1.001e2


@pytest.mark.parametrize("first", [0.25, 0.8])
@pytest.mark.parametrize("second", [0.5, 0.65])
def test_smoothing_again_leads_where_smoothing_once_does(first: float, second: float) -> None:
    x, weight = outlying(0), random(1, 32, 8)
    once = smoothing_factors(*reaches(x, weight), first)
    again = smoothing_factors(*reaches(x / once, weight * once[:, None]), second)
    np.testing.assert_allclose(once * again, smoothing_factors(*reaches(x, weight), second), rtol=1e-5)


def test_the_error_is_that_of_the_integers() -> None:
    x, weights = outlying(0), (random(1, 32, 8), random(2, 32, 20))
    factors = smoothing_factors(*reaches(x, *weights), 0.5)
    for s in (np.ones(32, np.float32), factors):
        expected = sum(oracle(x / s, weight * s[:, None]) for weight in weights)
        # A few of 6400 roundings may fall the other way in float32; one moves the norm by far less than a thousandth.
        assert products_error(seen(x), weights, s) == pytest.approx(expected, rel=1e-3)


def test_the_best_strength_is_the_one_of_least_error() -> None:
    x, weights = outlying(0), (random(1, 32, 8), random(2, 32, 20))
    choice = best_factors(seen(x), weights, STRENGTHS)
    errors = {
        strength: products_error(seen(x), weights, smoothing_factors(*reaches(x, *weights), strength))
        for strength in STRENGTHS
    }
    assert choice.strength == min(errors, key=lambda strength: errors[strength])
    assert choice.after == errors[choice.strength]
    assert choice.before == products_error(seen(x), weights, np.ones(32, np.float32))
    # Two of 32 channels hold all but a fortieth of the range: what they cost the others is most of the error.
    assert choice.after < 0.5 * choice.before


def test_what_has_no_outliers_is_left() -> None:
    uniform = np.random.default_rng(0).uniform(-1, 1, (200, 32)).astype(np.float32)
    choice = best_factors(seen(uniform), [random(1, 32, 8)], STRENGTHS)
    assert choice.strength == 0.0
    np.testing.assert_array_equal(choice.factors, np.ones(32))
    assert choice.after == choice.before


@pytest.mark.parametrize("x", [np.zeros((9, 4), np.float32), random(0, 9, 4)], ids=["zeros", "floats"])
def test_products_that_are_zero_are_left(x: Array) -> None:
    weight = random(1, 4, 3) if not x.any() else np.zeros((4, 3), np.float32)
    assert best_factors(seen(x), [weight], STRENGTHS).strength == 0.0


@given(
    st.integers(0, 10_000),
    st.floats(1, 300),
    st.integers(0, 6),
    st.lists(st.sampled_from([0.1, 0.25, 0.5, 0.65, 0.8, 0.95]), min_size=1, max_size=4, unique=True),
    st.integers(0, 3),
)
@settings(max_examples=60, deadline=None)
def test_choosing_again_leaves_all_as_it_is(
    seed: int, times: float, channels: int, strengths: list[float], dead: int
) -> None:
    x = outlying(seed, 60, 16, times, channels)
    x[:, 16 - dead :] *= 1e-7
    weights = [random(seed + 1, 16, 6), random(seed + 2, 16, 9) * random(seed + 3, 16, 1)]
    choice = best_factors(seen(x), weights, strengths)
    assert choice.strength == 0.0 or choice.after <= (1 - GAIN) * choice.before
    smoothed = [weight * choice.factors[:, None] for weight in weights]
    again = best_factors(seen(x / choice.factors), smoothed, strengths)
    assert choice.strength == 0.0 or again.strength == 0.0
