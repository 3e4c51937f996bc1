"""The clean-up passes: structure, numbers, non-matches, idempotence; inputs and outputs never dropped or renamed."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from builders import CONTEXT, GraphBuilder, apply, apply_equal, evaluate, operators, random

from artifacts.errors import UnsupportedError
from passes.cleanup import (
    CollapseReshapes,
    Finish,
    FoldConstants,
    HoistShapes,
    InferShapes,
    InlineFunctions,
    MergeDuplicates,
    RaiseOpset,
    RemoveIdentities,
    RemoveUnused,
    ShareInitializers,
    StripMetadata,
)
from passes.grammar import check
from passes.pipeline import Pipeline
from passes.registry import CLEAN
from passes.sites import NAME_SCOPES, module_path

SHAPE = ("batch", "sequence", 12)
INT64, BOOL = ir.DataType.INT64, ir.DataType.BOOL
X = {"x": random(0, 2, 3, 12)}


def test_remove_unused_counts_what_it_removes_and_keeps_inputs() -> None:
    g = GraphBuilder()
    x = g.input("x", SHAPE)
    g.input("unread", SHAPE)
    dead = g.add("Mul", x, g.constant(2.0, "two"))
    g.add("Add", dead, g.constant(3.0, "three"))
    model = g.finish(g.add("Neg", x, shape=SHAPE))
    # two nodes with an output each, two initializers, the import of com.microsoft
    assert apply_equal(RemoveUnused(), model, {**X, "unread": X["x"]}, exact=True).changed == 7
    assert operators(model) == {"Neg": 1}
    assert [value.name for value in model.graph.inputs] == ["x", "unread"]
    assert not model.graph.initializers


def test_fold_constants() -> None:
    g = GraphBuilder()
    x = g.input("x", SHAPE)
    weight = g.constant(random(1, 6, 12), "weight")
    turned = g.add("Transpose", g.add("Mul", weight, g.constant(2.0)), perm=[1, 0])
    node = g.add("Constant", value=ir.tensor(np.float32(1.0)))
    model = g.finish(g.add("Add", g.add("MatMul", x, turned), node, shape=("batch", "sequence", 6)))
    assert apply_equal(FoldConstants(), model, X, exact=True).changed == 3
    assert operators(model) == {"Add": 1, "MatMul": 1}
    weights = [tensor.const_value for tensor in model.graph.initializers.values() if tensor.const_value is not None]
    assert sorted(tuple(tensor.shape) for tensor in weights) == [(), (12, 6)]


def test_fold_constants_leaves_what_is_too_large_or_depends_on_inputs() -> None:
    g = GraphBuilder()
    x, default = g.input("x", SHAPE), g.input("scale", ())
    default.const_value = ir.tensor(np.float32(2.0), name="scale")
    g.graph.register_initializer(default)
    grown = g.add("Expand", g.constant(1.0), g.constant(np.array([100, 12])))
    scaled = g.add("Mul", x, g.add("Neg", default), shape=SHAPE)
    model = g.finish(scaled, g.add("Neg", grown, shape=(100, 12)))
    assert apply(FoldConstants(maximum_elements=64), model).changed == 0
    assert operators(model) == {"Expand": 1, "Mul": 1, "Neg": 2}
    np.testing.assert_array_equal(evaluate(model, {**X, "scale": np.array(3.0, np.float32)})["Mul_5_out"], -3 * X["x"])


def identity_chain() -> ir.Model:
    g = GraphBuilder()
    x = g.input("x", SHAPE)
    same = g.add("Cast", g.add("Identity", x, shape=SHAPE), to=1, shape=SHAPE)
    dropped = g.add("Dropout", g.add("Transpose", same, perm=[0, 1, 2], shape=SHAPE), shape=SHAPE)
    y = g.add("Neg", dropped, shape=SHAPE, name="neg")
    return g.finish(g.add("Identity", y, shape=SHAPE, name="y"))


def test_remove_identities() -> None:
    model = identity_chain()
    assert apply_equal(RemoveIdentities(), model, X, exact=True).changed == 5
    (node,) = model.graph
    assert node.op_type == "Neg"
    assert node.inputs[0] is model.graph.inputs[0]
    assert node.outputs[0] is model.graph.outputs[0]


def test_identities_that_onnx_needs_are_refused() -> None:
    g = GraphBuilder()
    x = g.input("x", SHAPE)
    copy = g.add("Identity", x, shape=SHAPE, name="copy")
    y = g.add("Neg", x, shape=SHAPE, name="neg")
    twin = g.add("Identity", y, shape=SHAPE, name="twin")
    weight = g.add("Identity", g.constant(random(0, 3), "w"), shape=(3,), name="weight")
    model = g.finish(copy, y, twin, weight)
    outcome = apply_equal(RemoveIdentities(), model, X, exact=True)
    assert outcome.changed == 0
    assert [refusal.node for refusal in outcome.refused] == ["copy", "twin", "weight"]


def test_casts_and_transposes_that_do_something_stay() -> None:
    g = GraphBuilder()
    x = g.input("x", SHAPE)
    wide = g.add("Cast", x, to=11, dtype=ir.DataType.DOUBLE, shape=SHAPE)
    turned = g.add("Transpose", wide, perm=[1, 0, 2], dtype=ir.DataType.DOUBLE, shape=("sequence", "batch", 12))
    model = g.finish(turned)
    assert apply(RemoveIdentities(), model).changed == 0
    assert operators(model) == {"Cast": 1, "Transpose": 1}


def test_dropout_in_training_stays() -> None:
    g = GraphBuilder()
    x = g.input("x", SHAPE)
    model = g.finish(g.add("Dropout", x, g.constant(0.5), g.constant(np.array(True)), shape=SHAPE))
    assert apply(RemoveIdentities(), model).changed == 0


def test_share_initializers() -> None:
    g = GraphBuilder()
    x = g.input("x", SHAPE)
    first, second = g.constant(random(1, 12), "first"), g.constant(random(1, 12), "second")
    other, integer = g.constant(random(2, 12), "other"), g.constant(np.zeros(12, np.int32), "integer")
    zero = g.constant(np.zeros(12, np.float32), "zero")
    total = g.add("Add", g.add("Add", g.add("Mul", x, first), second), other)
    typed = g.add("Cast", integer, to=1)
    model = g.finish(g.add("Add", total, g.add("Add", typed, zero), shape=SHAPE))
    assert apply_equal(ShareInitializers(), model, X, exact=True).changed == 1
    assert set(model.graph.initializers) == {"first", "other", "integer", "zero"}
    assert next(iter(model.graph)).inputs[1] is next(node for node in model.graph if node.op_type == "Add").inputs[1]


def test_merge_duplicates() -> None:
    g = GraphBuilder()
    x = g.input("x", SHAPE)
    left, right = (g.add("Neg", g.add("Exp", x, shape=SHAPE), shape=SHAPE) for _ in range(2))
    model = g.finish(g.add("Add", left, right, shape=SHAPE))
    assert apply_equal(MergeDuplicates(), model, X, exact=True).changed == 2
    add = list(model.graph)[-1]
    assert add.inputs[0] is add.inputs[1]


def test_merge_duplicates_keeps_random_draws_other_attributes_and_outputs() -> None:
    g = GraphBuilder()
    x = g.input("x", SHAPE)
    drawn = [g.add("RandomNormalLike", x, shape=SHAPE) for _ in range(2)]
    soft = [g.add("Softmax", x, axis=axis, shape=SHAPE) for axis in (1, 2)]
    outputs = [g.add("Neg", x, shape=SHAPE, name=name) for name in ("first", "second")]
    model = g.finish(*drawn, *soft, *outputs)
    assert apply(MergeDuplicates(), model).changed == 0
    assert len(model.graph) == 6


def around_attention(last: tuple[int, ...] = (-1, 12), *, allowzero: int = 1) -> ir.Model:
    """[B, S, 12] -> [B, S, 3, 4] -> [B, S, 12], with shapes computed from another input, as torch's exporter does."""
    g = GraphBuilder()
    x, mask = g.input("x", SHAPE), g.input("mask", ("batch", "sequence"), INT64)
    batch = g.add("Shape", mask, start=0, end=1, dtype=INT64, shape=(1,))
    length = g.add("Shape", mask, start=1, end=2, dtype=INT64, shape=(1,))
    four = g.add("Concat", batch, length, g.constant(np.array([-1, 4])), axis=0, dtype=INT64, shape=(4,))
    three = g.add("Concat", batch, length, g.constant(np.array(last[:1])), axis=0, dtype=INT64, shape=(3,))
    heads = g.add("Reshape", x, four, allowzero=allowzero, shape=("batch", "sequence", 3, 4))
    back = g.add("Reshape", heads, three, allowzero=allowzero, shape=SHAPE)
    return g.finish(g.add("Neg", back, shape=SHAPE))


