"""int8-embeddings: structure, numbers in a real ONNX Runtime, refusals, idempotence."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from encoder_graphs import ALL, DISABLED, INT64, Builder, Encoder, feeds, node_named, operators, relative, run

from artifacts.target import CPU
from passes.base import Context, Effect, Pass, Purpose
from passes.grammar import check, signature
from passes.quantize.arithmetic import quantize_rows
from passes.quantize.dynamic_int8 import DynamicInt8
from passes.quantize.int8_embeddings import Int8Embeddings

HERE = Context(CPU)
TABLE = np.random.default_rng(5).normal(size=(600, 32)).astype(np.float32)
IDS = np.array([[0, 599, 7], [7, 7, 300]])


def lookup(table: np.ndarray = TABLE, *, twice: bool = False) -> Builder:
    graph = Builder()
    ids = graph.input("ids", INT64, ["b", "s"])
    dtype = ir.DataType.from_numpy(table.dtype)
    found = graph.add("Gather", graph.constant("table", table), ids, name="found", dtype=dtype, path="words")
    graph.graph.outputs.append(found)
    if twice:
        graph.graph.outputs.append(graph.add("Gather", graph.constant("table", table), ids, name="again", axis=0))
    for output in graph.graph.outputs:
        output.shape = ir.Shape(["b", "s", table.shape[1]])
    return graph


def tied(*, transposed: bool) -> ir.Model:
    """A look-up and a head that reads the same initializer, [V, D] by Gemm or its own copy [D, V] by MatMul."""
    graph = lookup()
    flat = graph.add("Reshape", graph.graph.outputs[0], graph.ints(-1, 32), name="flat")
    if transposed:
        copy = graph.constant("head", np.ascontiguousarray(TABLE.T))
        return graph.model(graph.add("MatMul", flat, copy, name="logits"), shape=["n", 600])
    return graph.model(
        graph.add("Gemm", flat, graph.constant("table", TABLE), name="logits", transB=1), shape=["n", 600]
    )


def test_it_is_a_pass():
    assert isinstance(Int8Embeddings(), Pass)
    assert Int8Embeddings.name == "int8-embeddings"
    assert (Int8Embeddings.effect, Int8Embeddings.purpose) == (Effect.LOSSY, Purpose.SIZE)


def test_structure():
    model = lookup().model()
    before = signature(model)
    ids = model.graph.inputs[0]
    outcome = Int8Embeddings().run(model, HERE)
    check(model, CPU)
    assert (outcome.changed, outcome.refused) == (1, ())
    assert signature(model) == before
    product = node_named(model, "found")
    cast, scale = product.inputs[0].producer(), product.inputs[1].producer()
    integers = cast.inputs[0].producer()
    assert [n.op_type for n in (product, cast, scale, integers)] == ["Mul", "Cast", "Gather", "Gather"]
    assert integers.inputs[0] is model.graph.initializers["table_int8"]
    assert scale.inputs[0] is model.graph.initializers["table_scale"]
    assert integers.inputs[1] is ids
    assert scale.inputs[1] is ids
    assert sorted(model.graph.initializers) == ["table_int8", "table_scale"]


@pytest.mark.parametrize("level", [ALL, DISABLED])
def test_numbers_are_within_half_a_step(level):
    model = lookup().model()
    Int8Embeddings().run(model, HERE)
    found = run(model, {"ids": IDS}, level)
    quantized = quantize_rows(TABLE)
    assert (found == quantized.dequantize()[IDS]).all()
    assert (np.abs(found - TABLE[IDS]) <= quantized.scale[IDS] * (0.5 + 1e-4)).all()
    assert (found != TABLE[IDS]).mean() > 0.9


@pytest.mark.parametrize("fused", [False, True])
def test_numbers_of_a_whole_encoder(fused):
    reference = run(Encoder(fused=fused).build(), feeds())
    model = Encoder(fused=fused).build()
    assert Int8Embeddings().run(model, HERE).changed == 1
    check(model, CPU)
    # One rounding of the input: a uniform step of 1/127 of a row's peak, which is 2.6 deviations of 64 numbers. In each
    # of the 2 layers the error goes on along the residual and, independently, through the products: sqrt(2) a layer.
    tolerance = 2.6 / 127 / np.sqrt(12) * np.sqrt(2) ** 2
    for level in (ALL, DISABLED):
        error = relative(run(model, feeds(), level), reference)
        assert tolerance / 8 < error < tolerance


def test_a_table_of_two_look_ups_is_quantized_once():
    model = lookup(twice=True).model()
    assert Int8Embeddings().run(model, HERE).changed == 2
    check(model, CPU)
    assert sorted(model.graph.initializers) == ["table_int8", "table_scale"]
    assert operators(model) == {"Gather": 4, "Cast": 2, "Mul": 2}


def test_a_tied_head_makes_it_refuse():
    model = tied(transposed=False)
    nodes = list(model.graph)
    outcome = Int8Embeddings().run(model, HERE)
    assert outcome.changed == 0
    assert outcome.refused[0].node == "node_found"
    assert "node_logits reads the table too" in outcome.refused[0].reason
    assert list(model.graph) == nodes


@pytest.mark.parametrize("transposed", [False, True])
def test_a_tied_head_that_is_quantized_first_does_not(transposed):
    model = tied(transposed=transposed)
    reference = run(model.clone(), {"ids": IDS})
    assert DynamicInt8().run(model, HERE).changed == 1
    assert Int8Embeddings().run(model, HERE).changed == 1
    check(model, CPU)
    types = {
        value.dtype for value in model.graph.initializers.values() if value.shape is not None and len(value.shape) > 1
    }
    assert types == {ir.DataType.INT8, ir.DataType.FLOAT}
    assert "table" not in model.graph.initializers
    assert relative(run(model, {"ids": IDS}), reference) < 2 * 2.4 / 127 / np.sqrt(12)


def other_axis() -> ir.Model:
    graph = Builder()
    ids = graph.input("ids", INT64, ["b"])
    found = graph.add("Gather", graph.constant("table", TABLE), ids, name="found", axis=1)
    return graph.model(found, shape=[600, "b"])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: lookup(TABLE[:40]).model(), "a table of 40 rows is too small to matter"),
        (lambda: lookup(TABLE[:, :8].copy()).model(), "rows of 8 are too short for a scale each"),
        (lambda: lookup(TABLE.astype(np.float16)).model(), "the table is not float32"),
        (lambda: lookup(np.where(TABLE > 3, np.nan, TABLE)).model(), "the table has values that are not finite"),
        (other_axis, None),
    ],
)
def test_refusals(make, reason):
    model = make()
    nodes, initializers = list(model.graph), dict(model.graph.initializers)
    outcome = Int8Embeddings().run(model, HERE)
    assert outcome.changed == 0
    assert [refusal.reason for refusal in outcome.refused] == ([] if reason is None else [reason])
    assert list(model.graph) == nodes
    assert dict(model.graph.initializers) == initializers


def test_minimum_rows_is_an_option():
    model = lookup(TABLE[:40]).model()
    assert Int8Embeddings(minimum_rows=40).run(model, HERE).changed == 1
    assert run(model, {"ids": IDS % 40}).shape == (2, 3, 32)


def test_a_second_run_changes_nothing():
    model = Encoder().build()
    assert Int8Embeddings().run(model, HERE).changed == 1
    before = ir.to_proto(model).SerializeToString()
    assert Int8Embeddings().run(model, HERE).changed == 0
    assert ir.to_proto(model).SerializeToString() == before
