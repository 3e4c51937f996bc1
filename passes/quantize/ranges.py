"""Clipping ranges of static uint8 activations, chosen from what calibration saw. Plain arrays, no graph.

A value x becomes ``q = clip(round(x / s) + z, 0, 255)`` with the step ``s = (high - low) / 255`` and the integer
``z = round(-low / s)``, which stands for 0.0 exactly (Jacob et al., "Quantization and Training of Neural Networks for
Efficient Integer-Arithmetic-Only Inference", 2018). A narrow range clips what lies outside, a wide one has large steps:

| method     | the range                                                                                      |
|------------|------------------------------------------------------------------------------------------------|
| absmax     | smallest to largest value seen: clips nothing                                                  |
| percentile | cuts ``(100 - p) / 2`` % of the values off either end (Wu et al., "Integer Quantization for Deep |
|            | Learning Inference", 2020, in its two-sided form)                                              |
| mse        | least expected squared error: what clipping costs, plus ``s^2 / 12`` for each value inside     |
|            | (Banner et al., "Post training 4-bit quantization of convolutional networks", 2019)            |
| entropy    | least Kullback-Leibler divergence of the histogram from its 256-level form (Migacz, "8-bit     |
|            | Inference with TensorRT", GTC 2017)                                                            |
| output     | least squared error of the products that read the value, on the sample rows, among the above   |
|            | and a few narrower ones                                                                        |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from passes.statistics import Activation

from .arithmetic import ACTIVATION_STEPS, Doubles, Floats, Quantized

METHODS = ("absmax", "percentile", "mse", "entropy")
"""Ways to choose a range that need the activation only."""

OUTPUT = "output"
"""The way that also needs the weights."""

_LEVELS = ACTIVATION_STEPS + 1

_SHRUNK = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1)
"""Fractions of the largest magnitude at which `output_range` tries to clip."""


@dataclass(frozen=True)
class Range:
    """A clipping range: the one that was wanted, before the zero point is rounded to an integer.

    Attributes:
        low: At most 0.
        high: At least 0; more than ``low``.

    Raises:
        ValueError: It is empty, or 0 lies outside.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        if not self.low <= 0.0 <= self.high or self.low == self.high:
            raise ValueError(f"[{self.low}, {self.high}] is no range that contains 0")

    @property
    def scale(self) -> np.float32:
        """The step; a normal float32."""
        return max(np.float32((self.high - self.low) / ACTIVATION_STEPS), np.finfo(np.float32).tiny)

    @property
    def zero_point(self) -> np.uint8:
        """The integer that stands for 0.0."""
        return np.uint8(np.clip(np.rint(-self.low / float(self.scale)), 0, ACTIVATION_STEPS))

    def quantize(self, x: Floats) -> NDArray[np.uint8]:
        """What ONNX ``QuantizeLinear`` makes of ``x``: uint8 of its shape; ties round to even."""
        shifted = np.rint(x / self.scale) + np.float32(self.zero_point)
        return np.asarray(np.clip(shifted, 0, ACTIVATION_STEPS), dtype=np.uint8)

    def round_trip(self, x: Floats) -> Floats:
        """``x`` quantized and back: float32 of its shape."""
        centred = self.quantize(x).astype(np.float32) - np.float32(self.zero_point)
        return np.asarray(centred * self.scale, dtype=np.float32)


def is_constant(activation: Activation) -> bool:
    """Whether calibration saw one and the same number everywhere."""
    return bool(activation.low.min() == activation.high.max())


def clipping_range(activation: Activation, method: str = "mse", percentile: float = 99.99) -> Range:
    """The range by one of `METHODS`, always within what was seen, widened to contain 0.

    Args:
        activation: What calibration saw.
        method: One of `METHODS`.
        percentile: Percent of the values that the method "percentile" keeps; more than 0, at most 100.

    Raises:
        ValueError: There is no such method, the percentile is out of bounds, or only zeros were seen.
    """
    if method == "absmax":
        return _absmax(activation)
    if method == "percentile":
        return _percentile(activation, percentile)
    if method == "mse":
        return _mse(activation)
    if method == "entropy":
        return _entropy(activation)
    raise ValueError(f"no method {method!r} to choose a range: {', '.join(METHODS)}")


