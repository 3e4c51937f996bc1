"""dynamic-int8: structure, numbers in a real ONNX Runtime, refusals, idempotence."""

from __future__ import annotations

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
    session,
)

from artifacts.target import CPU, CUDA, OPENVINO
from passes.base import Context, Effect, Pass, Purpose
from passes.grammar import check, signature
from passes.quantize.arithmetic import dynamic_matmul, dynamic_matmul_bound, dynamic_matmul_deviation, quantize_columns
from passes.quantize.dynamic_int8 import DynamicInt8
from passes.sites import linear_sites

HERE = Context(CPU)
RNG = np.random.default_rng(7)
WEIGHT = RNG.normal(size=(32, 24)).astype(np.float32)
BIAS = RNG.normal(size=24).astype(np.float32)
X = RNG.normal(size=(5, 32)).astype(np.float32)
FLOAT_ROUNDING = 8 * float(np.finfo(np.float32).eps)


def matmul_model() -> ir.Model:
    graph = Builder()
    x = graph.input("x", FLOAT, ["m", 32])
    product = graph.add("MatMul", x, graph.constant("w", WEIGHT), name="product", path="encoder/encoder.dense")
    return graph.model(graph.add("Add", product, graph.constant("b", BIAS), name="y"), shape=["m", 24])


def gemm_model(*, transposed: bool, **attributes: object) -> ir.Model:
    graph = Builder()
    x = graph.input("x", FLOAT, ["m", 32])
    weight = graph.constant("w", np.ascontiguousarray(WEIGHT.T) if transposed else WEIGHT)
    y = graph.add("Gemm", x, weight, graph.constant("b", BIAS), name="y", transB=int(transposed), **attributes)
    return graph.model(y, shape=["m", 24])


def weight_of(model: ir.Model, name: str) -> np.ndarray:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def test_it_is_a_pass():
    assert isinstance(DynamicInt8(), Pass)
    assert (DynamicInt8.name, DynamicInt8.effect, DynamicInt8.purpose) == ("dynamic-int8", Effect.LOSSY, Purpose.SIZE)


def test_structure_of_a_matmul():
    model = matmul_model()
    before = signature(model)
    x, add = model.graph.inputs[0], node_named(model, "y")
    outcome = DynamicInt8().run(model, HERE)
    check(model, CPU)
    assert (outcome.changed, outcome.refused) == (1, ())
    assert signature(model) == before
    scaled = node_named(model, "product")
    assert add.inputs[0] is scaled.outputs[0]
    cast, scales = scaled.inputs[0].producer(), scaled.inputs[1].producer()
    product = cast.inputs[0].producer()
    quantize = product.inputs[0].producer()
    assert [n.op_type for n in (quantize, product, cast, scales, scaled)] == [
        "DynamicQuantizeLinear", "MatMulInteger", "Cast", "Mul", "Mul"
    ]  # fmt: skip
    assert quantize.inputs[0] is x
    assert product.inputs[1] is model.graph.initializers["w_int8"]
    assert product.inputs[2] is quantize.outputs[2]
    assert scales.inputs[0] is quantize.outputs[1]
    assert scales.inputs[1] is model.graph.initializers["w_scale"]
    assert sorted(model.graph.initializers) == ["b", "w_int8", "w_scale"]
    assert all(node.metadata_props[SCOPES] for node in (quantize, product, cast, scales, scaled))
    assert scaled.outputs[0].dtype == FLOAT


@pytest.mark.parametrize("transposed", [False, True])
def test_structure_of_a_gemm(transposed):
    model = gemm_model(transposed=transposed)
    assert DynamicInt8().run(model, HERE).changed == 1
    check(model, CPU)
    add = node_named(model, "y")
    assert add.op_type == "Add"
    assert add.inputs[1] is model.graph.initializers["b"]
    assert model.graph.outputs[0] is add.outputs[0]
    assert (weight_of(model, "w_int8") == quantize_columns(WEIGHT).values).all()
    assert operators(model)["Gemm"] == 0


