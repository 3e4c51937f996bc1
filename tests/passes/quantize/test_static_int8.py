"""static-int8: structure for both targets, numbers in a real ONNX Runtime, refusals, idempotence."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import onnx_ir as ir
import pytest
from encoder_graphs import (
    ALL,
    DISABLED,
    FLOAT,
    SCOPES,
    Builder,
    Encoder,
    feeds,
    node_named,
    operators,
    relative,
    run,
)
from observing import Observer, activation

from artifacts.errors import UsageError
from artifacts.manifest import SessionOptions
from artifacts.target import CPU, CUDA, OPENVINO, OPENVINO_PROVIDER, TENSORRT, Target
from passes.base import Context, Effect, Pass, Purpose
from passes.grammar import check, signature
from passes.pipeline import Pipeline, parse
from passes.quantize.arithmetic import quantize_columns
from passes.quantize.dynamic_int8 import DynamicInt8
from passes.quantize.ranges import METHODS, Range, clipping_range, output_range
from passes.quantize.static_int8 import StaticInt8
from passes.sites import linear_sites

RNG = np.random.default_rng(7)
WEIGHT = RNG.normal(size=(32, 24)).astype(np.float32)
BIAS = RNG.normal(size=24).astype(np.float32)
X = (RNG.normal(size=(40, 32)) + 0.5).astype(np.float32)
FLOAT_ROUNDING = 8 * float(np.finfo(np.float32).eps)
TARGETS = pytest.mark.parametrize("target", [CPU, OPENVINO], ids=lambda target: target.name)
WHOLE = StaticInt8(ranges="absmax", correct_bias=False)


def seeing(target: Target, x: np.ndarray = X) -> Context:
    return Context(target, Observer({"x": x}))


def matmul_model(*, bias: bool = True) -> ir.Model:
    graph = Builder()
    x = graph.input("x", FLOAT, ["m", 32])
    name = "product" if bias else "y"
    y = graph.add("MatMul", x, graph.constant("w", WEIGHT), name=name, path="encoder/encoder.dense")
    if bias:
        y = graph.add("Add", graph.constant("b", BIAS), y, name="y")
    return graph.model(y, shape=["m", 24])


def gemm_model(*, transposed: bool = False, bias: np.ndarray | None = BIAS) -> ir.Model:
    graph = Builder()
    x = graph.input("x", FLOAT, ["m", 32])
    weight = graph.constant("w", np.ascontiguousarray(WEIGHT.T) if transposed else WEIGHT)
    inputs = (x, weight) if bias is None else (x, weight, graph.constant("b", bias))
    return graph.model(graph.add("Gemm", *inputs, name="y", transB=int(transposed)), shape=["m", 24])


MODELS = [matmul_model, gemm_model, lambda: gemm_model(transposed=True)]


def constant(value: ir.Value | None) -> np.ndarray:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def oracle(x: np.ndarray, clip: Range, bias: np.ndarray | float, *, reduce_range: bool = False) -> np.ndarray:
    """What both forms compute: integers exactly, then both scales, then the bias; float64."""
    weight = quantize_columns(WEIGHT, reduce_range=reduce_range)
    centred = clip.quantize(x).astype(np.float64) - float(clip.zero_point)
    return centred @ weight.values.astype(np.float64) * (float(clip.scale) * weight.scale.astype(np.float64)) + bias


def float_rounding(x: np.ndarray) -> np.ndarray:
    """What float32 may add to that: each of 32 products and sums, at most so large."""
    return 32 * float(np.finfo(np.float32).eps) * (np.abs(x) @ np.abs(WEIGHT) + np.abs(BIAS)) * 1.1


def test_it_is_a_pass():
    assert isinstance(StaticInt8(), Pass)
    assert (StaticInt8.name, StaticInt8.effect, StaticInt8.purpose) == ("static-int8", Effect.LOSSY, Purpose.SIZE)


def test_structure_for_the_cpu():
    model = matmul_model()
    before = signature(model)
    x = model.graph.inputs[0]
    outcome = StaticInt8().run(model, seeing(CPU))
    check(model, CPU)
    assert (outcome.changed, outcome.refused) == (1, ())
    assert signature(model) == before
    quantize, product = model.graph
    assert (quantize.op_type, product.op_type, product.domain) == (
        "QuantizeLinear", "MatMulIntegerToFloat", "com.microsoft"
    )  # fmt: skip
    scale, zero = quantize.inputs[1:]
    assert quantize.inputs[0] is x
    initializers = model.graph.initializers
    a, b, a_scale, b_scale, a_zero, b_zero, bias = product.inputs
    assert (a, b) == (quantize.outputs[0], initializers["w_int8"])
    assert (a_scale, b_scale, a_zero, b_zero) == (scale, initializers["w_scale"], zero, None)
    assert product.outputs[0] is model.graph.outputs[0]
    assert bias is initializers["y_bias"]
    assert set(initializers) == {"x_scale", "x_zero_point", "w_int8", "w_scale", "y_bias"}
    assert all(node.metadata_props[SCOPES] for node in model.graph)
    assert product.outputs[0].dtype == FLOAT
    assert (constant(b) == quantize_columns(WEIGHT).values).all()
    assert constant(scale).shape == constant(zero).shape == ()


def test_structure_for_openvino():
    model = matmul_model()
    before = signature(model)
    x = model.graph.inputs[0]
    assert StaticInt8().run(model, seeing(OPENVINO)).changed == 1
    check(model, OPENVINO)
    assert signature(model) == before
    initializers = model.graph.initializers
    add = node_named(model, "y")
    product = add.inputs[0].producer()
    left, right = (value.producer() for value in product.inputs)
    quantize = left.inputs[0].producer()
    assert [n.op_type for n in (add, product, left, right, quantize)] == [
        "Add", "MatMul", "DequantizeLinear", "DequantizeLinear", "QuantizeLinear"
    ]  # fmt: skip
    assert quantize.inputs[0] is x
    assert left.inputs[1:] == quantize.inputs[1:] == (initializers["x_scale"], initializers["x_zero_point"])
    assert right.inputs == (initializers["w_int8"], initializers["w_scale"])
    assert right.attributes["axis"].as_int() == 1
    assert add.inputs[1] is initializers["y_bias"]
    assert set(initializers) == {"x_scale", "x_zero_point", "w_int8", "w_scale", "y_bias"}
    assert len(list(model.graph)) == 5
    assert {node.domain for node in model.graph} == {""}


@TARGETS
@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("reduce_range", [False, True])
@pytest.mark.parametrize("level", [ALL, DISABLED])
def test_numbers_are_those_of_the_oracle(target, make, reduce_range, level):
    model = make()
    StaticInt8("absmax", correct_bias=False, reduce_range=reduce_range).run(model, seeing(target))
    y = run(model, {"x": X}, level)
    clip = clipping_range(activation(X), "absmax")
    expected = oracle(X, clip, BIAS, reduce_range=reduce_range)
    assert (np.abs(y - expected) <= float_rounding(X)).all()
    # Nothing is clipped, so every rounding is at most half a step: xW - x'W' = x (W - W') + (x - x') W'.
    weight = quantize_columns(WEIGHT, reduce_range=reduce_range)
    bound = np.abs(X).sum(1, keepdims=True) * weight.scale / 2 + clip.scale / 2 * np.abs(weight.dequantize()).sum(0)
    error = y - (X.astype(np.float64) @ WEIGHT + BIAS)
    assert (np.abs(error) <= bound * (1 + 2.0**-14) + float_rounding(X)).all()
    # 960 independent errors, each rounding uniform in its step: their root mean square lies near the expectation.
    energy = np.square(X.astype(np.float64)).sum(1, keepdims=True) * weight.scale.astype(np.float64) ** 2
    variance = (energy + float(clip.scale) ** 2 * np.square(weight.dequantize().astype(np.float64)).sum(0)) / 12
    assert 0.75 < np.sqrt(np.mean(error**2) / np.mean(variance)) < 1.25


@TARGETS
@pytest.mark.parametrize("ranges", [*METHODS, "output"])
def test_what_is_out_of_range_is_clipped(target, ranges):
    calibration = X[:10]
    model = matmul_model()
    StaticInt8(ranges, percentile=99.0, correct_bias=False).run(model, seeing(target, calibration))
    seen = activation(calibration)
    if ranges == "output":
        clip = output_range(seen, [(WEIGHT, quantize_columns(WEIGHT))], 99.0)
    else:
        clip = clipping_range(seen, ranges, 99.0)
    assert (np.abs(run(model, {"x": 3 * X}, DISABLED) - oracle(3 * X, clip, BIAS)) <= float_rounding(3 * X)).all()
    assert clip.round_trip(3 * X).max() <= clip.high + clip.scale


@TARGETS
@pytest.mark.parametrize("make", [*MODELS, lambda: matmul_model(bias=False)])
def test_the_corrected_bias_takes_away_the_error_that_rows_have_in_common(target, make):
    # Clipping off the top of a distribution that is not centred shifts all products.
    options = {"ranges": "percentile", "percentile": 90.0}
    exact = run(make(), {"x": X}, DISABLED).astype(np.float64)
    plain, corrected = make(), make()
    StaticInt8(**options, correct_bias=False).run(plain, seeing(target))
    assert StaticInt8(**options).run(corrected, seeing(target)).changed == 1
    check(corrected, target)
    error = run(plain, {"x": X}, DISABLED) - exact
    assert np.abs(np.median(error, 0)).max() > 0.1
    rest = run(corrected, {"x": X}, DISABLED) - exact
    assert np.abs(rest - (error - np.median(error, 0))).max() <= 2 * float_rounding(X).max()


@TARGETS
def test_outliers_of_a_few_rows_do_not_move_the_others(target):
    x = X.copy()
    x[:4, 5] = 1000.0
    exact = x.astype(np.float64) @ WEIGHT + BIAS
    errors = []
    for correct_bias in (False, True):
        model = matmul_model()
        StaticInt8("percentile", 99.0, correct_bias).run(model, seeing(target, x))
        errors.append(np.abs(run(model, {"x": x}, DISABLED) - exact))
    plain, corrected = errors
    assert np.abs(plain[:4]).max() > 1000
    assert corrected[4:].max() < 1.2 * plain[4:].max() < 10


@TARGETS
def test_without_a_bias_and_without_correction_there_is_none(target):
    model = matmul_model(bias=False)
    WHOLE.run(model, seeing(target))
    check(model, target)
    assert set(model.graph.initializers) == {"x_scale", "x_zero_point", "w_int8", "w_scale"}
    expected = oracle(X, clipping_range(activation(X), "absmax"), 0.0)
    assert (np.abs(run(model, {"x": X}, DISABLED) - expected) <= float_rounding(X)).all()


@TARGETS
def test_a_bias_for_each_row_stays_an_add(target):
    rows = RNG.normal(size=(40, 1)).astype(np.float32)
    model = gemm_model(bias=rows)
    StaticInt8("absmax").run(model, seeing(target))
    check(model, target)
    add = node_named(model, "y")
    assert (add.op_type, add.inputs[1]) == ("Add", model.graph.initializers["b"])
    # What the errors of the 40 rows have in common is taken away, and the bias itself is added as it was.
    expected = oracle(X, clipping_range(activation(X), "absmax"), rows)
    expected += np.median(X.astype(np.float64) @ WEIGHT + rows - expected, 0)
    assert (np.abs(run(model, {"x": X}, DISABLED) - expected) <= 2 * float_rounding(X)).all()


@TARGETS
def test_a_product_that_others_read_keeps_its_add(target):
    graph = Builder()
    x = graph.input("x", FLOAT, ["m", 32])
    product = graph.add("MatMul", x, graph.constant("w", WEIGHT), name="product")
    y = graph.add("Add", product, graph.constant("b", BIAS), name="y")
    model = graph.model(y, graph.add("Relu", product, name="z"), shape=["m", 24])
    assert WHOLE.run(model, seeing(target)).changed == 1
    check(model, target)
    add = node_named(model, "y")
    assert add.op_type == "Add"
    assert node_named(model, "z").inputs[0] is add.inputs[0]
    assert add.inputs[1] is model.graph.initializers["b"]


@TARGETS
def test_a_graph_output_keeps_its_name_and_its_add(target):
    graph = Builder()
    x = graph.input("x", FLOAT, ["m", 32])
    product = graph.add("MatMul", x, graph.constant("w", WEIGHT), name="y")
    model = graph.model(product, graph.add("Add", product, graph.constant("b", BIAS), name="z"), shape=["m", 24])
    before = signature(model)
    assert WHOLE.run(model, seeing(target)).changed == 1
    check(model, target)
    assert signature(model) == before


@TARGETS
def test_one_quantization_serves_query_key_and_value(target):
    model = Encoder(layers=1).build()
    x = node_named(model, "encoder.layer.0.query.product").inputs[0]
    observe = Observer(feeds())
    assert StaticInt8().run(model, Context(target, observe)).changed == 6
    check(model, target)
    assert operators(model)["QuantizeLinear"] == 4
    (quantizer,) = (node for node in x.consumers() if node.op_type == "QuantizeLinear")
    readers = quantizer.outputs[0].consumers()
    if target == OPENVINO:
        assert [node.op_type for node in readers] == ["DequantizeLinear"]
        readers = readers[0].outputs[0].consumers()
    assert len(set(readers)) == 3
    assert len(observe.calls) == 1
    assert len(set(observe.calls[0])) == len(observe.calls[0]) == 4


@TARGETS
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("options", [StaticInt8(), WHOLE, StaticInt8("output", reduce_range=True)], ids=str)
def test_numbers_of_a_whole_encoder(target, fused, options):
    layers = 1 if options.ranges == "output" else 2
    reference = run(Encoder(layers=layers, fused=fused).build(), feeds())
    model = Encoder(layers=layers, fused=fused).build()
    assert options.run(model, Context(target, Observer(feeds(batch=64, seed=1)))).changed == 6 * layers
    check(model, target)
    # As for dynamic-int8, but the range is that of all texts: 4.5 deviations on either side of 0.
    weight_step, activation_step = 2.6 / (64 if options.reduce_range else 127), 9 / 255
    tolerance = np.sqrt((weight_step**2 + activation_step**2) / 12 * 6 * layers)
    for level in (ALL, DISABLED):
        error = relative(run(model, feeds(), level), reference)
        assert tolerance / 8 < error < tolerance


INTEGERS = StaticInt8("absmax", correct_bias=False, integer_output=True)


def test_structure_of_integers_in_and_out():
    model = matmul_model()
    before = signature(model)
    outcome = INTEGERS.run(model, seeing(CPU))
    check(model, CPU)
    assert (outcome.changed, outcome.refused) == (1, ())
    assert signature(model) == before
    quantize, product, dequantize, add = model.graph
    assert [node.op_type for node in model.graph] == ["QuantizeLinear", "QLinearMatMul", "DequantizeLinear", "Add"]
    assert {node.domain for node in model.graph} == {""}
    held = model.graph.initializers
    q, scale, zero, weight, weight_scale, weight_zero, *out = product.inputs
    assert (q, scale, zero) == (quantize.outputs[0], held["x_scale"], held["x_zero_point"])
    assert (weight, weight_scale) == (held["w_int8"], held["w_scale"])
    assert not constant(weight_zero).any()
    assert constant(weight_zero).shape == constant(weight_scale).shape
    assert list(dequantize.inputs) == [product.outputs[0], *out]
    assert list(add.inputs) == [dequantize.outputs[0], held["y_bias"]]
    assert add.outputs[0] is model.graph.outputs[0]


@pytest.mark.parametrize(
    ("make", "bias"), [*((make, BIAS) for make in MODELS), (lambda: matmul_model(bias=False), np.float32(0.0))]
)
@pytest.mark.parametrize("level", [ALL, DISABLED])
def test_integers_in_and_out_are_those_of_the_oracle(make, bias, level):
    model = make()
    INTEGERS.run(model, seeing(CPU))
    product = oracle(X, clipping_range(activation(X), "absmax"), 0.0)
    step = (product.max() - product.min()) / 255
    found = run(model, {"x": X}, level)
    # Nothing lies outside the range of all rows, whose ends the rounded zero point moves by half a step.
    error = np.abs(found - (product + bias))
    assert (error <= step * (1 + 2.0**-14) + float_rounding(X)).all()
    assert np.mean(error <= step / 2 * (1 + 2.0**-14) + float_rounding(X)) > 0.99
    # A rounding uniform within a step has a root mean square of step / sqrt(12).
    assert 0.8 < np.sqrt(np.mean(error**2)) / (step / np.sqrt(12)) < 1.2
    # Integers come out: less the bias, everything is a multiple of the step, up to what float32 rounds of 255 of them.
    multiples = (found.astype(np.float64) - bias) / step
    assert np.abs(multiples - np.rint(multiples)).max() < 4 * 255 * float(np.finfo(np.float32).eps)


def test_integers_in_and_out_of_a_whole_encoder():
    reference = run(Encoder(layers=1).build(), feeds())
    options = StaticInt8(integer_output=True)
    model = Encoder(layers=1).build()
    context = Context(CPU, Observer(feeds(batch=64, seed=1)))
    assert options.run(model, context).changed == 6
    check(model, CPU)
    assert operators(model)["QLinearMatMul"] == 6
    # As where floats come out; and the products in steps of about 9 deviations in 255.
    tolerance = np.sqrt(((2.6 / 127) ** 2 + 2 * (9 / 255) ** 2) / 12 * 6)
    assert tolerance / 8 < relative(run(model, feeds(), DISABLED), reference) < tolerance
    assert options.run(model, context).changed == 0


def test_only_the_cpu_is_told_what_a_product_writes():
    outcome = INTEGERS.run(matmul_model(), seeing(OPENVINO))
    assert outcome.changed == 0
    assert outcome.refused[0].reason == "OpenVINOExecutionProvider decides by itself what a product writes"


def test_biases_are_folded_on_the_cpu():
    model, fused = Encoder(layers=1).build(), Encoder(layers=1, fused=True).build()
    adds = operators(model)["Add"]
    StaticInt8().run(model, Context(CPU, Observer(feeds())))
    StaticInt8().run(fused, Context(CPU, Observer(feeds())))
    assert operators(model)["Add"] == adds - 6
    # BiasGelu adds the bias of the site before it: there the operator adds the correction only.
    gelu = next(node for node in fused.graph if node.op_type == "BiasGelu")
    assert gelu.inputs[1] is fused.graph.initializers["encoder.layer.0.intermediate.bias"]
    product = gelu.inputs[0].producer()
    assert (product.op_type, len(product.inputs)) == ("MatMulIntegerToFloat", 7)
    assert np.abs(constant(product.inputs[6])).max() < 0.1


@TARGETS
def test_sites_that_read_each_other_and_share_a_weight(target):
    graph = Builder()
    x = graph.input("x", FLOAT, ["m", 32])
    square = graph.constant("w", (RNG.normal(size=(32, 32)) / 5).astype(np.float32))
    first = graph.add("Gemm", x, square, name="first")
    model = graph.model(graph.add("MatMul", first, square, name="second"), shape=["m", 32])
    reference = run(model.clone(), {"x": X})
    assert StaticInt8().run(model, seeing(target)).changed == 2
    check(model, target)
    initializers = sorted(name for name in model.graph.initializers if name.startswith("w"))
    assert initializers == ["w_int8", "w_scale"]
    assert operators(model)["QuantizeLinear"] == 2
    assert relative(run(model, {"x": X}), reference) < np.sqrt(2 * ((7 / 255) ** 2 + (2.4 / 127) ** 2) / 12) * 1.5


@TARGETS
def test_a_weight_that_others_read_is_kept(target):
    model = matmul_model()
    graph = model.graph
    node = ir.node("ReduceMax", [graph.initializers["w"]], outputs=[ir.Value(name="top")])
    graph.append(node)
    node.outputs[0].dtype = FLOAT
    graph.outputs.append(node.outputs[0])
    assert StaticInt8().run(model, seeing(target)).changed == 1
    check(model, target)
    assert node.inputs[0] is graph.initializers["w"]
    assert (constant(graph.initializers["w"]) == WEIGHT).all()


@TARGETS
def test_a_name_that_is_taken_is_not_taken_again(target):
    model = matmul_model()
    model.graph.inputs[0].name = "w_int8"
    assert StaticInt8().run(model, Context(target, Observer({"w_int8": X}))).changed == 1
    check(model, target)
    assert "w_int8_2" in model.graph.initializers


@pytest.mark.parametrize(
    ("x", "reason"),
    [
        (np.zeros((5, 32), np.float32), "calibration saw no two different numbers in x"),
        (np.full((5, 32), 2.0, np.float32), "calibration saw no two different numbers in x"),
    ],
)
def test_an_input_that_never_varies_is_refused(x, reason):
    model = matmul_model()
    outcome = StaticInt8().run(model, seeing(CPU, x))
    assert (outcome.changed, [refusal.reason for refusal in outcome.refused]) == (0, [reason])
    assert operators(model) == operators(matmul_model())


def test_a_constant_input_is_refused_without_looking():
    graph = Builder()
    product = graph.add("MatMul", graph.constant("c", X), graph.constant("w", WEIGHT), name="product")
    model = graph.model(graph.add("Add", product, graph.input("x", FLOAT, [24]), name="y"), shape=[40, 24])
    observe = Observer({})
    outcome = StaticInt8().run(model, Context(CPU, observe))
    assert (outcome.changed, [refusal.reason for refusal in outcome.refused]) == (0, ["its input is a constant"])
    assert observe.calls == []


def test_without_calibration_data_it_refuses_what_it_could_have_done():
    model = matmul_model()
    outcome = StaticInt8().run(model, Context(CPU))
    assert (outcome.changed, [refusal.reason for refusal in outcome.refused]) == (0, ["calibration data is needed"])
    assert operators(model) == operators(matmul_model())
    graph = Builder()
    empty = graph.model(graph.add("Relu", graph.input("x", FLOAT, ["m"]), name="y"), shape=["m"])
    assert StaticInt8().run(empty, Context(CPU)).refused == ()


def test_weights_are_refused_as_by_dynamic_int8():
    def narrow() -> ir.Model:
        graph = Builder()
        x, z = graph.input("x", FLOAT, ["m", 32]), graph.input("z", FLOAT, [32, 24])
        y = graph.add("MatMul", x, graph.constant("w", WEIGHT[:, :3].copy()), name="y")
        broken = WEIGHT.copy()
        broken[3, 3] = np.nan
        graph.add("MatMul", x, graph.constant("n", broken), name="nan")
        graph.add("MatMul", x, z, name="variable")
        return graph.model(y, shape=["m", 3])

    expected = DynamicInt8().run(narrow(), Context(CPU)).refused
    assert len(expected) == 3
    outcome = StaticInt8().run(narrow(), seeing(CPU))
    assert (outcome.changed, outcome.refused) == (0, expected)


@pytest.mark.parametrize("target", [CUDA, TENSORRT], ids=lambda target: target.name)
def test_targets_without_the_kernels_are_refused(target):
    outcome = StaticInt8().run(matmul_model(), seeing(target))
    assert outcome.changed == 0
    assert target.provider in outcome.refused[0].reason


def test_an_opset_without_the_operator_is_refused():
    model = matmul_model()
    model.graph.opset_imports[""] = 12
    outcome = StaticInt8().run(model, seeing(OPENVINO))
    assert outcome.changed == 0
    assert "opset 12" in outcome.refused[0].reason


def test_skip_and_only_take_module_paths_and_wildcards():
    model = Encoder(layers=2).build()
    paths = [site.path for site in linear_sites(model)]
    wanted = [path for path in paths if path.startswith("encoder.layer.1.") and not path.endswith(".key")]
    options = StaticInt8(only=("encoder.layer.1.*", "decoder.*"), skip=("*.key", "*.cross"))
    outcome = options.run(model, Context(CPU, Observer(feeds())))
    assert outcome.changed == len(wanted) == 5
    assert [site.path for site in linear_sites(model)] == [path for path in paths if path not in wanted]
    refused = [(refusal.node, refusal.reason) for refusal in outcome.refused]
    # What is not among ``only`` was no candidate, so it is no refusal.
    assert refused == [
        ("*.cross", "the skip pattern fits no linear operator"),
        ("decoder.*", "the only pattern fits no linear operator"),
        ("node_encoder.layer.1.key.product", "encoder.layer.1.key is skipped by '*.key'"),
    ]


def test_two_ways_share_the_sites_of_a_model():
    model = Encoder(layers=2).build()
    assert StaticInt8(only=("encoder.layer.0.*",)).run(model, Context(CPU, Observer(feeds()))).changed == 6
    outcome = DynamicInt8(only=("encoder.layer.1.*",), skip=("*.key",)).run(model, Context(CPU))
    assert outcome.changed == 5
    assert [refusal.reason for refusal in outcome.refused] == ["encoder.layer.1.key is skipped by '*.key'"]
    check(model, CPU)
    assert relative(run(model, feeds()), run(Encoder(layers=2).build(), feeds())) < 0.05


@TARGETS
@pytest.mark.parametrize("fused", [False, True])
def test_a_second_run_changes_nothing(target, fused):
    model = Encoder(fused=fused).build()
    static = StaticInt8(skip=("*.layer.0.query",))
    observe = Observer(feeds())
    assert static.run(model, Context(target, observe)).changed == 11
    before = ir.to_proto(model).SerializeToString()
    assert static.run(model, Context(target, observe)).changed == 0
    assert ir.to_proto(model).SerializeToString() == before
    assert len(observe.calls) == 1
    assert DynamicInt8(skip=("*.layer.0.query",)).run(model, Context(CPU)).changed == 0
    assert ir.to_proto(model).SerializeToString() == before


@TARGETS
def test_the_same_graph_gives_the_same_bytes(target):
    first, second = Encoder().build(), Encoder().build()
    StaticInt8().run(first, Context(target, Observer(feeds())))
    StaticInt8().run(second, Context(target, Observer(feeds())))
    assert ir.to_proto(first).SerializeToString() == ir.to_proto(second).SerializeToString()


@pytest.mark.parametrize(
    "item",
    [
        StaticInt8(),
        StaticInt8("output", 99.5, correct_bias=False, reduce_range=True, skip=("a.*", "b c"), only=("*.dense",)),
        StaticInt8(ranges="entropy"),
        DynamicInt8(only=("*.dense",)),
    ],
    ids=str,
)
def test_the_text_form_reads_back(item):
    pipeline = Pipeline((item,))
    assert parse(str(pipeline)) == pipeline


@pytest.mark.parametrize("text", ["static-int8(ranges=best)", "static-int8(percentile=0)"])
def test_options_that_mean_nothing_are_refused(text):
    with pytest.raises(UsageError, match="refuses its options"):
        parse(text)


@pytest.mark.skipif(find_spec("onnxruntime_ep_openvino") is None, reason="the OpenVINO plugin is not installed")
@pytest.mark.parametrize("options", [WHOLE, StaticInt8("mse")], ids=str)
def test_openvino_computes_what_the_oracle_says(options, tmp_path):
    from runtimes.session import Session

    model = matmul_model()
    options.run(model, seeing(OPENVINO))
    ir.save(model, tmp_path / "m.onnx")
    settings = SessionOptions(precision="fp32")
    session = Session(tmp_path / "m.onnx", OPENVINO_PROVIDER, options=settings, threads=1, record_assignment=True)
    assert set(session.assignment()) == {OPENVINO_PROVIDER}
    clip = clipping_range(activation(X), options.ranges)
    exact = X.astype(np.float64) @ WEIGHT + BIAS
    expected = oracle(X, clip, BIAS)
    if options.correct_bias:
        expected += np.median(exact - expected, 0)
    # x / s may be rounded to the other side of a tie: one step of one element of a row, at most.
    one_step = float(clip.scale) * np.abs(quantize_columns(WEIGHT).dequantize()).max()
    assert np.abs(session.run({"x": X})["y"] - expected).max() <= float_rounding(X).max() + one_step
    assert relative(session.run({"x": X})["y"], expected) < 1e-4 < relative(expected, exact)