MASK = {"mask": np.ones((2, 3), np.int64)}


def test_collapse_reshapes_around_attention() -> None:
    for last in (-1, 12):
        model = around_attention((last,))
        assert apply_equal(CollapseReshapes(), model, {**X, **MASK}, exact=True).changed == 2
        (node,) = model.graph
        assert node.inputs[0] is model.graph.inputs[0]


def test_collapse_reshapes_keeps_what_another_reads() -> None:
    model = around_attention()
    heads = next(node for node in model.graph if node.op_type == "Reshape").outputs[0]
    model.graph.outputs.append(heads)
    assert apply_equal(CollapseReshapes(), model, {**X, **MASK}, exact=True).changed == 2
    assert operators(model) == {"Concat": 1, "Neg": 1, "Reshape": 1, "Shape": 2}


def reshape_twice(first: list[int], second: list[int], shape: tuple[int | str, ...]) -> ir.Model:
    g = GraphBuilder()
    x = g.input("x", SHAPE)
    inner = g.add("Reshape", x, g.constant(np.array(first)))
    return g.finish(g.add("Neg", g.add("Reshape", inner, g.constant(np.array(second)), shape=shape), shape=shape))


def test_a_reshape_of_a_reshape_skips_it() -> None:
    model = reshape_twice([-1, 4], [-1, 6], ("n", 6))
    assert apply_equal(CollapseReshapes(), model, X, exact=True).changed == 1
    assert operators(model) == {"Neg": 1, "Reshape": 1}


