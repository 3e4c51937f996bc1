"""Clipping ranges against brute force, closed forms and ONNX Runtime's own QuantizeLinear."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from encoder_graphs import DISABLED, FLOAT, Builder, run
from hypothesis import given, settings
from hypothesis import strategies as st
from observing import activation

from passes.quantize.arithmetic import Quantized, quantize_columns
from passes.quantize.ranges import (
    METHODS,
    Range,
    clipping_range,
    is_constant,
    median_output_error,
    output_error,
    output_range,
)
from passes.statistics import BINS, Activation

RNG = np.random.default_rng(3)
EPS = float(np.finfo(np.float32).eps)


def distribution(density, reach: float) -> Activation:
    """An activation whose histogram is the density itself, without the noise of a sample."""
    edges = np.linspace(-reach, reach, BINS + 1)
    histogram = np.rint(1e15 * density((edges[:-1] + edges[1:]) / 2)).astype(np.int64)
    ends = np.full(1, reach, np.float32)
    return Activation(1, -ends, ends, np.zeros(1), histogram, reach, np.zeros((1, 1), np.float32))


def heavy(rows: int = 4000, columns: int = 16) -> np.ndarray:
    """Values of heavy tails, one side longer than the other."""
    x = np.random.default_rng(rows).laplace(size=(rows, columns)).astype(np.float32)
    return np.where(x > 0, 2 * x, x).astype(np.float32)


def spoilt(x: np.ndarray, clip: Range) -> float:
    return float(np.square(clip.round_trip(x).astype(np.float64) - x).mean())


@settings(max_examples=40, deadline=None)
@given(st.floats(-100, 0), st.floats(0.01, 100), st.integers(0, 100))
def test_quantizing_is_what_onnxruntime_does(low, high, seed):
    clip = Range(low, high)
    x = (np.random.default_rng(seed).normal(size=(7, 9)) * (high - low)).astype(np.float32)
    graph = Builder()
    scale = graph.constant("s", np.asarray(clip.scale))
    zero = graph.constant("z", np.asarray(clip.zero_point))
    inputs = graph.input("x", FLOAT, ["m", 9]), scale, zero
    y = graph.add("QuantizeLinear", *inputs, name="y", dtype=ir.DataType.UINT8)
    assert (run(graph.model(y, shape=["m", 9]), {"x": x}, DISABLED) == clip.quantize(x)).all()


@settings(max_examples=40, deadline=None)
@given(st.floats(-100, 0), st.floats(0.01, 100))
def test_zero_is_exact_and_nothing_inside_is_off_by_more_than_half_a_step(low, high):
    clip = Range(low, high)
    assert clip.round_trip(np.zeros(3, np.float32)).tolist() == [0, 0, 0]
    x = np.linspace(low, high, 1001).astype(np.float32)
    assert np.abs(clip.round_trip(x).astype(np.float64) - x).max() <= float(clip.scale) * (0.5 + 256 * EPS)


@pytest.mark.parametrize("ends", [(0.5, 1.0), (-1.0, -0.5), (0.0, 0.0), (1.0, -1.0)])
def test_a_range_contains_zero_and_something_else(ends):
    with pytest.raises(ValueError, match="no range that contains 0"):
        Range(*ends)


def test_a_range_too_small_for_float32_keeps_a_normal_step():
    assert Range(0.0, 1e-44).scale == np.finfo(np.float32).tiny


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shift", [-20.0, 0.0, 20.0])
def test_every_range_lies_within_what_was_seen_and_zero(method, shift):
    x = heavy() + np.float32(shift)
    clip = clipping_range(activation(x), method)
    assert min(0.0, float(x.min())) <= clip.low <= 0.0 <= clip.high <= max(0.0, float(x.max()))
    # Nothing of this is far out: no method may cut off more than a hundredth of the values.
    assert np.mean((x < clip.low) | (x > clip.high)) < 0.01


def test_absmax_clips_nothing():
    x = heavy()
    assert clipping_range(activation(x), "absmax") == Range(float(x.min()), float(x.max()))
    assert clipping_range(activation(np.abs(x)), "absmax") == Range(0.0, float(np.abs(x).max()))
    assert clipping_range(activation(-np.abs(x)), "absmax") == Range(-float(np.abs(x).max()), 0.0)


@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.9, 100.0])
def test_percentile_cuts_that_share_off_either_end(percentile):
    x = heavy()
    clip = clipping_range(activation(x), "percentile", percentile)
    allowed = int(x.size * (100 - percentile) / 200)
    one_bin = 2 * np.abs(x).max() / BINS * 1.001
    assert (x < clip.low).sum() <= allowed < (x < clip.low + one_bin).sum()
    assert (x > clip.high).sum() <= allowed < (x > clip.high - one_bin).sum()


def test_percentile_of_zeros_with_a_few_outliers_is_no_empty_range():
    x = np.zeros((1000, 16), np.float32)
    x[0, 0] = -3.0
    clip = clipping_range(activation(x), "percentile", 90.0)
    assert -3.0 <= clip.low <= clip.high
    assert clip.high - clip.low > 0


@pytest.mark.parametrize(
    ("density", "clipping", "table"),
    [
        (lambda x: np.exp(-np.abs(x)) / 2, lambda a: 2 * np.exp(-a), 9.89),
        (lambda x: np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi), None, 3.92),
    ],
)
def test_mse_finds_the_optimum_of_the_closed_form(density, clipping, table):
    """Banner et al. 2019 give the optimal clips at 8 bits: 9.89 b for Laplace, 3.92 sigma for a normal distribution."""
    clip = clipping_range(distribution(density, 16.0), "mse")
    assert clip.low == -clip.high
    # Theirs has 256 steps, not 255, and calls them noise also beyond the clip: less than a percent.
    assert clip.high == pytest.approx(table, rel=0.01)
    if clipping is not None:
        grid = np.linspace(5, 15, 10001)
        best = grid[np.argmin(clipping(grid) + np.square(2 * grid / 255) / 12)]
        assert clip.high == pytest.approx(best, abs=2 * 16 / BINS)


def test_mse_is_the_least_error_on_the_data_itself():
    x = heavy()
    found = spoilt(x, clipping_range(activation(x), "mse"))
    widest = clipping_range(activation(x), "absmax")
    errors = [
        spoilt(x, Range(low * widest.low, high * widest.high))
        for low in np.linspace(0.1, 1, 20)
        for high in np.linspace(0.1, 1, 20)
    ]
    # Uniform noise within a step is a model: it is off by a percent or two of an error, not clipping by more.
    assert found < 1.02 * min(errors)
    assert found < 0.95 * spoilt(x, widest)


def test_entropy_follows_the_algorithm_of_the_talk():
    """Against the pseudocode of Migacz's slides, bin by bin, on a histogram that begins at 0 (a ReLU's)."""
    x = np.abs(RNG.normal(size=(4000, 16))).astype(np.float32)
    x[0, :3] = [11.0, 12.0, 13.0]
    seen = activation(x)
    bins = seen.histogram[BINS // 2 :].astype(float)
    divergences = {}
    for count in range(256, len(bins) + 1, 8):
        p = bins[:count].copy()
        p[-1] += bins[count:].sum()
        q = np.zeros(count)
        of_level = (np.arange(count) * 256) // count
        for level in range(256):
            members = np.flatnonzero((of_level == level) & (bins[:count] > 0))
            if len(members):
                q[members] = bins[members].sum() / len(members)
        q = np.maximum(q, 0.5) / q.sum()
        p /= p.sum()
        divergences[count] = float((p[p > 0] * np.log(p[p > 0] / q[p > 0])).sum())
    clip = clipping_range(seen, "entropy")
    assert clip.low == 0.0
    chosen = round(clip.high / seen.reach * len(bins))
    assert chosen < 0.6 * len(bins)
    least = min(divergences.values())
    near = [count for count, value in divergences.items() if value < 1.2 * least]
    assert min(near) - 8 <= chosen <= max(near) + 8


def test_entropy_leaves_a_uniform_distribution_whole():
    seen = distribution(lambda x: np.full_like(x, 1 / 8), 4.0)
    assert clipping_range(seen, "entropy") == Range(-4.0, 4.0)


def test_the_output_range_is_the_best_of_all_for_the_products():
    x = heavy(512)
    x[:, 0] *= 30
    readers = []
    for columns in (8, 24):
        weight = RNG.normal(size=(16, columns)).astype(np.float32)
        weight[0] *= 0.001
        readers.append((weight, quantize_columns(weight)))
    seen = activation(x)
    found = output_range(seen, readers)
    total = sum(output_error(x, weight, found, quantized) for weight, quantized in readers)
    for method in METHODS:
        clip = clipping_range(seen, method)
        assert total <= sum(output_error(x, weight, clip, quantized) for weight, quantized in readers)
    # The long channel has no weight: clipping it costs nothing, which only the output can tell.
    assert found.high < 0.5 * clipping_range(seen, "mse").high


def test_output_error_is_relative_and_zero_for_what_int8_can_say():
    x = np.array([[0.0, 255.0], [3.0, 7.0]], np.float32)
    weight = np.array([[127.0, 1.0], [-2.0, 127.0]], np.float32)
    quantized = quantize_columns(weight)
    assert output_error(x, weight, Range(0.0, 255.0), quantized) == 0.0
    halved = Quantized(quantized.values, quantized.scale / 2)
    assert output_error(x, weight, Range(0.0, 255.0), halved) == pytest.approx(0.25, rel=8 * EPS)
    assert output_error(0 * x, weight, Range(0.0, 255.0), quantized) == 0.0


def test_output_error_is_infinite_where_nothing_became_something():
    weight = np.array([[1.0], [1.0]], np.float32)
    wrong = Quantized(np.array([[127], [126]], np.int8), np.array([1 / 127], np.float32))
    assert output_error(np.array([[1.0, -1.0]], np.float32), weight, Range(-1.0, 1.0), wrong) == float("inf")


@pytest.mark.parametrize("correct_bias", [False, True])
def test_output_error_against_its_definition(correct_bias):
    x, weight = heavy(200), RNG.normal(size=(16, 5)).astype(np.float32)
    quantized, clip = quantize_columns(weight), Range(-1.0, 2.0)
    exact = x.astype(np.float64) @ weight
    error = exact - clip.round_trip(x).astype(np.float64) @ quantized.dequantize()
    if correct_bias:
        error = error - np.median(error, 0)
    expected = np.square(error).sum() / np.square(exact).sum()
    found = output_error(x, weight, clip, quantized, correct_bias=correct_bias)
    assert found == pytest.approx(expected, rel=1e-4)
    assert found > 0.001


def test_the_median_output_error_is_what_the_rows_have_in_common():
    x, weight = heavy(301) + np.float32(1), RNG.normal(size=(16, 5)).astype(np.float32)
    quantized, clip = quantize_columns(weight), Range(-1.0, 2.0)
    error = x.astype(np.float64) @ weight - clip.round_trip(x).astype(np.float64) @ quantized.dequantize()
    common = median_output_error(x, weight, clip, quantized)
    assert common == pytest.approx(np.median(error, 0), abs=64 * EPS * float(np.abs(x @ weight).max()))
    assert np.abs(common).max() > 0.01
    # Twenty rows whose outliers are clipped move it by twenty ranks of 301 at most, and the mean out of all proportion.
    x[:20, 3] = 1e4
    ranked, moved = np.sort(error, 0), median_output_error(x, weight, clip, quantized)
    assert ((ranked[130] - 1e-3 <= moved) & (moved <= ranked[170] + 1e-3)).all()
    assert np.abs((x - clip.round_trip(x)).mean(0) @ weight).max() > 10 * np.abs(ranked).max()


def test_what_never_varies_has_no_range():
    assert is_constant(activation(np.zeros((5, 4), np.float32)))
    assert is_constant(activation(np.full((5, 4), 2.5, np.float32)))
    assert not is_constant(activation(np.arange(4, dtype=np.float32).reshape(1, 4)))
    for method in METHODS:
        with pytest.raises(ValueError, match="no range"):
            clipping_range(activation(np.zeros((5, 4), np.float32)), method)


def test_wrong_options():
    seen = activation(heavy())
    with pytest.raises(ValueError, match="no method 'best' to choose a range: absmax, percentile, mse, entropy"):
        clipping_range(seen, "best")
    for percentile in (0.0, 100.5):
        with pytest.raises(ValueError, match=r"not in \(0, 100\]"):
            clipping_range(seen, "percentile", percentile)
