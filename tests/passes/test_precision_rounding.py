"""float32 constants as float16: rounding, saturation, and the constants that must not be rounded."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from passes.precision.rounding import (
    LARGEST,
    MASK_MINIMUM,
    MASK_THRESHOLD,
    SMALLEST_NORMAL,
    overflows,
    to_half,
    to_half_limit,
    underflows,
)

HALF_ROUNDING = 2.0**-11
"""Largest relative error of rounding to float16."""


@settings(max_examples=80, deadline=None)
@given(arrays(np.float32, 12, elements=st.floats(-65504, 65504, width=32)))
def test_numbers_in_range_are_rounded_to_nearest(array):
    error = np.abs(to_half(array).astype(np.float64) - array)
    assert (error <= np.maximum(np.abs(array) * HALF_ROUNDING, 2.0**-25)).all()
    assert (to_half(array) == to_half_limit(array)).all()


@settings(max_examples=80, deadline=None)
@given(arrays(np.float32, 12, elements=st.floats(width=32, allow_nan=False)))
def test_finite_stays_finite_and_infinite_stays_infinite(array):
    for half in (to_half(array), to_half_limit(array)):
        assert (np.isfinite(half) == np.isfinite(array)).all()
        assert (half[array == 0] == 0).all()


def test_what_lies_beyond_the_range():
    array = np.array([np.finfo(np.float32).min, -1e9, -7e4, 7e4, 3e38, -np.inf], np.float32)
    assert to_half(array).tolist() == [MASK_MINIMUM, MASK_MINIMUM, -LARGEST, LARGEST, LARGEST, -np.inf]
    assert to_half_limit(array).tolist() == [-LARGEST, -LARGEST, -LARGEST, LARGEST, LARGEST, -np.inf]
    assert np.isnan(to_half(np.array(np.nan, np.float32)))
    # Half of the range leaves room for any score that float16 itself could hold there.
    assert np.float16(MASK_MINIMUM) + np.float16(-30000) == -62752
    assert -LARGEST - 32 < -65520  # at that sum float16 rounds to minus infinity


@pytest.mark.parametrize(
    ("numbers", "under", "over"),
    [
        ([1e-9], True, False),
        ([SMALLEST_NORMAL], False, False),
        ([0.0], False, False),
        ([], False, False),
        ([1e-9, 1.0], False, False),
        ([1e5], False, True),
        ([MASK_THRESHOLD], False, False),
        ([-1e5], False, True),
        ([np.inf, -np.inf], False, False),
    ],
)
def test_constants_that_float16_cannot_hold(numbers, under, over):
    array = np.array(numbers, np.float32)
    assert (underflows(array), overflows(array)) == (under, over)