def test_a_reshape_that_copies_a_dimension_of_the_inner_one_stays() -> None:
    model = reshape_twice([3, 2, 12], [0, -1], (3, 24))
    assert apply_equal(CollapseReshapes(), model, X, exact=True).changed == 0


def test_a_reshape_to_other_lengths_of_one_rank_stays() -> None:
    g = GraphBuilder()
    x, y = g.input("x", SHAPE), g.input("y", ("rows", "columns"))
    sizes = g.add("Shape", g.add("Transpose", y, perm=[1, 0], shape=("columns", "rows")), dtype=INT64)
    turned = g.add("Reshape", y, sizes)
    swapped = g.add("Reshape", x, g.constant(np.array([3, 2, 12])), shape=(3, 2, 12))
    model = g.finish(g.add("Neg", swapped, shape=(3, 2, 12)), g.add("Neg", turned, shape=("columns", "rows")))
    assert apply_equal(CollapseReshapes(), model, {**X, "y": random(1, 2, 5)}, exact=True).changed == 0


def test_a_reshape_that_makes_an_output_is_refused() -> None:
    g = GraphBuilder()
    x = g.input("x", SHAPE)
    model = g.finish(g.add("Reshape", x, g.constant(np.array([0, 0, -1])), shape=SHAPE, name="last"))
    outcome = apply_equal(CollapseReshapes(), model, X, exact=True)
    assert (outcome.changed, [refusal.node for refusal in outcome.refused]) == (0, ["last"])


def test_strip_metadata_keeps_the_module_path() -> None:
    g = GraphBuilder()
    x = g.input("x", SHAPE)
    y = g.add("Neg", x, shape=SHAPE)
    model = g.finish(y)
    node = next(iter(model.graph))
    node.metadata_props.update({NAME_SCOPES: "['', 'encoder', 'encoder.act', 'neg']", "stack_trace": "/home/somebody"})
    node.doc_string = model.graph.doc_string = "said"
    y.metadata_props["folded"] = "from"
    model.metadata_props["tool"] = "torch"
    assert apply_equal(StripMetadata(), model, X, exact=True).changed == 5
    assert module_path(node) == "encoder.act"
    assert b"somebody" not in ir.serde.serialize_model(model).SerializeToString()


