from __future__ import annotations

import numpy as np
import pytest
from builders import random
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from passes.statistics import (
    BINS,
    PRODUCT_ROWS,
    SAMPLE_ROWS,
    Activation,
    ActivationAccumulator,
    Moments,
    MomentsAccumulator,
    NotFiniteError,
)

Array = np.ndarray


def seen(*batches: Array, seed: int = 0) -> Activation:
    accumulator = ActivationAccumulator("x", seed=seed)
    for batch in batches:
        accumulator.update(batch)
    return accumulator.result()


def oracle_histogram(data: Array, reach: float) -> Array:
    edges = np.linspace(-reach, reach, BINS + 1)
    return np.histogram(data.astype(np.float64), edges)[0]


def assert_same(one: Activation, other: Activation) -> None:
    assert (one.rows, one.reach) == (other.rows, other.reach)
    for name in ("low", "high", "histogram", "sample"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name), strict=True)


@pytest.mark.parametrize("shape", [(7, 5, 24), (3, 4, 6, 8), (40, 3), (9,), (2, 3, 1)])
def test_it_is_what_numpy_says_of_all_rows(shape: tuple[int, ...]) -> None:
    data = random(1, *shape) * np.linspace(0.1, 9.0, shape[-1], dtype=np.float32)
    found = seen(data)
    rows = data.reshape(-1, shape[-1])
    assert found.rows == len(rows)
    np.testing.assert_array_equal(found.low, rows.min(axis=0), strict=True)
    np.testing.assert_array_equal(found.high, rows.max(axis=0), strict=True)
    # Sums of n float64 roundings of numbers below 40: n * 40 * eps.
    np.testing.assert_allclose(found.mean, rows.astype(np.float64).mean(axis=0), rtol=0, atol=len(rows) * 40 * 2.3e-16)
    largest = float(np.abs(data).max())
    assert largest < found.reach <= 2 * largest
    np.testing.assert_array_equal(found.histogram, oracle_histogram(data, found.reach), strict=True)
    np.testing.assert_array_equal(found.sample, rows, strict=True)


def test_the_way_it_is_cut_into_batches_changes_nothing() -> None:
    data = random(2, 3000, 6) * np.geomspace(1e-6, 1e4, 3000, dtype=np.float32)[:, None]
    whole = seen(data)
    pieces = seen(*np.split(data, [1, 2, 50, 51, 400, 1999]))
    assert_same(whole, pieces)
    np.testing.assert_allclose(whole.mean, pieces.mean, rtol=0, atol=3000 * 1e4 * 2.3e-16)


@pytest.mark.parametrize("last", [1e6, 1e36])
def test_a_histogram_that_grew_is_the_histogram_of_its_final_reach(last: float) -> None:
    sizes = np.repeat(np.array([1e-15, 1.0, last], np.float32), 500)[:, None]
    data = random(3, 1500, 4) * sizes
    found = seen(*np.split(data, 30))
    np.testing.assert_array_equal(found.histogram, oracle_histogram(data, found.reach))


@pytest.mark.parametrize("constant", [0.0, -0.0, 1.0, -3.5, 1e-30, 3.4e38, 1e-45])
def test_constant_data(constant: float) -> None:
    data = np.full((600, 3), constant, np.float32)
    found = seen(data[:200], data[200:])
    value = np.float32(constant)
    assert (found.low == value).all()
    assert (found.high == value).all()
    np.testing.assert_allclose(found.mean, float(value), rtol=1e-12)
    assert found.histogram.sum() == data.size
    assert np.count_nonzero(found.histogram) == 1
    assert abs(float(value)) < found.reach
    assert np.isfinite(found.reach)
    assert (found.sample == value).all()


def test_zeros_before_the_first_number_and_in_one_channel() -> None:
    data = random(6, 100, 2)
    data[:, 1] = 0.0
    data[:40] = 0.0
    found = seen(data[:40], data[40:])
    np.testing.assert_array_equal(found.histogram, oracle_histogram(data, found.reach))
    assert found.low[1] == found.high[1] == found.mean[1] == 0.0
    assert seen(data[:40]).reach == 1.0


def test_a_single_row() -> None:
    row = random(7, 5)
    found = seen(row)
    assert found.rows == 1
    np.testing.assert_array_equal(found.low, found.high)
    np.testing.assert_array_equal(found.sample, row[None])


def test_a_scalar_is_one_row_of_one_channel() -> None:
    found = seen(np.float32(2.0), np.array(3.0, np.float32))
    assert (found.rows, found.low.tolist(), found.high.tolist(), found.mean.tolist()) == (2, [2.0], [3.0], [2.5])


