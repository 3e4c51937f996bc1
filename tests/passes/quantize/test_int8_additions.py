"""int8-additions: structure, numbers in a real ONNX Runtime, refusals, idempotence."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from encoder_graphs import ALL, DISABLED, FLOAT, Builder, Encoder, feeds, node_named, operators, relative, run
from observing import Observer, activation

from artifacts.errors import UsageError
from artifacts.manifest import SessionOptions
from artifacts.target import CPU, OPENVINO, OPENVINO_PROVIDER
from passes.base import Context, Effect, Pass, Purpose
from passes.cleanup import InferShapes
from passes.grammar import check, signature
from passes.pipeline import Pipeline, parse
from passes.quantize import Int8Additions, StaticInt8
from passes.quantize.ranges import METHODS, clipping_range

RNG = np.random.default_rng(21)
X = RNG.normal(size=(2, 6, 32)).astype(np.float32)
Y = (3.0 * RNG.normal(size=(2, 6, 32)) + 1.0).astype(np.float32)
W = RNG.normal(size=(32, 32)).astype(np.float32)
FEEDS = {"x": X, "y": Y}
FLAT: list[int | str] = ["b", "m", 32]


def residual(*, shape: list[int | str] | None = None) -> ir.Model:
    graph = Builder()
    x, y = graph.input("x", FLOAT, FLAT), graph.input("y", FLOAT, shape or FLAT)
    return graph.model(graph.add("Add", x, y, name="sum", path="layer/layer.output"), shape=FLAT)


def seeing() -> Context:
    return Context(OPENVINO, Observer(FEEDS))


def test_it_is_a_pass() -> None:
    assert isinstance(Int8Additions(), Pass)
    assert (Int8Additions.name, Int8Additions.effect, Int8Additions.purpose) == (
        "int8-additions", Effect.LOSSY, Purpose.SPEED
    )  # fmt: skip


def test_structure() -> None:
    model = residual()
    before = signature(model)
    outcome = Int8Additions().run(model, seeing())
    check(model, OPENVINO)
    assert (outcome.changed, outcome.refused) == (1, ())
    assert signature(model) == before
    for value, source in zip(node_named(model, "sum").inputs, model.graph.inputs, strict=True):
        dequantize = value.producer()
        quantize = dequantize.inputs[0].producer()
        assert (dequantize.op_type, quantize.op_type) == ("DequantizeLinear", "QuantizeLinear")
        assert quantize.inputs[0] is source
        assert dequantize.inputs[1:] == quantize.inputs[1:]
        assert quantize.outputs[0].dtype == ir.DataType.UINT8
        assert quantize.outputs[0].shape == source.shape
    assert (
        model.graph.initializers["y_uint8_zero_point"].const_value.numpy() == clipping_range(activation(Y)).zero_point
    )


@pytest.mark.parametrize("ranges", METHODS)
@pytest.mark.parametrize("level", [ALL, DISABLED])
def test_numbers_are_those_of_the_oracle(ranges: str, level: object) -> None:
    model = residual()
    Int8Additions(ranges, percentile=99.0).run(model, seeing())
    clips = [clipping_range(activation(v), ranges, 99.0) for v in (X, Y)]
    expected = sum(clip.round_trip(v).astype(np.float64) for clip, v in zip(clips, (X, Y), strict=True))
    # ONNX Runtime may make one kernel of it that rounds once more, to float32 sums of whole steps.
    rounding = 4 * float(np.finfo(np.float32).eps) * (np.abs(X) + np.abs(Y)).max()
    assert np.abs(run(model, FEEDS, level) - expected).max() <= rounding
    if ranges == "absmax":
        bound = sum(float(clip.scale) for clip in clips) / 2
        assert bound / 4 < np.abs(expected - (X + Y)).max() <= bound * (1 + 2.0**-20)


def test_a_value_that_a_product_reads_as_integers_is_not_quantized_again() -> None:
    graph = Builder()
    x = graph.input("x", FLOAT, FLAT)
    product = graph.add("MatMul", x, graph.constant("w", W), name="product", path="layer/layer.dense")
    product.shape = ir.Shape(FLAT)
    model = graph.model(graph.add("Add", product, x, name="sum"), shape=FLAT)
    context = Context(OPENVINO, Observer({"x": X}))
    assert StaticInt8().run(model, context).changed == 1
    assert Int8Additions().run(model, context).changed == 1
    check(model, OPENVINO)
    assert operators(model)["QuantizeLinear"] == 2
    matmul = next(node for node in model.graph if node.op_type == "MatMul")
    assert node_named(model, "sum").inputs[1] is matmul.inputs[0]


def test_a_quantizer_behind_the_sum_is_not_read() -> None:
    """In the order of the graph it does not exist yet."""
    graph = Builder()
    x, y = graph.input("x", FLOAT, FLAT), graph.input("y", FLOAT, FLAT)
    total = graph.add("Add", x, y, name="sum")
    product = graph.add("MatMul", x, graph.constant("w", W), name="product")
    for value in (total, product):
        value.shape = ir.Shape(FLAT)
    model = graph.model(total, product, shape=FLAT)
    assert StaticInt8().run(model, seeing()).changed == 1
    assert Int8Additions().run(model, seeing()).changed == 1
    check(model, OPENVINO)
    assert operators(model)["QuantizeLinear"] == 3


def test_numbers_of_a_whole_encoder() -> None:
    reference = run(Encoder().build(), feeds())
    model = Encoder().build()
    context = Context(OPENVINO, Observer(feeds(batch=64, seed=1)))
    assert InferShapes().run(model, context).changed
    outcome = Int8Additions().run(model, context)
    check(model, OPENVINO)
    # Two residual connections a layer; masks are added to scores of another shape.
    assert (outcome.changed, outcome.refused) == (4, ())
    # Two operands each, in steps of about 9 deviations in 255; half of a sum's variance is that of each operand.
    tolerance = np.sqrt((9 / 255) ** 2 / 12 * 2 * 4)
    assert tolerance / 8 < relative(run(model, feeds(), DISABLED), reference) < tolerance


def test_what_is_no_residual_connection_is_no_candidate() -> None:
    graph = Builder()
    x = graph.input("x", FLOAT, FLAT)
    bias = graph.add("Add", x, graph.constant("b", W[0]), name="bias")
    scale = graph.add("Mul", x, x, name="scale")
    model = graph.model(bias, scale, shape=FLAT)
    for one in (model, residual(shape=[1, "m", 32]), residual(shape=["b", "n", 32])):
        outcome = Int8Additions().run(one, seeing())
        assert (outcome.changed, outcome.refused) == (0, ())
        assert "QuantizeLinear" not in operators(one)


@pytest.mark.parametrize(
    ("context", "reason"),
    [
        (Context(CPU, Observer(FEEDS)), "CPUExecutionProvider has no fast int8 kernel for a sum of two activations"),
        (Context(OPENVINO), "calibration data is needed"),
        (Context(OPENVINO, Observer(FEEDS | {"y": 0 * Y})), "calibration saw no two different numbers in y"),
    ],
)
def test_refusals(context: Context, reason: str) -> None:
    outcome = Int8Additions().run(residual(), context)
    assert (outcome.changed, [refusal.reason for refusal in outcome.refused]) == (0, [reason])


def test_skip_and_only() -> None:
    outcome = Int8Additions(skip=("layer.*", "decoder.*")).run(residual(), seeing())
    assert outcome.changed == 0
    assert [refusal.reason for refusal in outcome.refused] == [
        "the skip pattern fits no sum of two activations",
        "layer.output is skipped by 'layer.*'",
    ]
    assert Int8Additions(only=("layer.*",)).run(residual(), seeing()).changed == 1


def test_a_second_run_changes_nothing() -> None:
    model = residual()
    context = seeing()
    Int8Additions().run(model, context)
    before = ir.to_proto(model).SerializeToString()
    assert Int8Additions().run(model, context).changed == 0
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize("item", [Int8Additions(), Int8Additions("percentile", 99.5, ("a.*",), ("b",))], ids=str)
def test_the_text_form_reads_back(item: Int8Additions) -> None:
    pipeline = Pipeline((item,))
    assert parse(str(pipeline)) == pipeline


@pytest.mark.parametrize("text", ["int8-additions(ranges=output)", "int8-additions(percentile=0)"])
def test_options_that_mean_nothing_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="refuses its options"):
        parse(text)


@pytest.mark.skipif(find_spec("onnxruntime_ep_openvino") is None, reason="the OpenVINO plugin is not installed")
def test_openvino_computes_what_the_cpu_computes(tmp_path: Path) -> None:
    from runtimes.session import Session

    model = residual()
    Int8Additions().run(model, seeing())
    ir.save(model, tmp_path / "m.onnx")
    settings = SessionOptions(precision="fp32")
    session = Session(tmp_path / "m.onnx", OPENVINO_PROVIDER, options=settings, threads=1, record_assignment=True)
    assert set(session.assignment()) == {OPENVINO_PROVIDER}
    steps = [float(clipping_range(activation(v)).scale) for v in (X, Y)]
    # A value next to a tie may fall on its other side there: a step of its operand.
    assert np.abs(session.run(FEEDS)["sum"] - run(model, FEEDS, DISABLED)).max() <= 1.001 * sum(steps)
    assert relative(session.run(FEEDS)["sum"], run(model, FEEDS, DISABLED)) < 1e-3