@pytest.mark.parametrize(
    "make", [matmul_model, lambda: gemm_model(transposed=False), lambda: gemm_model(transposed=True)]
)
@pytest.mark.parametrize("reduce_range", [False, True])
@pytest.mark.parametrize("level", [ALL, DISABLED])
def test_numbers_are_those_of_the_oracle(make, reduce_range, level):
    model = make()
    DynamicInt8(reduce_range=reduce_range).run(model, HERE)
    y = run(model, {"x": X}, level)
    quantized = quantize_columns(WEIGHT, reduce_range=reduce_range)
    oracle = dynamic_matmul(X, quantized) + BIAS
    assert np.abs(y - oracle).max() <= FLOAT_ROUNDING * np.abs(oracle).max()
    error = y - (X.astype(np.float64) @ WEIGHT + BIAS)
    assert (np.abs(error) <= dynamic_matmul_bound(X, quantized) + FLOAT_ROUNDING * np.abs(y)).all()
    # 120 independent errors: their root mean square lies within 25 % of the expectation, hundreds of times below y.
    ratio = np.sqrt(np.mean(error**2) / np.mean(dynamic_matmul_deviation(X, quantized) ** 2))
    assert 0.75 < ratio < 1.25


def test_one_quantization_serves_query_key_and_value():
    model = Encoder(layers=1).build()
    x = node_named(model, "encoder.layer.0.query.product").inputs[0]
    assert DynamicInt8().run(model, HERE).changed == 6
    check(model, CPU)
    quantizers = [node for node in x.consumers() if node.op_type == "DynamicQuantizeLinear"]
    assert len(quantizers) == 1
    assert len(set(quantizers[0].outputs[0].consumers())) == 3
    assert operators(model)["DynamicQuantizeLinear"] == 4


@pytest.mark.parametrize("fused", [False, True])
def test_onnxruntime_runs_the_fused_integer_kernels(fused, tmp_path):
    model = Encoder(layers=1, fused=fused).build()
    DynamicInt8().run(model, HERE)
    session(model, ALL, tmp_path / "optimized.onnx")
    made = operators(ir.load(tmp_path / "optimized.onnx"))
    assert made["MatMulIntegerToFloat"] == 3
    assert made["DynamicQuantizeMatMul"] == 3
    assert made["DynamicQuantizeLinear"] == 1
    assert made["MatMulInteger"] == 0


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("reduce_range", [False, True])
def test_numbers_of_a_whole_encoder(fused, reduce_range):
    layers = 2
    reference = run(Encoder(layers=layers, fused=fused).build(), feeds())
    model = Encoder(layers=layers, fused=fused).build()
    assert DynamicInt8(reduce_range=reduce_range).run(model, HERE).changed == 6 * layers
    check(model, CPU)
    # Steps relative to the deviation of a normal distribution: 64 weights reach 2.6 deviations, a few thousand
    # activations 3.5 on either side. Roundings are uniform, independent, and add up over 6 products a layer.
    weight_step, activation_step = 2.6 / (64 if reduce_range else 127), 7 / 255
    tolerance = np.sqrt((weight_step**2 + activation_step**2) / 12 * 6 * layers)
    for level in (ALL, DISABLED):
        error = relative(run(model, feeds(), level), reference)
        assert tolerance / 8 < error < tolerance


def test_a_shared_weight_is_quantized_once():
    graph = Builder()
    x = graph.input("x", FLOAT, ["m", 32])
    square = graph.constant("w", RNG.normal(size=(32, 32)).astype(np.float32))
    first = graph.add("MatMul", x, square, name="first")
    model = graph.model(graph.add("MatMul", first, square, name="second"), shape=["m", 32])
    reference = run(model.clone(), {"x": X})
    assert DynamicInt8().run(model, HERE).changed == 2
    check(model, CPU)
    assert sorted(model.graph.initializers) == ["w_int8", "w_scale"]
    assert node_named(model, "first_int32").inputs[1] is node_named(model, "second_int32").inputs[1]
    assert relative(run(model, {"x": X}), reference) < np.sqrt(2 * ((7 / 255) ** 2 + (2.4 / 127) ** 2) / 12) * 1.5


def test_a_weight_that_others_read_is_kept():
    model = matmul_model()
    graph = model.graph
    node = ir.node("ReduceMax", [graph.initializers["w"]], outputs=[ir.Value(name="top")])
    graph.append(node)
    node.outputs[0].dtype = FLOAT
    graph.outputs.append(node.outputs[0])
    assert DynamicInt8().run(model, HERE).changed == 1
    assert node.inputs[0] is graph.initializers["w"]
    assert (weight_of(model, "w") == WEIGHT).all()


def test_a_name_that_is_taken_is_not_taken_again():
    model = matmul_model()
    node_named(model, "y").outputs[0].name = "w_int8"
    model.graph.inputs[0].name = "product_int32"
    assert DynamicInt8().run(model, HERE).changed == 1
    check(model, CPU)
    assert "w_int8_2" in model.graph.initializers