def test_the_sample_is_drawn_evenly_and_again_the_same() -> None:
    rows = np.arange(20_000, dtype=np.float32)[:, None]
    found = seen(*np.split(rows, 13 * np.arange(1, 1500)))
    sample = found.sample[:, 0]
    assert found.sample.shape == (SAMPLE_ROWS, 1)
    assert (np.diff(sample) > 0).all(), "in the order of the data, none twice"
    # Counts in 8 equal parts are about binomial(512, 1/8): mean 64, deviation 7.5; 5 deviations.
    counts = np.histogram(sample, 8, (0, 20_000))[0]
    assert np.abs(counts - 64).max() < 38
    np.testing.assert_array_equal(found.sample, seen(rows).sample)
    assert not np.array_equal(found.sample, seen(rows, seed=1).sample)


def test_values_of_as_many_rows_have_the_same_rows_drawn() -> None:
    rows = np.arange(3000, dtype=np.float32)
    wide = np.repeat(rows[:, None], 7, axis=1)
    np.testing.assert_array_equal(seen(rows[:, None]).sample[:, 0], seen(wide).sample[:, 6])


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_named(number: float) -> None:
    accumulator = ActivationAccumulator("layer.0.dense")
    good = random(8, 2, 3, 4)
    accumulator.update(good)
    bad = good.copy()
    bad[1, 0, 2] = number
    with pytest.raises(NotFiniteError, match=rf"^layer\.0\.dense is {number} in row 3$") as caught:
        accumulator.update(bad)
    assert isinstance(caught.value, ValueError)
    assert caught.value.row == 3
    assert_same(accumulator.result(), seen(good))


def test_another_number_of_channels_is_refused() -> None:
    accumulator = ActivationAccumulator("x")
    accumulator.update(random(9, 2, 4))
    with pytest.raises(ValueError, match="x has 5 channels, and 4 before"):
        accumulator.update(random(9, 2, 5))
    assert accumulator.result().rows == 2


def test_nothing_seen() -> None:
    accumulator = ActivationAccumulator("x")
    accumulator.update(np.zeros((0, 4), np.float32))
    accumulator.update(np.zeros((3, 0), np.float32))
    with pytest.raises(ValueError, match="nothing was seen of x"):
        accumulator.result()


def test_other_floats_are_read_as_float32() -> None:
    data = random(10, 20, 3).astype(np.float16)
    assert_same(seen(data), seen(data.astype(np.float32)))
    assert seen(data.astype(np.float64)).low.dtype == np.float32


def test_the_result_does_not_change_afterwards() -> None:
    accumulator = ActivationAccumulator("x")
    accumulator.update(random(11, 10, 3))
    first = accumulator.result()
    before = [getattr(first, name).copy() for name in ("low", "high", "mean", "histogram", "sample")]
    accumulator.update(random(12, 900, 3) * np.float32(100))
    for name, kept in zip(("low", "high", "mean", "histogram", "sample"), before, strict=True):
        np.testing.assert_array_equal(getattr(first, name), kept)


def test_a_negative_number_too_small_for_its_bin_stays_negative() -> None:
    data = np.array([[-1e-45, 1e-45, -0.0, 2.0**100]], np.float32)
    assert_same(seen(data[:, :3].T, data[:, 3:]), seen(data.T))
    histogram = seen(data.T).histogram
    assert (histogram[BINS // 2 - 1], histogram[BINS // 2]) == (1, 2)


@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 40), st.integers(1, 4)),
        elements=st.floats(-(2.0**100), 2.0**100, width=32),
    ),
    st.lists(st.integers(0, 40), max_size=5),
)
@settings(max_examples=60, deadline=None)
def test_any_finite_data_in_any_batches(data: Array, cuts: list[int]) -> None:
    found = seen(*np.split(data, sorted(cuts)))
    assert_same(found, seen(data))
    assert found.histogram.sum() == data.size
    assert (np.abs(data.astype(np.float64)) < found.reach).all()
    np.testing.assert_array_equal(found.sample, data)


def moments(*batches: Array) -> Moments:
    accumulator = MomentsAccumulator("x")
    for batch in batches:
        accumulator.update(batch)
    return accumulator.result()


def oracle_moments(rows: Array) -> tuple[Array, Array]:
    """The second moments in float64, whose products of float32 are exact; and how far off those of float32 sums may be.

    Each element is a mean of products; c of them at a time are summed in float32, off by at most
    γ_c = c u / (1 - c u) of the sum of their sizes with u = 2^-24, and by 2^-126 where they are too small for it. The
    float64 sums of these, of the oracle, and the divisions are off by less than (rows + 2) 2^-53.
    """
    wide = rows.astype(np.float64)
    roundings = min(len(rows), PRODUCT_ROWS) * 2.0**-24
    sizes = np.abs(wide).T @ np.abs(wide) / len(rows)
    bound = (roundings / (1 - roundings) + (2 * len(rows) + 4) * 2.0**-53) * sizes + 2.0**-126
    return wide.T @ wide / len(rows), bound


