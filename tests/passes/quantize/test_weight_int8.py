"""weight-int8: structure, numbers in a real ONNX Runtime, refusals, idempotence."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from encoder_graphs import ALL, DISABLED, FLOAT, SCOPES, Builder, Encoder, feeds, node_named, operators, relative, run
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from artifacts.errors import UsageError
from artifacts.target import CPU, CUDA, OPENVINO
from passes.base import Context, Effect, Pass, Purpose
from passes.grammar import check, signature
from passes.pipeline import Pipeline, parse
from passes.quantize.blocks import QuantizedBlocks, quantize_blocks
from passes.quantize.weight_int8 import WeightInt8
from passes.sites import linear_sites

HERE = Context(CPU)
RNG = np.random.default_rng(13)
WEIGHT = (RNG.normal(size=(72, 24)) + 0.5).astype(np.float32)
BIAS = RNG.normal(size=24).astype(np.float32)
X = RNG.normal(size=(40, 72)).astype(np.float32)
EPS = float(np.finfo(np.float32).eps)
MATRICES = arrays(
    np.float32,
    array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=40),
    elements=st.floats(-100, 100, width=32).map(lambda x: x if abs(x) > 1e-30 else 0.0),
)


def matmul_model() -> ir.Model:
    graph = Builder()
    x = graph.input("x", FLOAT, ["m", 72])
    product = graph.add("MatMul", x, graph.constant("w", WEIGHT), name="product", path="encoder/encoder.dense")
    return graph.model(graph.add("Add", product, graph.constant("b", BIAS), name="y"), shape=["m", 24])


def gemm_model(*, transposed: bool = False, bias: np.ndarray = BIAS) -> ir.Model:
    graph = Builder()
    x = graph.input("x", FLOAT, ["m", 72])
    weight = graph.constant("w", np.ascontiguousarray(WEIGHT.T) if transposed else WEIGHT)
    y = graph.add("Gemm", x, weight, graph.constant("b", bias), name="y", transB=int(transposed))
    return graph.model(y, shape=["m", 24])


MODELS = [matmul_model, gemm_model, lambda: gemm_model(transposed=True)]


def steps(weight: np.ndarray, block: int, *, symmetric: bool) -> np.ndarray:
    """The step of each element of a weight, [K, N], written down without the code under test."""
    result = np.empty(weight.shape)
    for start in range(0, len(weight), block):
        part = weight[start : start + block].astype(np.float64)
        low, high = np.minimum(part.min(0), 0), np.maximum(part.max(0), 0)
        if start + block > len(weight):
            assert (low <= 0).all()  # the padding with zeros changes nothing: 0 is in every range
        result[start : start + block] = np.maximum(-low, high) / 127 if symmetric else (high - low) / 255
    return result


def rounded_input(x: np.ndarray, block: int) -> np.ndarray:
    """What accuracy_level 4 makes of the input: symmetric int8, one scale for each block of each row."""
    result = np.zeros(x.shape)
    for start in range(0, x.shape[1], block):
        part = x[:, start : start + block]
        peak = np.abs(part).max(1, keepdims=True)
        result[:, start : start + block] = np.rint(part * (127 / peak)) * (peak.astype(np.float64) / 127)
    return result


@settings(max_examples=30, deadline=None)
@given(MATRICES, st.sampled_from([16, 32]), st.booleans())
def test_blocks_are_within_half_a_step(weight, block, symmetric):
    made = quantize_blocks(weight, block, symmetric=symmetric)
    rows, columns = weight.shape
    assert made.values.shape == (columns, -(-rows // block), block)
    assert (made.values.dtype, made.scale.dtype) == (np.uint8, np.float32)
    assert made.scale.shape == made.values.shape[:2]
    assert (made.zero_point is None) == symmetric
    error = np.abs(made.dequantize(rows).astype(np.float64) - weight)
    # The quotient is rounded to float32 before it is rounded to an integer: 255 * eps of a step more.
    assert (error <= steps(weight, block, symmetric=symmetric) * (0.5 + 512 * EPS)).all()
    assert (made.dequantize(rows)[weight == 0] == 0).all()


def test_zero_points_use_the_whole_range():
    made = quantize_blocks(np.abs(WEIGHT), 32, symmetric=False)
    assert made.zero_point is not None
    assert (made.zero_point == 0).all()
    assert (made.values.max(-1) == 255).all()
    assert (quantize_blocks(-np.abs(WEIGHT), 32, symmetric=False).zero_point == 255).all()
    assert quantize_blocks(np.zeros((16, 2), np.float32), 16).scale.tolist() == [[1.0], [1.0]]


def test_without_zero_points_the_middle_stands_for_zero():
    blocks = QuantizedBlocks(np.full((1, 1, 2), 129, np.uint8), np.full((1, 1), 0.5, np.float32), None)
    assert blocks.dequantize(2).tolist() == [[0.5], [0.5]]


def test_it_is_a_pass():
    assert isinstance(WeightInt8(), Pass)
    assert (WeightInt8.name, WeightInt8.effect, WeightInt8.purpose) == ("weight-int8", Effect.LOSSY, Purpose.SIZE)


@pytest.mark.parametrize("symmetric", [True, False])
def test_structure(symmetric):
    model = matmul_model()
    before = signature(model)
    outcome = WeightInt8(symmetric=symmetric).run(model, HERE)
    check(model, CPU)
    assert (outcome.changed, outcome.refused) == (1, ())
    assert signature(model) == before
    (product,) = model.graph
    assert (product.op_type, product.domain) == ("MatMulNBits", "com.microsoft")
    initializers = model.graph.initializers
    zero = None if symmetric else initializers["w_zero_point"]
    expected = (model.graph.inputs[0], initializers["w_uint8"], initializers["w_scale"], zero, None)
    assert product.inputs == (*expected, initializers["y_bias"])
    assert {name: value.as_int() for name, value in product.attributes.items()} == {
        "K": 72, "N": 24, "bits": 8, "block_size": 32, "accuracy_level": 4
    }  # fmt: skip
    assert tuple(initializers["w_uint8"].shape) == (24, 3, 32)
    assert tuple(initializers["w_scale"].shape) == (24, 3)
    assert len(initializers) == 3 + (not symmetric)
    assert product.outputs[0] is model.graph.outputs[0]
    assert product.metadata_props[SCOPES]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("level", [ALL, DISABLED])
def test_numbers_are_those_of_the_oracle(make, symmetric, block, level):
    model = make()
    assert WeightInt8(block, symmetric=symmetric).run(model, HERE).changed == 1
    y = run(model, {"x": X}, level)
    weight = quantize_blocks(WEIGHT, block, symmetric=symmetric).dequantize(72).astype(np.float64)
    rounding = 72 * EPS * (np.abs(X) @ np.abs(WEIGHT) + np.abs(BIAS))
    # accuracy_level 4 allows int8 inputs and does not demand them: a CPU without such a kernel keeps them.
    as_int8 = np.abs(y - (rounded_input(X, block) @ weight + BIAS)) <= rounding
    as_float = np.abs(y - (X @ weight + BIAS)) <= rounding
    assert as_int8.all() or as_float.all()
    # 960 independent errors, each rounding uniform in its step: their root mean square lies near the expectation.
    variance = np.square(X.astype(np.float64)) @ np.square(steps(WEIGHT, block, symmetric=symmetric)) / 12
    if as_int8.all():
        peaks = np.concatenate([
            np.broadcast_to(np.abs(part).max(1, keepdims=True), part.shape)
            for part in (X[:, start : start + block] for start in range(0, 72, block))
        ], 1)  # fmt: skip
        variance += np.square(peaks / 127.0) @ np.square(weight) / 12
    error = y - (X.astype(np.float64) @ WEIGHT + BIAS)
    assert 0.75 < np.sqrt(np.mean(error**2) / np.mean(variance)) < 1.25


def test_a_bias_for_each_row_stays_an_add():
    rows = RNG.normal(size=(40, 1)).astype(np.float32)
    model = gemm_model(bias=rows)
    WeightInt8().run(model, HERE)
    check(model, CPU)
    add = node_named(model, "y")
    assert (add.op_type, add.inputs[1]) == ("Add", model.graph.initializers["b"])
    expected = X.astype(np.float64) @ WEIGHT + rows
    assert relative(run(model, {"x": X}), expected) < 0.02


def test_a_shared_weight_is_quantized_once():
    graph = Builder()
    x = graph.input("x", FLOAT, ["m", 72])
    square = graph.constant("w", (RNG.normal(size=(72, 72)) / 8).astype(np.float32))
    first = graph.add("MatMul", x, square, name="first")
    model = graph.model(graph.add("Gemm", first, square, name="second"), shape=["m", 72])
    assert WeightInt8().run(model, HERE).changed == 2
    check(model, CPU)
    assert sorted(model.graph.initializers) == ["w_scale", "w_uint8"]


@pytest.mark.parametrize("fused", [False, True])
def test_numbers_of_a_whole_encoder(fused):
    layers = 2
    reference = run(Encoder(layers=layers, fused=fused).build(), feeds())
    model = Encoder(layers=layers, fused=fused).build()
    assert WeightInt8().run(model, HERE).changed == 6 * layers
    check(model, CPU)
    # 32 values of a normal distribution reach 2.1 deviations: weights and inputs alike, 6 products a layer.
    tolerance = np.sqrt(2 * (2.1 / 127) ** 2 / 12 * 6 * layers) * 1.5
    for level in (ALL, DISABLED):
        assert tolerance / 8 < relative(run(model, feeds(), level), reference) < tolerance


@pytest.mark.parametrize("target", [OPENVINO, CUDA], ids=lambda target: target.name)
def test_other_targets_are_refused(target):
    outcome = WeightInt8().run(matmul_model(), Context(target))
    assert (outcome.changed, len(outcome.refused)) == (0, 1)
    assert target.provider in outcome.refused[0].reason


def test_a_weight_smaller_than_a_block_is_refused():
    model = matmul_model()
    outcome = WeightInt8(128).run(model, HERE)
    assert outcome.changed == 0
    assert [refusal.reason for refusal in outcome.refused] == ["a weight of 72 rows is smaller than a block of 128"]
    assert operators(model) == {"MatMul": 1, "Add": 1}
    assert dict(model.graph.opset_imports) == {"": 21, "com.microsoft": 1}


def test_skip_and_only():
    model = Encoder(layers=2).build()
    outcome = WeightInt8(only=("encoder.layer.1.*",), skip=("*.key",)).run(model, HERE)
    assert outcome.changed == 5
    assert [site.path for site in linear_sites(model) if "layer.1" in site.path] == ["encoder.layer.1.key"]
    assert [refusal.reason for refusal in outcome.refused] == ["encoder.layer.1.key is skipped by '*.key'"]


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_second_run_changes_nothing(symmetric):
    model = Encoder().build()
    first = WeightInt8(symmetric=symmetric, skip=("*.layer.0.query",)).run(model, HERE)
    before = ir.to_proto(model).SerializeToString()
    second = WeightInt8(symmetric=symmetric, skip=("*.layer.0.query",)).run(model, HERE)
    assert (second.changed, second.refused) == (0, first.refused)
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize("item", [WeightInt8(), WeightInt8(64, False, ("a.*",), ("b", "c d"))], ids=str)
def test_the_text_form_reads_back(item):
    pipeline = Pipeline((item,))
    assert parse(str(pipeline)) == pipeline


def test_a_block_size_without_kernels_is_refused():
    with pytest.raises(UsageError, match="block_size is 48, not one of 16, 32, 64, 128, 256"):
        parse("weight-int8(block_size=48)")
