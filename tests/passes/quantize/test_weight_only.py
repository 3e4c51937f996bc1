"""weight-only: structure, packing and numbers against the kernels of a real ONNX Runtime, refusals, idempotence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest
from encoder_graphs import ALL, DISABLED, FLOAT, Builder, Encoder, feeds, operators, relative, run

from artifacts.errors import UsageError
from artifacts.target import CPU, CUDA
from passes.base import Context, Effect, Pass, Purpose
from passes.grammar import check, signature
from passes.pipeline import Pipeline, parse
from passes.quantize.blocks import Grid, pack
from passes.quantize.methods import Method, round_weight
from passes.quantize.weight_only import WeightOnly
from passes.sites import linear_sites
from passes.statistics import Moments

HERE = Context(CPU)
RNG = np.random.default_rng(13)
WEIGHT = (RNG.normal(size=(72, 24)) + 0.5).astype(np.float32)
BIAS = RNG.normal(size=24).astype(np.float32)
X = RNG.normal(size=(40, 72)).astype(np.float32)
EPS = float(np.finfo(np.float32).eps)


def model_of(weight: np.ndarray = WEIGHT, *, transposed: bool = False) -> ir.Model:
    rows, columns = weight.shape
    graph = Builder()
    x = graph.input("x", FLOAT, ["m", rows])
    if transposed:
        held = graph.constant("w", np.ascontiguousarray(weight.T))
        return graph.model(
            graph.add("Gemm", x, held, graph.constant("b", BIAS), name="y", transB=1), shape=["m", columns]
        )
    product = graph.add("MatMul", x, graph.constant("w", weight), name="product", path="decoder/decoder.dense")
    bias = graph.constant("b", np.resize(BIAS, columns))
    return graph.model(graph.add("Add", product, bias, name="y"), shape=["m", columns])


def rounded_input(x: np.ndarray, block: int) -> np.ndarray:
    """What accuracy_level 4 makes of the input: symmetric int8, one scale for each block of each row."""
    result = np.zeros(x.shape)
    for start in range(0, x.shape[1], block):
        part = x[:, start : start + block]
        peak = np.abs(part).max(1, keepdims=True)
        result[:, start : start + block] = np.rint(part * (127 / peak)) * (peak.astype(np.float64) / 127)
    return result


def test_it_is_a_pass():
    assert isinstance(WeightOnly(), Pass)
    assert (WeightOnly.name, WeightOnly.effect, WeightOnly.purpose) == ("weight-only", Effect.LOSSY, Purpose.SIZE)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_first_code_lies_in_the_lowest_bits(bits):
    codes = (np.arange(1, 8) % (1 << bits)).astype(np.uint8)[None]
    each = 8 // bits
    expected = [
        sum(int(code) << (bits * place) for place, code in enumerate(codes[0, start : start + each]))
        for start in range(0, 7, each)
    ]
    assert pack(codes, bits).tolist() == [expected]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_structure(bits, symmetric):
    model = model_of()
    before = signature(model)
    outcome = WeightOnly(bits, symmetric=symmetric).run(model, HERE)
    check(model, CPU)
    assert (outcome.changed, outcome.refused) == (1, ())
    assert signature(model) == before
    (product,) = model.graph
    assert (product.op_type, product.domain) == ("MatMulNBits", "com.microsoft")
    initializers = model.graph.initializers
    codes = initializers["w_uint8" if bits == 8 else "w_int4"]
    zero = None if symmetric else initializers["w_zero_point"]
    expected = (model.graph.inputs[0], codes, initializers["w_scale"], zero, None, initializers["y_bias"])
    assert product.inputs == expected
    assert {name: value.as_int() for name, value in product.attributes.items()} == {
        "K": 72, "N": 24, "bits": bits, "block_size": 32, "accuracy_level": 4
    }  # fmt: skip
    assert tuple(codes.shape) == (24, 3, 32 * bits // 8)
    assert tuple(initializers["w_scale"].shape) == (24, 3)
    if zero is not None:
        assert tuple(zero.shape) == (24, -(-3 * bits // 8))
    assert product.outputs[0] is model.graph.outputs[0]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("level", [ALL, DISABLED])
@pytest.mark.parametrize("accuracy", [0, 1, 4])
def test_the_kernel_reads_4_bits_as_the_oracle(transposed, symmetric, block, level, accuracy):
    model = model_of(transposed=transposed)
    item = WeightOnly(4, block, symmetric, accuracy_level=accuracy)
    assert item.run(model, HERE).changed == 1
    y = run(model, {"x": X}, level)
    weight = round_weight(WEIGHT, Grid(4, block, symmetric), Method.MSE).dequantize(72).astype(np.float64)
    rounding = 72 * EPS * (np.abs(X) @ np.abs(weight) + np.abs(BIAS))
    as_float = (np.abs(y - (X @ weight + BIAS)) <= rounding).all()
    if accuracy < 4:
        assert as_float
    else:
        # Int8 inputs are allowed and not demanded: a CPU without such a kernel keeps floats.
        assert as_float or (np.abs(y - (rounded_input(X, block) @ weight + BIAS)) <= rounding).all()


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("level", [ALL, DISABLED])
def test_the_kernels_read_2_and_8_bits_as_the_oracle(bits, symmetric, block, level):
    model = model_of()
    assert WeightOnly(bits, block, symmetric).run(model, HERE).changed == 1
    y = run(model, {"x": X}, level)
    weight = round_weight(WEIGHT, Grid(bits, block, symmetric), Method.MSE).dequantize(72).astype(np.float64)
    rounding = 72 * EPS * (np.abs(X) @ np.abs(weight) + np.abs(BIAS))
    as_float = (np.abs(y - (X @ weight + BIAS)) <= rounding).all()
    assert as_float or (np.abs(y - (rounded_input(X, block) @ weight + BIAS)) <= rounding).all()


def test_numbers_of_a_whole_encoder():
    layers = 2
    reference = run(Encoder(layers=layers).build(), feeds())
    errors = {}
    for bits in (4, 8):
        model = Encoder(layers=layers).build()
        assert WeightOnly(bits, method="rtn").run(model, HERE).changed == 6 * layers
        check(model, CPU)
        errors[bits] = relative(run(model, feeds()), reference)
    # 32 values of a normal distribution reach 2.1 deviations, which 4 bits put on code 0: steps of 2.1 / 8, 6 products.
    tolerance = np.sqrt((2.1 / 8) ** 2 / 12 * 6 * layers) * 1.5
    assert tolerance / 8 < errors[4] < tolerance
    assert errors[8] < errors[4] / 8


@pytest.mark.parametrize("ordered", [False, True])
def test_gptq_loses_less_of_the_product(ordered, calibrated):
    mixing = RNG.normal(size=(72, 72)) * np.linspace(0.1, 3, 72)
    x = (RNG.normal(size=(300, 72)) @ mixing).astype(np.float32)
    expected = x.astype(np.float64) @ WEIGHT + BIAS
    errors = {}
    for method in ("rtn", "mse", "weighted-mse", "gptq"):
        model = model_of()
        item = WeightOnly(4, method=method, ordered=ordered and method == "gptq", accuracy_level=1)
        assert item.run(model, calibrated({"x": x})).changed == 1
        check(model, CPU)
        errors[method] = relative(run(model, {"x": x}), expected)
    assert errors["gptq"] < 0.75 * min(errors["rtn"], errors["mse"], errors["weighted-mse"])


def test_the_data_are_asked_once_of_the_graph_as_it_was(calibrated):
    seen = []
    lent = calibrated(feeds()).moments

    def moments(model: ir.Model, values: Sequence[ir.Value]) -> dict[str, Moments]:
        seen.append((operators(model)["MatMulNBits"], [value.name for value in values]))
        return lent(model, values)

    model = Encoder(layers=1).build()
    assert WeightOnly(method="gptq").run(model, Context(CPU, moments=moments)).changed == 6
    check(model, CPU)
    assert [(count, len(names)) for count, names in seen] == [(0, 4)]


def test_a_method_without_its_data_is_refused():
    model = model_of()
    outcome = WeightOnly(method="gptq").run(model, HERE)
    assert outcome.changed == 0
    assert [refusal.reason for refusal in outcome.refused] == ["gptq needs calibration data"]
    assert operators(model) == {"MatMul": 1, "Add": 1}


def test_a_weight_smaller_than_a_block_is_refused():
    model = model_of()
    outcome = WeightOnly(4, 128).run(model, HERE)
    assert outcome.changed == 0
    assert [refusal.reason for refusal in outcome.refused] == ["a weight of 72 rows is smaller than a block of 128"]
    assert operators(model) == {"MatMul": 1, "Add": 1}


def test_other_targets_are_refused():
    outcome = WeightOnly().run(model_of(), Context(CUDA))
    assert (outcome.changed, len(outcome.refused)) == (0, 1)


def test_precision_by_site_is_two_passes():
    model = Encoder(layers=2).build()
    pipeline = parse("weight-only(bits=8, only=[*.value, *.output]); weight-only(block_size=16, skip=[*.key])")
    outcomes = pipeline.run(model, HERE)
    assert [outcome.changed for _, outcome in outcomes] == [4, 6]
    check(model, CPU)
    assert [site.path for site in linear_sites(model)] == ["encoder.layer.0.key", "encoder.layer.1.key"]
    bits = [node.attributes["bits"].as_int() for node in model.graph if node.op_type == "MatMulNBits"]
    assert sorted(bits) == [4] * 6 + [8] * 4


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_second_run_changes_nothing(symmetric, calibrated):
    model = Encoder().build()
    item = WeightOnly(symmetric=symmetric, method="gptq", skip=("*.layer.0.query",))
    first = item.run(model, calibrated(feeds()))
    assert first.changed == 11
    before = ir.to_proto(model).SerializeToString()
    second = WeightOnly(symmetric=symmetric, skip=("*.layer.0.query",)).run(model, HERE)
    assert (second.changed, second.refused) == (0, first.refused)
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize("item", [WeightOnly(), WeightOnly(8, 64, False, "gptq", True, skip=("a",))], ids=str)
def test_the_text_form_reads_back(item):
    pipeline = Pipeline((item,))
    assert parse(str(pipeline)) == pipeline


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bits=3", "bits is 3, not one of 2, 4, 8"),
        ("block_size=48", "block_size is 48, not one of 16, 32, 64, 128, 256"),
        ("method=best", "method is 'best', not one of rtn, mse, weighted-mse, hqq, gptq"),
        ("method=mse, ordered=true", "ordered is of gptq, not of mse"),
        ("accuracy_level=2", "accuracy_level is 2, not one of 0, 1, 4"),
        ("bits=8, accuracy_level=0", "8 bits have a kernel at accuracy_level 4 only"),
        ("bits=2, accuracy_level=1", "2 bits have a kernel at accuracy_level 4 only"),
        ("bits=2, block_size=16", "2 bits have kernels for a block_size of 32, 64 and 128 only, not of 16"),
    ],
)
def test_impossible_options_are_refused(text, message):
    with pytest.raises(UsageError, match=message):
        parse(f"weight-only({text})")
