"""How far to move outlying channels of an activation into the weights before both are rounded to 8 bits. Plain arrays.

``x W = (x / s) (s W)`` for any ``s [K] > 0``: channels of x that are far larger than the others, and so cost all of
them their resolution, become smaller, and the rows of W that they meet become larger (SmoothQuant: Xiao et al.,
"SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", 2023, arXiv:2211.10438).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from passes.statistics import Activation

from .arithmetic import Doubles, Floats, quantize_columns
from .ranges import Range, output_error

GAIN = 0.1
"""Part of the error that must go away for smoothing to be worth it."""

_SMALLEST = 1e-4
"""A magnitude below this part of the largest counts as this: it keeps the factors finite and within float32."""


@dataclass(frozen=True)
class Choice:
    """How to smooth one activation.

    Attributes:
        strength: The exponent that was best; 0 where smoothing does not gain.
        factors: What to divide the channels by, float32 [K], of geometric mean 1; ones where the strength is 0.
        before: Error of the products as they are, as in `products_error`.
        after: Error of the smoothed products.
    """

    strength: float
    factors: Floats
    before: float
    after: float


def smoothing_factors(reach: Doubles, weight_reach: Doubles, strength: float) -> Floats:
    """``s_k = max|x_k|^a / max_n|W_kn|^(1 - a)`` (equation 4 of the paper), scaled to a geometric mean of 1.

    Strength a leaves ``(|x| |W|)^(1-a)`` in the activation and ``(|x| |W|)^a`` in the weights. The factors of strength
    b for these lead on to just what strength b makes of the original: what smoothing again can reach could be reached
    at once.

    Args:
        reach: Largest magnitude of each channel, float64 [K].
        weight_reach: Largest magnitude of each row of the weights that the channels meet, float64 [K].
        strength: The exponent a: 0 looks at the weights only, 1 at the activation only.

    Returns:
        float32 [K], positive and finite.
    """
    logarithms = strength * _logarithms(reach) - (1.0 - strength) * _logarithms(weight_reach)
    factors: Floats = np.exp(logarithms - logarithms.mean()).astype(np.float32)
    return factors


def products_error(activation: Activation, weights: Sequence[Floats], factors: Floats) -> float:
    """Relative error ``|x W - x' W'| / |x W|`` of the products of ``x / s`` with ``s W`` in 8 bits, summed over all W.

    The activation is uint8 with one asymmetric range, from the smallest to the largest value seen, the weights are int8
    with one scale for each output channel.

    Args:
        activation: What calibration saw of x; its sample is what is multiplied.
        weights: Each float32 [K, N].
        factors: s, float32 [K].
    """
    low = min(0.0, float((activation.low / factors).min()))
    high = max(0.0, float((activation.high / factors).max()))
    if low == high:
        return 0.0
    clip, sample = Range(low, high), activation.sample / factors
    errors = 0.0
    for weight in weights:
        scaled = weight * factors[:, None]
        errors += math.sqrt(output_error(sample, scaled, clip, quantize_columns(scaled)))
    return errors


def best_factors(activation: Activation, weights: Sequence[Floats], strengths: Sequence[float]) -> Choice:
    """The strength that leaves the smallest `products_error`, or 0 if that is not smaller by `GAIN`.

    Args:
        activation: What calibration saw of x [..., K].
        weights: All that x is multiplied with, each float32 [K, N].
        strengths: Exponents to try.
    """
    reach = np.maximum(np.abs(activation.low), np.abs(activation.high)).astype(np.float64)
    weight_reach = np.max([np.abs(weight).max(axis=1) for weight in weights], axis=0).astype(np.float64)
    ones = np.ones(len(reach), np.float32)
    before = products_error(activation, weights, ones)
    best = Choice(0.0, ones, before, before)
    for strength in strengths:
        factors = smoothing_factors(reach, weight_reach, strength)
        after = products_error(activation, weights, factors)
        if after < best.after:
            best = Choice(strength, factors, before, after)
    return best if best.after <= (1.0 - GAIN) * before else Choice(0.0, ones, before, before)


def _logarithms(magnitudes: Doubles) -> Doubles:
    largest = float(magnitudes.max())
    if largest == 0.0:
        return np.zeros(len(magnitudes))
    return np.asarray(np.log(np.maximum(magnitudes / largest, _SMALLEST)))