def test_infer_shapes_carries_names_through_reshape() -> None:
    g = GraphBuilder()
    x = g.input("x", SHAPE)
    sizes = g.add("Shape", x, dtype=INT64)
    parts = [g.add("Gather", sizes, g.constant(np.array(i)), dtype=INT64) for i in range(2)]
    wide = [g.add("Unsqueeze", part, g.constant(np.array([0])), dtype=INT64) for part in parts]
    four = g.add("Concat", *wide, g.constant(np.array([3, 4])), axis=0, dtype=INT64)
    heads = g.add("Reshape", x, four)
    turned = g.add("Transpose", heads, perm=[0, 2, 1, 3])
    added = g.add("Add", turned, g.constant(random(0, 3, 1, 4)))
    model = g.finish(g.add("Neg", added, shape=("batch", 3, "sequence", 4)))
    assert apply_equal(InferShapes(), model, X, exact=True).changed > 0
    assert str(heads.shape) == "[batch,sequence,3,4]"
    assert str(added.shape) == "[batch,3,sequence,4]"


def test_infer_shapes_does_not_call_unknown_lengths_equal() -> None:
    g = GraphBuilder()
    x, y = g.input("x", ("n", 4)), g.input("y", ("m", 4))
    total = g.add("Add", x, y)
    model = g.finish(g.add("Neg", total, shape=("k", 4)))
    apply(InferShapes(), model)
    assert total.shape is None or str(total.shape[0]) not in ("n", "m")
    assert str(model.graph.outputs[0].shape) == "[k,4]"


def test_raise_opset() -> None:
    g = GraphBuilder(opset=13)
    x = g.input("x", SHAPE)
    model = g.finish(g.add("ReduceMean", g.add("Relu", x), axes=[-1], shape=("batch", "sequence", 1)))
    assert apply_equal(RaiseOpset(), model, X).changed == 1
    assert model.graph.opset_imports[""] == 20
    assert operators(model)["ReduceMean"] == 1
    assert apply(RaiseOpset(minimum=18), model).changed == 0


