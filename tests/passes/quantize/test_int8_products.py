"""int8-products: structure, numbers in a real ONNX Runtime, refusals, idempotence."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import onnx_ir as ir
import pytest
from encoder_graphs import ALL, DISABLED, FLOAT, Builder, Encoder, feeds, node_named, operators, relative, run
from observing import Observer, activation

from artifacts.errors import UsageError
from artifacts.manifest import SessionOptions
from artifacts.target import CPU, CUDA, OPENVINO, OPENVINO_PROVIDER
from passes.base import Context, Effect, Pass, Purpose
from passes.grammar import check, signature
from passes.pipeline import Pipeline, parse
from passes.quantize.int8_products import Int8Products
from passes.quantize.ranges import METHODS, clipping_range
from passes.quantize.static_int8 import StaticInt8

RNG = np.random.default_rng(11)
Q = RNG.normal(size=(2, 6, 32)).astype(np.float32)
K = RNG.normal(size=(2, 32, 6)).astype(np.float32)
V = RNG.normal(size=(2, 6, 16)).astype(np.float32)
FEEDS = {"q": Q, "k": K, "v": V}
NO_KERNEL = "has no fast int8 kernel for a product of two activations"
EPS = float(np.finfo(np.float32).eps)


def attention() -> ir.Model:
    graph = Builder()
    q = graph.input("q", FLOAT, ["b", "m", 32])
    k = graph.input("k", FLOAT, ["b", 32, "n"])
    v = graph.input("v", FLOAT, ["b", "n", 16])
    scores = graph.add("MatMul", q, k, name="scores", path="attention/attention.scores")
    weights = graph.add("Softmax", scores, name="weights", axis=-1)
    y = graph.add("MatMul", weights, v, name="y", path="attention/attention.mix")
    return graph.model(y, shape=["b", "m", 16])


def seeing() -> Context:
    return Context(OPENVINO, Observer(FEEDS))


def int8(x: np.ndarray, ranges: str = "mse", percentile: float = 99.99) -> tuple[np.ndarray, float]:
    """A value rounded to symmetric int8 in float64, and its step."""
    clip = clipping_range(activation(x), ranges, percentile)
    step = float(np.float32(max(-clip.low, clip.high) / 127))
    return np.clip(np.rint(x / np.float32(step)), -128, 127).astype(np.float64) * step, step


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def test_it_is_a_pass():
    assert isinstance(Int8Products(), Pass)
    assert (Int8Products.name, Int8Products.effect, Int8Products.purpose) == (
        "int8-products", Effect.LOSSY, Purpose.SPEED
    )  # fmt: skip


def test_structure():
    model = attention()
    before = signature(model)
    scores, softmax_node, mix = model.graph
    context = seeing()
    outcome = Int8Products().run(model, context)
    check(model, OPENVINO)
    assert (outcome.changed, outcome.refused) == (2, ())
    assert signature(model) == before
    assert softmax_node.inputs[0] is scores.outputs[0]
    sources = [*model.graph.inputs[:2], softmax_node.outputs[0], model.graph.inputs[2]]
    kinds = [ir.DataType.INT8, ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT8]
    for value, source, kind in zip([*scores.inputs, *mix.inputs], sources, kinds, strict=True):
        dequantize = value.producer()
        quantize = dequantize.inputs[0].producer()
        assert (dequantize.op_type, quantize.op_type) == ("DequantizeLinear", "QuantizeLinear")
        assert quantize.inputs[0] is source
        assert dequantize.inputs[1:] == quantize.inputs[1:]
        zero = quantize.inputs[2].const_value
        assert (zero.dtype, zero.numpy().item(), quantize.outputs[0].dtype) == (kind, 0, kind)
    assert mix.inputs[0].producer().inputs[1].const_value.numpy() == np.float32(1 / 255)
    # The range of a Softmax is known: it is not observed.
    assert context.observe.calls == [("q", "k", "v")]


@pytest.mark.parametrize("ranges", METHODS)
@pytest.mark.parametrize("level", [ALL, DISABLED])
def test_numbers_are_those_of_the_oracle(ranges, level):
    model = attention()
    Int8Products(ranges, percentile=99.0).run(model, seeing())
    (q, _), (k, _), (v, step) = (int8(x, ranges, 99.0) for x in (Q, K, V))
    weights = np.rint(softmax(q @ k).astype(np.float32) * np.float32(255)) / 255
    y = run(model, FEEDS, level)
    # The scores differ in their last bits, so a weight next to a tie may fall on its other side: a 255th of a value.
    close = np.abs(y - weights @ v) <= 64 * EPS * np.abs(V).max()
    assert np.mean(close) > 0.9
    assert np.abs(y - weights @ v).max() <= 1.001 / 255 * 127 * step
    assert relative(y, softmax(Q @ K) @ V) > 1e-4


def test_numbers_keep_to_the_bound_of_half_a_step():
    graph = Builder()
    q, k = graph.input("q", FLOAT, ["b", "m", 32]), graph.input("k", FLOAT, ["b", 32, "n"])
    model = graph.model(graph.add("MatMul", q, k, name="y"), shape=["b", "m", "n"])
    Int8Products("absmax").run(model, Context(OPENVINO, Observer({"q": Q, "k": K})))
    (_, left), (rough, right) = int8(Q, "absmax"), int8(K, "absmax")
    # qk - q'k' = q (k - k') + (q - q') k', each rounding at most half a step.
    bound = np.abs(Q).sum(-1, keepdims=True) * right / 2 + left / 2 * np.abs(rough).sum(-2, keepdims=True)
    error = np.abs(run(model, {"q": Q, "k": K}) - Q.astype(np.float64) @ K)
    assert (error <= bound * (1 + 2.0**-14) + 1e-5).all()
    assert (error > bound / 100).any()


def test_a_left_operand_that_is_never_negative_is_unsigned():
    graph = Builder()
    q, k = graph.input("q", FLOAT, ["b", "m", 32]), graph.input("k", FLOAT, ["b", 32, "n"])
    model = graph.model(graph.add("MatMul", q, k, name="y"), shape=["b", "m", "n"])
    Int8Products("absmax").run(model, Context(OPENVINO, Observer({"q": np.abs(Q), "k": np.abs(K)})))
    kinds = [node_named(model, "y").inputs[i].producer().inputs[0].dtype for i in (0, 1)]
    assert kinds == [ir.DataType.UINT8, ir.DataType.INT8]
    assert model.graph.initializers["q_uint8_scale"].const_value.numpy() == np.float32(np.abs(Q).max() / 255)


def test_a_value_is_quantized_once_in_each_form():
    graph = Builder()
    q = graph.input("q", FLOAT, ["b", 32, 32])
    first = graph.add("MatMul", q, q, name="first")
    model = graph.model(first, graph.add("MatMul", q, first, name="second"), shape=["b", 32, 32])
    x = np.abs(RNG.normal(size=(2, 32, 32))).astype(np.float32)
    assert Int8Products().run(model, Context(OPENVINO, Observer({"q": x}))).changed == 2
    check(model, OPENVINO)
    assert operators(model) == {"QuantizeLinear": 3, "DequantizeLinear": 3, "MatMul": 2}
    assert node_named(model, "first").inputs[0] is node_named(model, "second").inputs[0]


@pytest.mark.parametrize("linear", [False, True])
def test_numbers_of_a_whole_encoder(linear):
    reference = run(Encoder().build(), feeds())
    model = Encoder().build()
    context = Context(OPENVINO, Observer(feeds(batch=64, seed=1)))
    if linear:
        assert StaticInt8().run(model, context).changed == 12
    assert Int8Products().run(model, context).changed == 4
    check(model, OPENVINO)
    # Two products a layer of symmetric operands: steps of 9 deviations in 255; those of the linear operators besides.
    tolerance = np.sqrt((9 / 255) ** 2 / 12 * 2 * 2 * 2 + linear * ((2.6 / 127) ** 2 + (9 / 255) ** 2) / 12 * 12)
    assert tolerance / 8 < relative(run(model, feeds(), DISABLED), reference) < tolerance


def test_products_with_a_constant_are_no_candidates():
    graph = Builder()
    q = graph.input("q", FLOAT, ["b", "m", 32])
    left = graph.add("MatMul", graph.constant("c", Q), graph.input("k", FLOAT, ["b", 32, "n"]), name="left")
    right = graph.add("MatMul", q, graph.constant("w", K[0]), name="right")
    model = graph.model(left, right, shape=["b", "m", "n"])
    assert Int8Products().run(model, seeing()) == Int8Products().run(model, Context(OPENVINO))
    assert operators(model) == {"MatMul": 2}
    assert StaticInt8().run(attention(), Context(OPENVINO)).changed == 0


@pytest.mark.parametrize(
    ("context", "reason"),
    [
        (Context(CPU, Observer(FEEDS)), f"CPUExecutionProvider {NO_KERNEL}"),
        (Context(CUDA, Observer(FEEDS)), f"CUDAExecutionProvider {NO_KERNEL}"),
        (Context(OPENVINO), "calibration data is needed"),
        (Context(OPENVINO, Observer(FEEDS | {"v": 0 * V})), "calibration saw no two different numbers in v"),
    ],
)
def test_refusals(context, reason):
    outcome = Int8Products(only=("attention.mix",)).run(attention(), context)
    assert (outcome.changed, [refusal.reason for refusal in outcome.refused]) == (0, [reason])


def test_an_old_opset_and_an_unknown_type_are_refused():
    model = attention()
    model.graph.opset_imports[""] = 12
    assert "opset 12" in Int8Products().run(model, seeing()).refused[0].reason
    model = attention()
    node_named(model, "weights").outputs[0].type = None
    outcome = Int8Products().run(model, seeing())
    assert (outcome.changed, outcome.refused[0].reason) == (1, "an operand is not known to be float32")


def test_skip_and_only():
    model = attention()
    outcome = Int8Products(skip=("*.scores", "decoder.*")).run(model, seeing())
    assert outcome.changed == 1
    assert [refusal.reason for refusal in outcome.refused] == [
        "the skip pattern fits no product of two activations",
        "attention.scores is skipped by '*.scores'",
    ]
    outcome = Int8Products(only=("*.scores",)).run(attention(), seeing())
    assert (outcome.changed, outcome.refused) == (1, ())


def test_a_second_run_changes_nothing():
    model = attention()
    context = seeing()
    Int8Products().run(model, context)
    before = ir.to_proto(model).SerializeToString()
    assert Int8Products().run(model, context).changed == 0
    assert StaticInt8().run(model, context).changed == 0
    assert ir.to_proto(model).SerializeToString() == before
    assert len(context.observe.calls) == 1


@pytest.mark.parametrize("item", [Int8Products(), Int8Products("percentile", 99.5, ("a.*",), ("b", "c d"))], ids=str)
def test_the_text_form_reads_back(item):
    pipeline = Pipeline((item,))
    assert parse(str(pipeline)) == pipeline


@pytest.mark.parametrize("text", ["int8-products(ranges=output)", "int8-products(percentile=101)"])
def test_options_that_mean_nothing_are_refused(text):
    with pytest.raises(UsageError, match="refuses its options"):
        parse(text)


@pytest.mark.skipif(find_spec("onnxruntime_ep_openvino") is None, reason="the OpenVINO plugin is not installed")
def test_openvino_computes_what_the_cpu_computes(tmp_path):
    from runtimes.session import Session

    model = attention()
    Int8Products().run(model, seeing())
    ir.save(model, tmp_path / "m.onnx")
    settings = SessionOptions(precision="fp32")
    session = Session(tmp_path / "m.onnx", OPENVINO_PROVIDER, options=settings, threads=1, record_assignment=True)
    assert set(session.assignment()) == {OPENVINO_PROVIDER}
    expected = run(model, FEEDS, DISABLED)
    assert np.abs(session.run(FEEDS)["y"] - expected).max() <= 1.001 / 255 * np.abs(V).max() * 2
    assert relative(session.run(FEEDS)["y"], expected) < relative(expected, softmax(Q @ K) @ V) / 2
