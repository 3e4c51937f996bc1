"""The arithmetic of int8 inference in plain arrays: quantizers, the oracle of the emitted operators, error bounds.

Weights are quantized symmetrically, one scale for each output channel, and activations asymmetrically with one scale
for the whole tensor, found while the model runs. That is what ONNX Runtime's integer kernels compute: uint8 activations
times int8 weights, summed in int32 (Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", 2018; per-channel weights: Krishnamoorthi, "Quantizing deep convolutional networks
for efficient inference", 2018).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]
Int8s = NDArray[np.int8]

FULL_RANGE = 127
"""Largest magnitude of an int8 weight. -128 is never used, so that the range is symmetric and zero is exact."""

REDUCED_RANGE = 64
"""Largest magnitude of a 7-bit weight.

Without VNNI, the AVX2 and AVX-512 kernels add two uint8 x int8 products in a saturating int16 (``vpmaddubsw``):
2 * 255 * 127 = 64770 overflows 32767 and is silently cut, 2 * 255 * 64 = 32640 is not.
"""

ACTIVATION_STEPS = 255
"""Steps of a uint8 activation between its smallest and its largest value."""

_SMALLEST_SCALE = np.float32(np.finfo(np.float32).tiny)
"""A subnormal scale would lose the precision that the error bound promises."""


@dataclass(frozen=True)
class Quantized:
    """Integers and their scale.

    Attributes:
        values: int8, of the shape of the floats they stand for.
        scale: float32, broadcastable to ``values`` against the last axes: [N] for columns, [V, 1] for rows.
    """

    values: Int8s
    scale: Floats

    def dequantize(self) -> Floats:
        """The floats that the integers stand for; ``values * scale`` in float32."""
        return self.values.astype(np.float32) * self.scale


@dataclass(frozen=True)
class DynamicActivation:
    """What ``DynamicQuantizeLinear`` returns.

    Attributes:
        values: uint8, of the shape of the input.
        scale: float32 [], the step.
        zero_point: uint8 [], the integer that stands for 0.0.
    """

    values: NDArray[np.uint8]
    scale: np.float32
    zero_point: np.uint8

    def dequantize(self) -> Floats:
        """The floats that the integers stand for."""
        return (self.values.astype(np.int32) - np.int32(self.zero_point)).astype(np.float32) * self.scale


def quantize_columns(weight: Floats, *, reduce_range: bool = False) -> Quantized:
    """Quantize the weight of a linear operator, one scale for each output channel.

    Every element differs from its float by at most half of its column's scale.

    Args:
        weight: float32 [K, N], finite.
        reduce_range: Use 7-bit weights, see `REDUCED_RANGE`.

    Returns:
        int8 [K, N] in C order and float32 [N].
    """
    return _quantize(weight, axis=0, largest=REDUCED_RANGE if reduce_range else FULL_RANGE, keepdims=False)


def quantize_rows(table: Floats) -> Quantized:
    """Quantize an embedding table, one scale for each row. Rows are only looked up, so 8 bits are always safe.

    Args:
        table: float32 [V, D], finite.

    Returns:
        int8 [V, D] and float32 [V, 1].
    """
    return _quantize(table, axis=1, largest=FULL_RANGE, keepdims=True)


def quantize_dynamic(x: Floats) -> DynamicActivation:
    """The float oracle of ONNX ``DynamicQuantizeLinear`` (opset 11) as ONNX Runtime computes it.

    The range is widened to contain 0; ties round to even. An input of zeros, for which the operator's text divides
    by 0, gets the scale 1, as in ONNX Runtime.

    Args:
        x: float32 of any shape, not empty, finite; its range 0 or at least 1e-30 (a subnormal step keeps no promise).
    """
    low = np.float32(min(0.0, float(x.min())))
    high = np.float32(max(0.0, float(x.max())))
    scale = np.float32(1.0) if low == high else np.float32((high - low) / np.float32(ACTIVATION_STEPS))
    zero_point = np.uint8(np.clip(np.rint(-low / scale), 0, ACTIVATION_STEPS))
    values = np.clip(np.rint(x / scale) + np.float32(zero_point), 0, ACTIVATION_STEPS).astype(np.uint8)
    return DynamicActivation(values, scale, zero_point)


def dynamic_matmul(x: Floats, weight: Quantized) -> Floats:
    """The oracle of what `DynamicInt8` emits for ``x @ W``: integer products, then both scales at once.

    Args:
        x: float32 [..., K].
        weight: int8 [K, N] and float32 [N].

    Returns:
        float32 [..., N].
    """
    activation = quantize_dynamic(x)
    # float64 holds these integers exactly (K * 255 * 127 < 2**53) and multiplies far faster than numpy's integers.
    centred = activation.values.astype(np.float64) - float(activation.zero_point)
    products = (centred @ weight.values.astype(np.float64)).astype(np.int32)
    return products.astype(np.float32) * (activation.scale * weight.scale)


def dynamic_matmul_bound(x: Floats, weight: Quantized) -> Doubles:
    """The largest possible difference between ``x @ W`` and `dynamic_matmul`, element by element.

    From ``xW - x'W' = x(W - W') + (x - x')W'`` with each rounding at most half a step, plus the float32 roundings of
    the conversion from int32 and of the two multiplications.

    Args:
        x: float32 [..., K].
        weight: int8 [K, N] and float32 [N]: the quantized form of W.

    Returns:
        float64 [..., N].
    """
    scale = weight.scale.astype(np.float64)
    quantized = np.abs(weight.values.astype(np.float64)) * scale
    step = float(quantize_dynamic(x).scale)
    magnitude = np.abs(x.astype(np.float64))
    from_weights = magnitude.sum(-1, keepdims=True) * scale / 2
    from_activations = step / 2 * quantized.sum(0)
    float_error = 4 * float(np.finfo(np.float32).eps) * (magnitude + step) @ quantized
    # x/step is itself rounded to float32 before it is rounded to an integer, so a step may be missed by a hair.
    return np.asarray((from_weights + from_activations) * (1 + 2.0**-14) + float_error, dtype=np.float64)


def dynamic_matmul_deviation(x: Floats, weight: Quantized) -> Doubles:
    """The standard deviation to expect of that difference: roundings are uniform in a step and independent.

    A uniform error of width s has the variance s^2 / 12, so this is a factor of about sqrt(3 K) below the bound.

    Args:
        x: float32 [..., K].
        weight: int8 [K, N] and float32 [N].

    Returns:
        float64 [..., N].
    """
    scale = weight.scale.astype(np.float64)
    squares = np.square(weight.values.astype(np.float64)).sum(0) * scale**2
    step = float(quantize_dynamic(x).scale)
    energy = np.square(x.astype(np.float64)).sum(-1, keepdims=True)
    return np.asarray(np.sqrt((energy * scale**2 + step**2 * squares) / 12), dtype=np.float64)


def _quantize(array: Floats, *, axis: int, largest: int, keepdims: bool) -> Quantized:
    # One float32 temporary of the size of the array, no more: embedding tables are the largest tensors of a model.
    peak = np.maximum(array.max(axis=axis, keepdims=True), -array.min(axis=axis, keepdims=True))
    scale = np.maximum(peak / np.float32(largest), _SMALLEST_SCALE)
    scale[peak == 0] = 1.0
    scaled = array / scale
    np.rint(scaled, out=scaled)
    np.clip(scaled, -largest, largest, out=scaled)
    values = np.ascontiguousarray(scaled.astype(np.int8))
    return Quantized(values, np.ascontiguousarray(scale if keepdims else scale.squeeze(axis)))