def test_a_site_that_makes_a_graph_output_keeps_its_name():
    graph = Builder()
    x = graph.input("x", FLOAT, ["m", 32])
    model = graph.model(graph.add("MatMul", x, graph.constant("w", WEIGHT), name="y"), shape=["m", 24])
    before = signature(model)
    assert DynamicInt8().run(model, HERE).changed == 1
    assert signature(model) == before
    assert run(model, {"x": X}).shape == (5, 24)


def narrow() -> ir.Model:
    graph = Builder()
    x = graph.input("x", FLOAT, ["m", 32])
    weight = graph.constant("w", WEIGHT[:, :3].copy())
    return graph.model(graph.add("MatMul", x, weight, name="y"), shape=["m", 3])


def variable() -> ir.Model:
    graph = Builder()
    x, y = graph.input("x", FLOAT, ["m", 32]), graph.input("z", FLOAT, [32, 24])
    return graph.model(graph.add("MatMul", x, y, name="y"), shape=["m", 24])


def infinite() -> ir.Model:
    graph = Builder()
    weight = WEIGHT.copy()
    weight[3, 3] = np.inf
    x = graph.input("x", FLOAT, ["m", 32])
    return graph.model(graph.add("MatMul", x, graph.constant("w", weight), name="y"), shape=["m", 24])


def half() -> ir.Model:
    graph = Builder()
    x = graph.input("x", ir.DataType.FLOAT16, ["m", 32])
    weight = graph.constant("w", WEIGHT.astype(np.float16))
    return graph.model(graph.add("MatMul", x, weight, name="y", dtype=ir.DataType.FLOAT16), shape=["m", 24])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (narrow, "a weight of 32 x 3 is too small to gain"),
        (variable, "no product with a constant matrix"),
        (infinite, "the weight has values that are not finite"),
        (half, "the weight is not float32"),
        (lambda: gemm_model(transposed=True, alpha=0.5), "no product with a constant matrix"),
    ],
)
def test_refusals(make, reason):
    model = make()
    nodes, initializers = list(model.graph), dict(model.graph.initializers)
    outcome = DynamicInt8().run(model, HERE)
    assert outcome.changed == 0
    assert [(refusal.node, refusal.reason) for refusal in outcome.refused] == [("node_y", reason)]
    assert list(model.graph) == nodes
    assert dict(model.graph.initializers) == initializers


def test_skip_takes_module_paths_and_wildcards():
    model = Encoder(layers=2).build()
    paths = [site.path for site in linear_sites(model)]
    skipped = [path for path in paths if path.startswith("encoder.layer.1.") or path.endswith(".key")]
    outcome = DynamicInt8(skip=("encoder.layer.1.*", "*.key", "decoder.*")).run(model, HERE)
    assert outcome.changed == len(paths) - len(skipped)
    assert [site.path for site in linear_sites(model)] == skipped
    reasons = [refusal.reason for refusal in outcome.refused]
    assert "encoder.layer.0.key is skipped by '*.key'" in reasons
    assert [refusal.node for refusal in outcome.refused if "fits no" in refusal.reason] == ["decoder.*"]


@pytest.mark.parametrize(("target", "changed"), [(CPU, 1), (OPENVINO, 1), (CUDA, 0)])
def test_targets_without_the_kernels_are_refused(target, changed):
    outcome = DynamicInt8().run(matmul_model(), Context(target))
    assert (outcome.changed, len(outcome.refused)) == (changed, 1 - changed)


def test_an_opset_without_the_operator_is_refused():
    model = matmul_model()
    model.graph.opset_imports[""] = 10
    outcome = DynamicInt8().run(model, HERE)
    assert outcome.changed == 0
    assert "opset 10" in outcome.refused[0].reason


@pytest.mark.parametrize("fused", [False, True])
def test_a_second_run_changes_nothing(fused):
    model = Encoder(fused=fused).build()
    dynamic = DynamicInt8(skip=("*.layer.0.query",))
    first = dynamic.run(model, HERE)
    before = ir.to_proto(model).SerializeToString()
    second = dynamic.run(model, HERE)
    assert second.changed == 0
    assert second.refused == first.refused
    assert ir.to_proto(model).SerializeToString() == before


def test_the_same_graph_gives_the_same_bytes():
    first, second = Encoder().build(), Encoder().build()
    DynamicInt8().run(first, HERE)
    DynamicInt8().run(second, HERE)
    assert ir.to_proto(first).SerializeToString() == ir.to_proto(second).SerializeToString()
