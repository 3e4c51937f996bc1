"""float16: structure, numbers in a real ONNX Runtime (its CPU provider inserts casts), refusals, idempotence."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from encoder_graphs import (
    ALL,
    BOOL,
    DISABLED,
    FLOAT,
    INT64,
    Builder,
    Encoder,
    feeds,
    node_named,
    relative,
    run,
    session,
)

from artifacts.target import CPU, CUDA, TENSORRT
from passes.base import Context, Effect, Pass, Purpose
from passes.grammar import check, signature
from passes.precision.float16 import Float16
from passes.precision.rounding import LARGEST, MASK_MINIMUM
from passes.quantize.dynamic_int8 import DynamicInt8
from passes.quantize.int8_embeddings import Int8Embeddings

GPU = Context(CUDA)
HALF = ir.DataType.FLOAT16
HALF_ROUNDING = 2.0**-11
"""Largest relative error of rounding to float16."""


def halves(model: ir.Model) -> set[str | None]:
    return {node.name for node in model.graph if any(output.dtype == HALF for output in node.outputs)}


def unary(op: str, *, shape: list[int | str] | None = None, **attributes: object) -> ir.Model:
    graph = Builder()
    x = graph.input("x", FLOAT, ["m", 8])
    return graph.model(graph.add(op, x, name="y", **attributes), shape=shape or ["m", 8])


def binary(op: str, number: float) -> ir.Model:
    graph = Builder()
    x = graph.input("x", FLOAT, ["m", 8])
    return graph.model(graph.add(op, x, graph.floats("number", number), name="y"), shape=["m", 8])


# --- structure --------------------------------------------------------------------------------------------------------


def test_it_is_a_pass():
    assert isinstance(Float16(), Pass)
    assert (Float16.name, Float16.effect, Float16.purpose) == ("float16", Effect.LOSSY, Purpose.SIZE)


def test_structure_of_one_product():
    graph = Builder()
    x = graph.input("x", FLOAT, ["m", 8])
    weight = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    product = graph.add("MatMul", x, graph.constant("w", weight), name="product")
    model = graph.model(graph.add("Relu", product, name="y"), shape=["m", 8])
    before = signature(model)
    nodes = list(model.graph)
    outcome = Float16().run(model, GPU)
    check(model, CUDA)
    assert (outcome.changed, outcome.refused) == (2, ())
    assert signature(model) == before
    down, *middle, up = list(model.graph)
    assert middle == nodes
    assert down.op_type == up.op_type == "Cast"
    assert down.inputs[0] is model.graph.inputs[0]
    assert nodes[0].inputs[0] is down.outputs[0]
    assert nodes[0].inputs[1] is model.graph.initializers["w_fp16"]
    assert up.inputs[0] is nodes[1].outputs[0]
    assert up.outputs[0] is model.graph.outputs[0]
    assert list(model.graph.initializers) == ["w_fp16"]
    assert (model.graph.initializers["w_fp16"].const_value.numpy() == weight.astype(np.float16)).all()


@pytest.mark.parametrize("fused", [False, True])
def test_what_stays_float32_in_an_encoder(fused):
    model = Encoder(fused=fused).build()
    floats = {node.name for node in model.graph if node.outputs[0].dtype == FLOAT}
    outcome = Float16().run(model, GPU)
    check(model, CUDA)
    pooling = {"pool.mask", "pool.sum", "pool.count", "pool.clip", "pool.mean", "pool.norm", "norm.clip"}
    kept = {f"node_{name}" for name in (*pooling, "sentence_embedding")}
    assert floats - halves(model) == kept
    assert outcome.changed == len(floats - kept)
    reasons = {refusal.node: refusal.reason for refusal in outcome.refused}
    assert set(reasons) == {
        f"node_{name}" for name in ("pool.sum", "pool.count", "pool.clip", "pool.norm", "norm.clip")
    }
    assert reasons["node_pool.clip"] == "its constant 1e-09 is too small for float16"
    # Integers that a fused attention reads are what they were.
    casts = [node for node in model.graph if node.op_type == "Cast"]
    mask_types = {node.outputs[0].dtype for node in casts if node.outputs[0].name.endswith(".keys")}
    assert mask_types == {ir.DataType.INT32 if fused else BOOL}


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("target", [CUDA, TENSORRT])
def test_numbers_of_a_whole_encoder(fused, target):
    layers = 2
    reference = run(Encoder(fused=fused, layers=layers).build(), feeds())
    model = Encoder(fused=fused, layers=layers).build()
    Float16().run(model, Context(target))
    # About 16 roundings a layer (6 weights, 6 products, 4 sums and norms), independent, each uniform in one step of
    # relative size at most 2 * HALF_ROUNDING.
    tolerance = 2 * HALF_ROUNDING / np.sqrt(12) * np.sqrt(16 * layers)
    for level in (ALL, DISABLED):
        result = run(model, feeds(), level)
        assert result.dtype == np.float32
        assert tolerance / 16 < relative(result, reference) < tolerance


@pytest.mark.parametrize("make", [Int8Embeddings, DynamicInt8])
def test_it_follows_the_quantizers(make):
    reference_model = Encoder().build()
    make().run(reference_model, Context(CPU))
    model = reference_model.clone()
    assert Float16().run(model, GPU).changed > 0
    check(model, CUDA)
    assert Float16().run(model, GPU).changed == 0
    reference = run(Encoder().build(), feeds())
    # The roundings of float16 come on top of those of int8, which are ten times as large.
    assert relative(run(model, feeds()), reference) < 1.3 * relative(run(reference_model, feeds()), reference) + 1e-3


@pytest.mark.parametrize("level", [ALL, DISABLED])
def test_a_row_that_is_masked_entirely_stays_finite(level):
    graph = Builder()
    scores = graph.input("scores", FLOAT, ["m", 8])
    mask = graph.input("mask", BOOL, ["m", 8])
    lowest = graph.floats("lowest", float(np.finfo(np.float32).min))
    bias = graph.add("Where", mask, graph.floats("zero", 0.0), lowest, name="bias")
    y = graph.add("Softmax", graph.add("Add", scores, bias, name="masked"), name="y", axis=-1)
    model = graph.model(y, shape=["m", 8])
    assert Float16().run(model, GPU).changed == 3
    inputs = {"scores": np.full((2, 8), -20.0, np.float32), "mask": np.zeros((2, 8), bool)}
    inputs["mask"][1, 0] = True
    y = run(model, inputs, level)
    assert np.isfinite(y).all()
    assert y[1].tolist() == [1.0] + [0.0] * 7


def rotary() -> ir.Model:
    graph = Builder()
    x = graph.input("x", FLOAT, ["s", 8])
    positions = graph.input("positions", INT64, ["s", 1])
    floats = graph.add("Cast", positions, name="floats", to=FLOAT)
    frequencies = graph.constant("frequencies", np.geomspace(1, 1e-3, 8).astype(np.float32)[None])
    angles = graph.add("Mul", floats, frequencies, name="angles")
    return graph.model(graph.add("Mul", x, graph.add("Cos", angles, name="cos"), name="y"), shape=["s", 8])


def test_the_angles_of_a_rotary_embedding_stay_float32():
    model = rotary()
    inputs = {"x": np.ones((3, 8), np.float32), "positions": np.array([[0], [4097], [30001]])}
    reference = run(rotary(), inputs)
    outcome = Float16().run(model, GPU)
    assert halves(model) == {"cos_fp16_Cast", "x_fp16_Cast", "node_y"}
    assert node_named(model, "floats").outputs[0].dtype == FLOAT
    assert node_named(model, "angles").outputs[0].dtype == FLOAT
    assert outcome.changed == 1
    # cos and the product are rounded once each; angles of rounded positions would be off by whole radians.
    assert np.abs(run(model, inputs) - reference).max() <= 2 * HALF_ROUNDING


def test_graphs_without_types_convert_the_same():
    typed, bare = Encoder(fused=True).build(), Encoder(fused=True).build()
    for node in bare.graph:
        for output in node.outputs:
            if not output.is_graph_output():
                output.type = None
    assert Float16().run(bare, GPU) == Float16().run(typed, GPU)
    assert halves(bare) == halves(typed)
    assert (run(bare, feeds()) == run(typed, feeds())).all()


# --- operators that need care -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: binary("Add", 1e-12), "its constant 1e-12 is too small for float16"),
        (lambda: binary("Div", 1e6), "its constant 1e+06 is too large for float16"),
        (lambda: binary("Pow", 2.0), "Pow needs the range or the precision of float32"),
        (lambda: unary("Exp"), "Exp needs the range or the precision of float32"),
        (lambda: unary("ReduceMean", keepdims=0, shape=[]), "ReduceMean needs the range or the precision of float32"),
    ],
)
def test_what_float16_cannot_hold_is_refused(make, reason):
    model = make()
    nodes, initializers = list(model.graph), dict(model.graph.initializers)
    outcome = Float16().run(model, GPU)
    assert outcome.changed == 0
    assert [(refusal.node, refusal.reason) for refusal in outcome.refused] == [("node_y", reason)]
    assert list(model.graph) == nodes
    assert dict(model.graph.initializers) == initializers


def test_limits_are_saturated_and_kept_apart_from_mask_minima():
    graph = Builder()
    x = graph.input("x", FLOAT, ["m", 8])
    low = graph.floats("low", float(np.finfo(np.float32).min))
    clipped = graph.add("Clip", x, low, graph.floats("high", 3e38), name="clipped")
    model = graph.model(graph.add("Add", clipped, low, name="y"), shape=["m", 8])
    assert Float16().run(model, GPU).changed == 2
    held = sorted(float(value.const_value.numpy()) for value in model.graph.initializers.values())
    assert held == [-LARGEST, MASK_MINIMUM, LARGEST]
    assert run(model, {"x": np.full((1, 8), -30000, np.float32)}).tolist() == [[-62752] * 8]


@pytest.mark.parametrize("fill", [None, 2.5])
def test_constant_of_shape_and_constant(fill):
    graph = Builder()
    x = graph.input("x", FLOAT, ["m", 8])
    shape = graph.add("Shape", x, name="shape", dtype=INT64)
    attributes = {} if fill is None else {"value": ir.tensor(np.array([fill], np.float32))}
    filled = graph.add("ConstantOfShape", shape, name="filled", **attributes)
    one = graph.add("Constant", name="one", value=ir.tensor(np.array(1.5, np.float32)))
    model = graph.model(graph.add("Add", graph.add("Mul", x, one, name="scaled"), filled, name="y"), shape=["m", 8])
    assert Float16().run(model, GPU).changed == 3
    check(model, CUDA)
    assert node_named(model, "filled").outputs[0].dtype == HALF
    assert "Constant" not in {node.op_type for node in model.graph}
    for level in (ALL, DISABLED):
        assert run(model, {"x": np.full((2, 8), 2, np.float32)}, level).tolist() == [[3 + (fill or 0)] * 8] * 2


def test_range_and_casts_to_integers_stay_float32():
    graph = Builder()
    x = graph.input("x", FLOAT, [])
    steps = graph.add("Range", graph.floats("start", 0.0), x, graph.floats("delta", 1.0), name="steps")
    halved = graph.add("Mul", steps, graph.floats("half", 0.5), name="halved")
    model = graph.model(graph.add("Cast", halved, name="y", dtype=INT64, to=INT64), shape=["n"])
    outcome = Float16().run(model, GPU)
    assert outcome.changed == 0
    assert [refusal.reason for refusal in outcome.refused] == ["Range has no float16 form"]
    assert run(model, {"x": np.array(5000, np.float32)})[-1] == 2499


def test_inputs_and_outputs_that_are_always_float32():
    graph = Builder()
    x = graph.input("x", FLOAT, [1, 1, 2, 8])
    doubled = graph.add("Relu", x, name="relu")
    scales = graph.constant("scales", np.array([1, 1, 2, 1], np.float32))
    large = graph.add("Resize", doubled, None, scales, name="large", mode="nearest")
    gamma = graph.constant("gamma", np.ones(8, np.float32))
    outputs = [ir.Value(name=name, type=ir.TensorType(FLOAT)) for name in ("norm", "mean")]
    node = ir.node("LayerNormalization", [large, gamma], {"axis": -1}, outputs=outputs, name="node_norm")
    graph.graph.append(node)
    outputs[0].shape, outputs[1].shape = ir.Shape([1, 1, 4, 8]), ir.Shape([1, 1, 4, 1])
    model = graph.model(*outputs)
    reference = session(model.clone(), DISABLED).run(None, {"x": np.arange(16, dtype=np.float32).reshape(1, 1, 2, 8)})
    assert Float16().run(model, GPU).changed == 3
    check(model, CUDA)
    assert node_named(model, "large").inputs[2] is model.graph.initializers["scales"]
    assert model.graph.outputs[1] is node.outputs[1]
    assert node.outputs[1].dtype == FLOAT
    found = session(model, DISABLED).run(None, {"x": np.arange(16, dtype=np.float32).reshape(1, 1, 2, 8)})
    for ours, theirs in zip(found, reference, strict=True):
        assert relative(ours, theirs) <= 2 * HALF_ROUNDING


def test_a_branch_that_captures_a_half_value_reads_float32():
    graph = Builder()
    x = graph.input("x", FLOAT, ["m", 8])
    flag = graph.input("flag", BOOL, [])
    doubled = graph.add("Relu", x, name="relu")
    branches = {}
    for name, op in (("then_branch", "Neg"), ("else_branch", "Identity")):
        out = ir.Value(name=name, type=ir.TensorType(FLOAT), shape=ir.Shape(["m", 8]))
        inner = ir.node(op, [doubled], outputs=[out], name=f"node_{name}")
        branches[name] = ir.Graph([], [out], nodes=[inner], name=name)
    model = graph.model(graph.add("If", flag, name="y", **branches), shape=["m", 8])
    outcome = Float16().run(model, GPU)
    assert outcome.changed == 1
    assert [refusal.reason for refusal in outcome.refused] == ["it has a graph of its own"]
    check(model, CUDA)
    inputs = {"x": np.ones((1, 8), np.float32), "flag": np.array(True)}
    assert run(model, inputs).tolist() == [[-1.0] * 8]


def test_operators_of_unknown_domains_stay_float32():
    graph = Builder()
    x = graph.input("x", FLOAT, ["m", 8])
    model = graph.model(graph.add("Mystery", x, name="y", domain="example.com"), shape=["m", 8])
    outcome = Float16().run(model, GPU)
    assert outcome.changed == 0
    assert outcome.refused[0].reason == "hasten does not know the types of example.com.Mystery"


def test_a_clone_made_before_keeps_its_types():
    model = Encoder().build()
    clone = model.clone()
    before = ir.to_proto(clone).SerializeToString()
    Float16().run(model, GPU)
    assert ir.to_proto(clone).SerializeToString() == before


def test_one_cast_serves_all_readers_of_a_value():
    graph = Builder()
    x = graph.input("x", FLOAT, ["m", 8])
    relu = graph.add("Relu", x, name="relu")
    outputs = [graph.add("Exp", relu, name="a"), graph.add("Exp", relu, name="b"), graph.add("Relu", x, name="c")]
    model = graph.model(*outputs, shape=["m", 8])
    assert Float16().run(model, GPU).changed == 2
    check(model, CUDA)
    casts = [node for node in model.graph if node.op_type == "Cast"]
    assert len([node for node in casts if node.inputs[0] is x]) == 1
    assert len([node for node in casts if node.inputs[0] is relu]) == 1


# --- non-matches and idempotence --------------------------------------------------------------------------------------


def test_targets_that_compute_in_float32_are_refused():
    model = Encoder().build()
    before = ir.to_proto(model).SerializeToString()
    outcome = Float16().run(model, Context(CPU))
    assert outcome.changed == 0
    assert outcome.refused[0].reason == "cpu computes in float32"
    assert ir.to_proto(model).SerializeToString() == before


def test_integer_graphs_are_left_alone():
    graph = Builder()
    ids = graph.input("ids", INT64, ["m"])
    model = graph.model(graph.add("Mul", ids, graph.ints(2), name="y", dtype=INT64), shape=["m"])
    assert Float16().run(model, GPU).changed == 0


@pytest.mark.parametrize("make", [lambda: Encoder().build(), lambda: Encoder(fused=True).build(), rotary])
def test_a_second_run_changes_nothing(make):
    model = make()
    first = Float16().run(model, GPU)
    assert first.changed > 0
    before = ir.to_proto(model).SerializeToString()
    second = Float16().run(model, GPU)
    assert second.changed == 0
    assert second.refused == first.refused
    assert ir.to_proto(model).SerializeToString() == before