def output_range(
    activation: Activation,
    readers: Sequence[tuple[Floats, Quantized]],
    percentile: float = 99.99,
    *,
    correct_bias: bool = False,
) -> Range:
    """The range that spoils the products with the given weights least: least sum of their `output_error`.

    Candidates are the ranges of all `METHODS` and what was seen, clipped at some fractions of its largest magnitude.

    Args:
        activation: What calibration saw of the value x [..., K]; its sample is what is multiplied.
        readers: Each weight that x is multiplied with: float32 [K, N] and its quantized form.
        percentile: As in `clipping_range`.
        correct_bias: As in `output_error`.

    Raises:
        ValueError: The percentile is out of bounds, or only zeros were seen.
    """
    widest = _absmax(activation)
    reach = max(-widest.low, widest.high)
    candidates = [clipping_range(activation, method, percentile) for method in METHODS]
    candidates += [_within(activation, -fraction * reach, fraction * reach) for fraction in _SHRUNK]
    errors = dict.fromkeys(candidates, 0.0)
    pairs = [(activation.sample @ weight, quantized.dequantize()) for weight, quantized in readers]
    for candidate in errors:
        rounded = candidate.round_trip(activation.sample)
        errors[candidate] = sum(
            _relative_error(exact, rounded @ rough, correct_bias=correct_bias) for exact, rough in pairs
        )
    return min(errors, key=lambda candidate: errors[candidate])


def output_error(
    sample: Floats, weight: Floats, clip: Range, quantized: Quantized, *, correct_bias: bool = False
) -> float:
    """Damage that quantizing does to one product: ``|x W - x' W'|^2 / |x W|^2`` over the rows of a sample.

    Args:
        sample: float32 [rows, K].
        weight: float32 [K, N].
        clip: The range of the input.
        quantized: int8 [K, N] and float32 [N]: the quantized form of ``weight``.
        correct_bias: Without `median_output_error`, which a corrected bias takes away.

    Returns:
        0 where nothing is lost; infinite where the exact product is 0 and the quantized one is not.
    """
    found = clip.round_trip(sample) @ quantized.dequantize()
    return _relative_error(sample @ weight, found, correct_bias=correct_bias)


def median_output_error(sample: Floats, weight: Floats, clip: Range, quantized: Quantized) -> Doubles:
    """The error that is common to the rows of a quantized product, which its bias can take away: float64 [N].

    The median over the rows of ``x W - x' W'``. Nagel et al., "Data-Free Quantization Through Weight Equalization and
    Bias Correction", 2019, take the mean; but one token in ten whose outlier is clipped moves the mean by a tenth of
    its error, and adding that to all the others is worse than leaving it where it is (measured on all-MiniLM-L6-v2
    with the percentile method: cosine to float 0.994 without correction, 0.03 with the mean, 0.994 with the median).

    Args:
        sample: float32 [rows, K].
        weight: float32 [K, N].
        clip: The range of the input.
        quantized: int8 [K, N] and float32 [N]: the quantized form of ``weight``.
    """
    found = clip.round_trip(sample) @ quantized.dequantize()
    return np.asarray(np.median((sample @ weight).astype(np.float64) - found, axis=0), dtype=np.float64)


def _relative_error(exact: Floats, found: Floats, *, correct_bias: bool) -> float:
    error = exact.astype(np.float64) - found
    if correct_bias:
        error -= np.median(error, axis=0)
    lost, whole = float(np.square(error).sum()), float(np.square(exact, dtype=np.float64).sum())
    return lost / whole if whole else 0.0 if lost == 0.0 else float("inf")


def _absmax(activation: Activation) -> Range:
    return Range(min(0.0, float(activation.low.min())), max(0.0, float(activation.high.max())))


def _within(activation: Activation, low: float, high: float) -> Range:
    """The part of what was seen that lies within these bounds and 0; all of it where that part is empty."""
    widest = _absmax(activation)
    low, high = max(widest.low, min(low, 0.0)), min(widest.high, max(high, 0.0))
    return Range(low, high) if low < high else widest


