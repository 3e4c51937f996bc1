"""The arithmetic of int8 against plain float oracles and against ONNX Runtime's own operators."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from encoder_graphs import ALL, DISABLED, FLOAT, Builder, session
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from passes.quantize.arithmetic import (
    FULL_RANGE,
    REDUCED_RANGE,
    Quantized,
    dynamic_matmul,
    dynamic_matmul_bound,
    dynamic_matmul_deviation,
    quantize_columns,
    quantize_dynamic,
    quantize_rows,
)

QUICK = settings(max_examples=40, deadline=None)
EPS = float(np.finfo(np.float32).eps)
NUMBERS = (st.floats(-1e4, 1e4, width=32) | st.floats(-(2.0**-10), 2.0**-10, width=32)).map(
    lambda x: x if abs(x) > 1e-30 else 0.0  # a step near the smallest float has a test of its own
)
MATRICES = arrays(np.float32, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=24), elements=NUMBERS)


@QUICK
@given(MATRICES, st.booleans())
def test_columns_are_within_half_a_step(weight, reduce_range):
    quantized = quantize_columns(weight, reduce_range=reduce_range)
    largest = REDUCED_RANGE if reduce_range else FULL_RANGE
    assert quantized.values.dtype == np.int8
    assert quantized.values.shape == weight.shape
    assert quantized.scale.dtype == np.float32
    assert quantized.scale.shape == weight.shape[1:]
    assert np.abs(quantized.values.astype(int)).max() <= largest
    error = np.abs(weight.astype(np.float64) - quantized.values * quantized.scale.astype(np.float64))
    # w / scale is rounded to float32 before it is rounded to an integer: at most largest * eps of a step more.
    assert (error <= quantized.scale * (0.5 + largest * EPS)).all()


@QUICK
@given(MATRICES)
def test_the_largest_of_a_column_uses_the_whole_range(weight):
    quantized = quantize_columns(weight)
    peaks = np.abs(weight).max(0)
    full = np.abs(quantized.values.astype(int)).max(0) == FULL_RANGE
    assert (full | (peaks < FULL_RANGE * np.finfo(np.float32).tiny)).all()


@QUICK
@given(MATRICES)
def test_quantizing_again_gives_the_same_integers(weight):
    once = quantize_columns(weight)
    assert (quantize_columns(once.dequantize()).values == once.values).all()


@QUICK
@given(MATRICES)
def test_rows_are_columns_of_the_transpose(table):
    rows, columns = quantize_rows(table), quantize_columns(np.ascontiguousarray(table.T))
    assert rows.scale.shape == (len(table), 1)
    assert (rows.values == columns.values.T).all()
    assert (rows.scale[:, 0] == columns.scale).all()


def test_a_column_of_zeros_stays_zero_and_has_a_harmless_scale():
    weight = np.zeros((4, 2), np.float32)
    weight[:, 1] = 1.0
    quantized = quantize_columns(weight)
    assert quantized.scale.tolist() == [1.0, np.float32(1 / 127)]
    assert (quantized.values[:, 0] == 0).all()


def test_subnormal_weights_keep_the_bound():
    weight = np.array([[1e-44], [3e-40]], np.float32)
    quantized = quantize_columns(weight)
    assert quantized.scale[0] == np.finfo(np.float32).tiny
    assert (quantized.values == 0).all()


@pytest.mark.parametrize(("largest", "fits"), [(FULL_RANGE, False), (REDUCED_RANGE, True)])
def test_the_reduced_range_is_what_a_pair_of_products_in_int16_can_hold(largest, fits):
    assert (2 * 255 * largest <= np.iinfo(np.int16).max) is fits


@QUICK
@given(arrays(np.float32, array_shapes(max_dims=3, max_side=20), elements=NUMBERS))
def test_dynamic_activations_are_within_half_a_step(x):
    quantized = quantize_dynamic(x)
    error = np.abs(x.astype(np.float64) - quantized.dequantize())
    assert (error <= quantized.scale * (0.5 + 3 * 255 * EPS)).all()
    assert quantized.dequantize()[x == 0].tolist() == [0.0] * int((x == 0).sum())


@cache
def _operator(name: str, level: ort.GraphOptimizationLevel) -> ort.InferenceSession:
    """A session around one DynamicQuantizeLinear, or around the chain that the pass emits."""
    graph = Builder()
    x = graph.input("x", FLOAT, ["m", "k"])
    outputs = [ir.Value(name=n) for n in ("y", "scale", "zero")]
    types = (ir.DataType.UINT8, FLOAT, ir.DataType.UINT8)
    for value, dtype in zip(outputs, types, strict=True):
        value.dtype = dtype
    outputs[0].shape, outputs[1].shape, outputs[2].shape = ir.Shape(["m", "k"]), ir.Shape([]), ir.Shape([])
    graph.graph.append(ir.node("DynamicQuantizeLinear", [x], outputs=outputs))
    if name == "linear":
        return session(graph.model(*outputs), level)
    weight = graph.input("w", ir.DataType.INT8, ["k", "n"])
    step = graph.input("s", FLOAT, ["n"])
    product = graph.add("MatMulInteger", outputs[0], weight, outputs[2], name="product", dtype=ir.DataType.INT32)
    floats = graph.add("Cast", product, name="floats", to=FLOAT)
    scales = graph.add("Mul", outputs[1], step, name="scales")
    return session(graph.model(graph.add("Mul", floats, scales, name="out"), shape=["m", "n"]), level)


@QUICK
@given(arrays(np.float32, st.tuples(st.integers(1, 5), st.integers(1, 40)), elements=NUMBERS))
def test_the_oracle_of_dynamic_quantization_is_what_onnxruntime_computes(x):
    values, scale, zero = _operator("linear", ALL).run(None, {"x": x})
    ours = quantize_dynamic(x)
    assert zero == ours.zero_point
    assert scale == ours.scale
    assert (values == ours.values).all()


@st.composite
def _products(draw):
    k = draw(st.integers(1, 48))
    numbers = NUMBERS.map(lambda number: number / 1024)
    x = draw(arrays(np.float32, (draw(st.integers(1, 4)), k), elements=numbers))
    return x, draw(arrays(np.float32, (k, draw(st.integers(1, 8))), elements=numbers))


@QUICK
@given(_products(), st.booleans())
def test_the_bound_holds_for_every_element(product, reduce_range):
    x, weight = product
    quantized = quantize_columns(weight, reduce_range=reduce_range)
    error = np.abs(dynamic_matmul(x, quantized) - x.astype(np.float64) @ weight.astype(np.float64))
    assert (error <= dynamic_matmul_bound(x, quantized)).all()


@QUICK
@given(_products())
def test_onnxruntime_stays_within_the_bound_at_every_level(product):
    x, weight = product
    quantized = quantize_columns(weight)
    exact = x.astype(np.float64) @ weight.astype(np.float64)
    bound = dynamic_matmul_bound(x, quantized)
    for level in (ALL, DISABLED):
        feeds = {"x": x, "w": quantized.values, "s": quantized.scale}
        assert (np.abs(_operator("chain", level).run(None, feeds)[0] - exact) <= bound).all()


@pytest.mark.parametrize("reduce_range", [False, True])
def test_the_expected_deviation_is_what_random_matrices_show(reduce_range):
    rng = np.random.default_rng(3)
    x = rng.normal(size=(64, 384)).astype(np.float32)
    weight = rng.normal(size=(384, 128)).astype(np.float32)
    quantized = quantize_columns(weight, reduce_range=reduce_range)
    error = dynamic_matmul(x, quantized) - x.astype(np.float64) @ weight.astype(np.float64)
    ratio = np.sqrt(np.mean(error**2) / np.mean(dynamic_matmul_deviation(x, quantized) ** 2))
    # 8192 errors: their root mean square is known to about 1/sqrt(2 * 8192) = 0.8 %, correlations make it more.
    assert 0.95 < ratio < 1.05


def test_one_bit_less_doubles_the_error_of_the_weights():
    weight = np.random.default_rng(4).normal(size=(256, 64)).astype(np.float32)

    def error(quantized: Quantized) -> float:
        return float(np.sqrt(np.mean((quantized.dequantize() - weight) ** 2)))

    ratio = error(quantize_columns(weight, reduce_range=True)) / error(quantize_columns(weight))
    assert ratio == pytest.approx(FULL_RANGE / REDUCED_RANGE, rel=0.03)