def test_inline_functions() -> None:
    inner = ir.Value(name="a", type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.Node("", "Neg", [inner], name="inner")
    graph = ir.Graph([inner], [node.outputs[0]], nodes=[node], opset_imports={"": 21}, name="Twice")
    function = ir.Function("local", "Negate", graph=graph, attributes=[])
    g = GraphBuilder()
    x = g.input("x", SHAPE)
    y = g.add("Negate", x, domain="local", shape=SHAPE)
    model = g.finish(y)
    model.functions[function.identifier()] = function
    model.graph.opset_imports["local"] = 1
    assert apply_equal(InlineFunctions(), model, X, exact=True).changed == 2
    assert operators(model) == {"Neg": 1}


def test_finish_pins_versions_and_names_nodes() -> None:
    g = GraphBuilder(opset=25)
    x = g.input("x", SHAPE)
    model = g.finish(g.add("Neg", g.add("Relu", x, shape=SHAPE), shape=SHAPE))
    model.ir_version = 12
    for node in model.graph:
        node.name = ""
    assert apply_equal(Finish(), model, X, exact=True).changed == 4
    check(model, CONTEXT.target, finished=True)
    assert (model.ir_version, model.graph.opset_imports[""]) == (10, 24)
    assert len({node.name for node in model.graph}) == 2
    for node in model.graph:
        node.name = "same"
    assert apply(Finish(), model).changed == 1
    assert len({node.name for node in model.graph}) == 2


def test_finish_names_the_node_that_has_no_older_meaning() -> None:
    g = GraphBuilder(opset=25)
    x = g.input("x", SHAPE)
    model = g.finish(g.add("Cast", x, to=11, shape=SHAPE, name="newer", dtype=ir.DataType.DOUBLE))
    with pytest.raises(UnsupportedError, match="newer"):
        Finish().run(model, CONTEXT)


def test_the_whole_clean_up_keeps_inputs_outputs_and_numbers() -> None:
    model = around_attention()
    g = identity_chain().graph
    assert len(g.inputs) == 1
    expected = evaluate(model, {**X, **MASK})
    Pipeline(CLEAN).run(model, CONTEXT)
    assert operators(model) == {"Neg": 1}
    assert [value.name for value in model.graph.inputs] == ["x", "mask"]
    for name, array in evaluate(model, {**X, **MASK}).items():
        np.testing.assert_array_equal(array, expected[name])
    assert all(outcome.changed == 0 for _, outcome in Pipeline(CLEAN).run(model, CONTEXT))

    """position_ids[:, :sequence] expanded to [batch, sequence], its -1 spelt Where(Equal(shape, -1), ones, shape)."""
    """position_ids[:, :sequence] expanded to [batch, sequence]; its -1 is Where(Equal(shape, -1), ones, shape)."""
    g = GraphBuilder()
    ids = g.input("ids", ("batch", "sequence"), INT64)
    sizes = g.add("Shape", ids, dtype=INT64)
    zero = g.constant(np.array([0]))
    batch, length = (
        g.add("Unsqueeze", g.add("Gather", sizes, g.constant(np.array(i)), dtype=INT64), zero, dtype=INT64)
        for i in range(2)
    )
    table = g.constant(np.arange(16).reshape(1, 16))
    one = g.constant(np.array([1]))
    positions = g.add("Slice", table, zero, length, one, one, dtype=INT64)
    wanted = g.add("Concat", batch, length, axis=0, dtype=INT64)
    flat = g.add("Reshape", wanted, g.constant(np.array([-1])), dtype=INT64)
    ones = g.add("ConstantOfShape", g.constant(np.array([2])), value=ir.tensor(np.array([1])), dtype=INT64)
    check = g.add("Equal", flat, g.add("Mul", ones, g.constant(np.array(-1)), dtype=INT64), dtype=BOOL)
    shape = g.add("Where", check, ones, flat, dtype=INT64)
    wide = g.add("Expand", positions, shape, dtype=INT64)
    counted = g.add("Range", g.constant(np.array(0)), g.add("Squeeze", length, dtype=INT64), g.constant(np.array(1)))
    counted.dtype = INT64
    rows = g.add("Unsqueeze", counted, g.constant(np.array([0, 2])), dtype=INT64)
    mean = g.add("ReduceMean", g.add("Cast", wide, to=1), g.constant(np.array([-1])))
    outputs = [g.add("Neg", value, dtype=value.dtype) for value in (wide, rows, mean)]
    model = g.finish(*outputs)
    for output, dims in zip(outputs, (("batch", "sequence"), (1, "sequence", 1), ("batch", 1)), strict=True):
        output.shape = ir.Shape(dims)
    feeds = {"ids": np.zeros((2, 5), np.int64)}
    expected = evaluate(model, feeds)
    apply(InferShapes(), model)
    assert str(positions.shape) == "[1,sequence]"
    assert str(wide.shape) == "[batch,sequence]"
    assert str(rows.shape) == "[1,sequence,1]"
    assert str(mean.shape) == "[batch,1]"
    assert [array.shape for array in expected.values()] == [(2, 5), (1, 5, 1), (2, 1)]


def test_hoist_shapes() -> None:
    g = GraphBuilder()
    ids, x = g.input("ids", ("batch", "sequence"), INT64), g.input("x", SHAPE)
    inner = g.add("Neg", x, shape=SHAPE)
    sizes = g.add("Shape", inner, dtype=INT64, shape=(3,))
    length = g.add("Gather", sizes, g.constant(np.array([1])), dtype=INT64, shape=(1,))
    width = g.add("Gather", sizes, g.constant(np.array(-1)), dtype=INT64, shape=())
    flat = g.add(
        "Concat", length, g.add("Unsqueeze", width, g.constant(np.array([0])), dtype=INT64), axis=0, dtype=INT64
    )
    ones = g.add("Expand", g.constant(1.0), flat, shape=("sequence", 12))
    kept = g.add("Gather", g.add("Shape", ids, dtype=INT64), g.constant(np.array(0)), dtype=INT64, shape=())
    model = g.finish(g.add("Neg", ones, shape=("sequence", 12)), g.add("Neg", kept, dtype=INT64, shape=()))
    feeds = {**X, "ids": np.zeros((2, 3), np.int64)}
    assert apply_equal(HoistShapes(), model, feeds, exact=True).changed == 2
    sources = [node.inputs[0] for node in model.graph if node.op_type == "Shape"]
    assert sources == [ids, ids]
    assert inner.producer() not in list(model.graph)


def test_hoist_shapes_leaves_lengths_without_a_name() -> None:
    g = GraphBuilder()
    x = g.input("x", SHAPE)
    inner = g.add("Neg", x, shape=(None, None, None))
    length = g.add("Gather", g.add("Shape", inner, dtype=INT64), g.constant(np.array(1)), dtype=INT64, shape=())
    model = g.finish(g.add("Neg", length, dtype=INT64, shape=()))
    assert apply(HoistShapes(), model).changed == 0