def assert_moments(found: Moments, rows: Array) -> None:
    expected, bound = oracle_moments(rows)
    assert found.rows == len(rows)
    assert found.second.dtype == np.float64
    assert (np.abs(found.second - expected) <= bound).all()
    np.testing.assert_array_equal(found.second, found.second.T)
    np.testing.assert_array_equal(found.absmax, np.abs(rows).max(axis=0), strict=True)
    largest = float(np.abs(rows).max())
    np.testing.assert_allclose(
        found.mean, rows.astype(np.float64).mean(axis=0), rtol=0, atol=2 * len(rows) * largest * 2.0**-53
    )


@pytest.mark.parametrize("shape", [(7, 5, 24), (3, 4, 6, 8), (4000, 16), (600, 90), (9,), (2, 3, 1), (5, 200)])
def test_moments_are_those_of_float64(shape: tuple[int, ...]) -> None:
    data = random(1, *shape) * np.geomspace(0.01, 90.0, shape[-1], dtype=np.float32) + np.float32(0.3)
    assert_moments(moments(data), data.reshape(-1, shape[-1]))


def test_the_error_of_moments_does_not_grow_with_the_rows() -> None:
    """300,000 equal rows: one float32 sum would lose every digit below 2^-24 of what it has grown to."""
    data = np.full((300_000, 2), 1.1, np.float32)
    found = moments(*np.split(data, 100))
    square = float(data[0, 0]) ** 2
    alone = np.cumsum(np.full(len(data), np.float32(square)), dtype=np.float32)[-1] / len(data)
    bound = PRODUCT_ROWS * 2.0**-24 * square
    assert abs(alone - square) > bound
    assert np.abs(found.second - square).max() < bound
    np.testing.assert_allclose(found.mean, float(data[0, 0]), rtol=300_000 * 2.0**-53)


def test_how_moments_are_cut_into_batches_changes_only_the_rounding() -> None:
    data = random(2, 3000, 6) * np.geomspace(1e-3, 1e3, 3000, dtype=np.float32)[:, None]
    pieces = moments(*np.split(data, [1, 2, 50, 51, 400, 1999]))
    assert_moments(pieces, data)
    whole, (_, bound) = moments(data), oracle_moments(data)
    assert (np.abs(whole.second - pieces.second) <= 2 * bound).all()
    assert (whole.rows, whole.absmax.tolist()) == (pieces.rows, pieces.absmax.tolist())


@pytest.mark.parametrize("size", [1e30, 1e18, 1e15, 1e-10, 1e-18, 1e-30])
def test_moments_of_numbers_whose_squares_leave_float32(size: float) -> None:
    data = random(3, 700, 5) * np.float32(size)
    assert_moments(moments(data[:100], data[100:]), data)
    expected = data.astype(np.float64).T @ data.astype(np.float64) / 700
    np.testing.assert_allclose(np.diag(moments(data).second), np.diag(expected), rtol=PRODUCT_ROWS * 2.0**-24)


@pytest.mark.parametrize("constant", [0.0, -0.0, -3.5, 3.4e38, 1e-45])
def test_moments_of_constant_data(constant: float) -> None:
    found = moments(np.full((600, 3), constant, np.float32))
    value = float(np.float32(constant))
    np.testing.assert_allclose(found.second, value**2, rtol=PRODUCT_ROWS * 2.0**-24)
    assert (found.absmax == abs(np.float32(constant))).all()


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_never_reaches_the_moments(number: float) -> None:
    accumulator = MomentsAccumulator("layer.0.dense")
    good = random(8, 2, 3, 4)
    accumulator.update(good)
    bad = good.copy()
    bad[1, 0, 2] = number
    with pytest.raises(NotFiniteError, match=rf"^layer\.0\.dense is {number} in row 3$"):
        accumulator.update(bad)
    with pytest.raises(ValueError, match=r"layer\.0\.dense has 5 channels, and 4 before"):
        accumulator.update(random(9, 2, 5))
    assert_moments(accumulator.result(), good.reshape(-1, 4))


def test_nothing_seen_of_moments() -> None:
    accumulator = MomentsAccumulator("x")
    accumulator.update(np.zeros((0, 4), np.float32))
    with pytest.raises(ValueError, match="nothing was seen of x"):
        accumulator.result()


def test_moments_do_not_change_afterwards() -> None:
    accumulator = MomentsAccumulator("x")
    accumulator.update(random(11, 10, 3))
    first = accumulator.result()
    before = [getattr(first, name).copy() for name in ("second", "absmax", "mean")]
    accumulator.update(random(12, 900, 3) * np.float32(100))
    for name, kept in zip(("second", "absmax", "mean"), before, strict=True):
        np.testing.assert_array_equal(getattr(first, name), kept)


@given(
    arrays(
        np.float32,
        st.tuples(st.integers(1, 40), st.integers(1, 4)),
        elements=st.floats(-(2.0**100), 2.0**100, width=32),
    ),
    st.lists(st.integers(0, 40), max_size=5),
)
@settings(max_examples=60, deadline=None)
def test_moments_of_any_finite_data_in_any_batches(data: Array, cuts: list[int]) -> None:
    assert_moments(moments(*np.split(data, sorted(cuts))), data)