def _percentile(activation: Activation, percentile: float) -> Range:
    if not 0.0 < percentile <= 100.0:
        raise ValueError(f"percentile is {percentile}, not in (0, 100]")
    below = np.cumsum(activation.histogram)
    total = int(below[-1])
    cut = int(total * (100.0 - percentile) / 200.0)
    edges = _edges(activation)
    first = int(np.searchsorted(below, cut, side="right"))
    last = int(np.searchsorted(below, total - cut, side="left"))
    return _within(activation, float(edges[first]), float(edges[last + 1]))


def _mse(activation: Activation) -> Range:
    widest = _absmax(activation)
    edges = _edges(activation)
    share = activation.histogram / activation.histogram.sum()
    centres = (edges[:-1] + edges[1:]) / 2
    lows = np.unique(np.clip(edges, widest.low, 0.0))
    highs = np.unique(np.clip(edges, 0.0, widest.high))
    cut_low, out_low = _cut(-centres, share, -lows)
    cut_high, out_high = _cut(centres, share, highs)
    inside = 1.0 - out_low[:, None] - out_high[None, :]
    width = highs[None, :] - lows[:, None]
    cost = cut_low[:, None] + cut_high[None, :] + inside * np.square(width / ACTIVATION_STEPS) / 12
    cost[width <= 0] = np.inf
    row, column = np.unravel_index(int(np.argmin(cost)), cost.shape)
    return Range(float(lows[row]), float(highs[column]))


def _cut(centres: Doubles, share: Doubles, limits: Doubles) -> tuple[Doubles, Doubles]:
    """Expected squared distance by which values exceed each limit, and the share of values that do."""
    order = np.argsort(centres)
    first = np.searchsorted(centres[order], limits, side="right")
    powers = np.stack([np.ones_like(centres), centres, np.square(centres)])[:, order] * share[order]
    # Sums of p, p x and p x^2 over the bins from each one on; none beyond the last.
    above = np.append(np.cumsum(powers[:, ::-1], axis=1)[:, ::-1], np.zeros((3, 1)), axis=1)[:, first]
    squares = above[2] - 2 * limits * above[1] + np.square(limits) * above[0]
    return np.maximum(squares, 0.0), above[0]


def _entropy(activation: Activation) -> Range:
    """Clips at +-t for each bin edge t with 256 bins and half the values inside; keeps the clip of least divergence."""
    histogram = activation.histogram.astype(np.float64)
    half_the_values = histogram.sum() / 2
    middle = histogram.size // 2
    filled = np.flatnonzero(histogram)
    first, last = min(int(filled[0]), middle), max(int(filled[-1]) + 1, middle)
    edges = _edges(activation)
    best, least = _absmax(activation), np.inf
    for reach in range(1, max(middle - first, last - middle) + 1):
        start, stop = max(first, middle - reach), min(last, middle + reach)
        # Where nearly all is clipped, both forms are one full bin: equal, and useless.
        if stop - start < _LEVELS or histogram[start:stop].sum() < half_the_values:
            continue
        divergence = _divergence(histogram, start, stop)
        if divergence <= least:
            least, best = divergence, _within(activation, float(edges[start]), float(edges[stop]))
    return best


def _divergence(histogram: Doubles, start: int, stop: int) -> float:
    """KL divergence of the clipped histogram from its form with 256 levels."""
    window = histogram[start:stop]
    reference = window.copy()
    reference[0] += histogram[:start].sum()
    reference[-1] += histogram[stop:].sum()
    level = np.arange(window.size) * _LEVELS // window.size
    occupied = window > 0
    mass = np.bincount(level, weights=window, minlength=_LEVELS)
    bins = np.bincount(level, weights=occupied, minlength=_LEVELS)
    coarse = np.where(occupied, mass[level] / np.maximum(bins[level], 1.0), 0.0)
    p = reference / reference.sum()
    # A bin that is filled by clipping alone has no level of its own: it counts as half a value, not as impossible.
    q = np.maximum(coarse, 0.5) / max(coarse.sum(), 1.0)
    seen = p > 0
    return float((p[seen] * np.log(p[seen] / q[seen])).sum())


def _edges(activation: Activation) -> Doubles:
    return np.linspace(-activation.reach, activation.reach, activation.histogram.size + 1)
