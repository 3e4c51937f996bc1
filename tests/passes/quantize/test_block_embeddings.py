"""block-embeddings: structure, numbers in a real ONNX Runtime, bytes shared with a tied head, refusals, idempotence."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from encoder_graphs import ALL, DISABLED, INT64, Builder, Encoder, feeds, operators, relative, run

from artifacts.errors import UsageError
from artifacts.target import CPU, CUDA
from compiler.graphs import EXTERNAL_FROM, GraphFolder
from passes.base import Context, Effect, Pass, Purpose
from passes.grammar import check, signature
from passes.pipeline import parse
from passes.quantize.block_embeddings import BlockEmbeddings
from passes.quantize.blocks import Grid
from passes.quantize.methods import Method, round_weight

HERE = Context(CPU)
WIDTH = 128
TABLE = np.random.default_rng(5).normal(size=(600, WIDTH)).astype(np.float32)
IDS = np.array([[0, 599, 7], [7, 7, 300]])


def lookup(table: np.ndarray = TABLE, *, twice: bool = False) -> Builder:
    graph = Builder()
    ids = graph.input("ids", INT64, ["b", "s"])
    held = graph.constant("table", table)
    dtype = ir.DataType.from_numpy(table.dtype)
    graph.graph.outputs.append(graph.add("Gather", held, ids, name="found", dtype=dtype, path="words"))
    if twice:
        graph.graph.outputs.append(graph.add("Gather", held, ids, name="again", axis=0))
    for output in graph.graph.outputs:
        output.shape = ir.Shape(["b", "s", table.shape[1]])
    return graph


def tied(*, transposed: bool) -> ir.Model:
    """A look-up and a head that reads the same initializer, [V, D] by Gemm or its own copy [D, V] by MatMul."""
    graph = lookup()
    flat = graph.add("Reshape", graph.graph.outputs[0], graph.ints(-1, WIDTH), name="flat")
    if transposed:
        copy = graph.constant("head", np.ascontiguousarray(TABLE.T))
        return graph.model(graph.add("MatMul", flat, copy, name="logits", path="lm_head"), shape=["n", 600])
    head = graph.add("Gemm", flat, graph.constant("table", TABLE), name="logits", transB=1, path="lm_head")
    return graph.model(head, shape=["n", 600])


def test_it_is_a_pass():
    assert isinstance(BlockEmbeddings(), Pass)
    assert BlockEmbeddings.name == "block-embeddings"
    assert (BlockEmbeddings.effect, BlockEmbeddings.purpose) == (Effect.LOSSY, Purpose.SIZE)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_structure(bits, symmetric):
    model = lookup().model()
    before = signature(model)
    outcome = BlockEmbeddings(bits, 64, symmetric).run(model, HERE)
    check(model, CPU)
    assert (outcome.changed, outcome.refused) == (1, ())
    assert signature(model) == before
    (node,) = model.graph
    assert (node.op_type, node.domain) == ("GatherBlockQuantized", "com.microsoft")
    initializers = model.graph.initializers
    codes = initializers["table_uint8" if bits == 8 else f"table_int{bits}"]
    zero = () if symmetric else (initializers["table_zero_point"],)
    assert node.inputs == (codes, model.graph.inputs[0], initializers["table_scale"], *zero)
    assert tuple(codes.shape) == (600, WIDTH * bits // 8)
    assert tuple(initializers["table_scale"].shape) == (600, 2)
    assert len(initializers) == 2 + len(zero)
    assert {name: value.as_int() for name, value in node.attributes.items()} == {
        "bits": bits, "block_size": 64, "gather_axis": 0, "quantize_axis": 1
    }  # fmt: skip


@pytest.mark.parametrize("level", [ALL, DISABLED])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_kernel_reads_the_table_as_the_oracle(bits, block, symmetric, level):
    model = lookup().model()
    assert BlockEmbeddings(bits, block, symmetric).run(model, HERE).changed == 1
    found = run(model, {"ids": IDS}, level)
    held = round_weight(TABLE.T, Grid(bits, block, symmetric), Method.MSE).dequantize(WIDTH).T
    np.testing.assert_array_equal(found, held[IDS])
    # A normal distribution in 4, 16 or 256 levels: the squared error of the best quantizers is 0.12, 0.0115 and 0.0002.
    assert relative(found, TABLE[IDS]) < {2: 0.4, 4: 0.12, 8: 0.012}[bits]


def test_numbers_of_a_whole_encoder():
    reference = run(Encoder().build(), feeds())
    errors = []
    for bits in (4, 8):
        model = Encoder().build()
        assert BlockEmbeddings(bits).run(model, HERE).changed == 1
        check(model, CPU)
        errors.append(relative(run(model, feeds()), reference))
    # One rounding of the input, steps of about 2.1 / 8 of its deviation; sqrt(2) for each of the two layers.
    tolerance = 2.1 / 8 / np.sqrt(12) * 2
    assert tolerance / 8 < errors[0] < tolerance
    assert errors[1] < errors[0] / 8


def test_a_table_of_two_look_ups_is_rounded_once():
    model = lookup(twice=True).model()
    assert BlockEmbeddings().run(model, HERE).changed == 2
    check(model, CPU)
    assert sorted(model.graph.initializers) == ["table_int4", "table_scale"]
    assert operators(model) == {"GatherBlockQuantized": 2}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("options", ["bits=8, block_size=128", "symmetric=false", "method=rtn", "method=hqq"])
def test_a_tied_head_shares_its_file(tmp_path, transposed, options):
    model = tied(transposed=transposed)
    reference = run(model.clone(), {"ids": IDS})
    pipeline = parse(f"weight-only({options}); block-embeddings({options})")
    assert [outcome.changed for _, outcome in pipeline.run(model, HERE)] == [1, 1]
    check(model, CPU)
    limit = 0.02 if "bits=8" in options else 0.2
    assert relative(run(model, {"ids": IDS}), reference) < limit
    saved = GraphFolder(tmp_path).save(model)
    large = [value for value in model.graph.initializers.values() if value.const_value.nbytes >= EXTERNAL_FROM]
    codes = [
        value for value in large if value.const_value.nbytes == 600 * WIDTH * (8 if "bits=8" in options else 4) // 8
    ]
    assert len(codes) == 2
    assert codes[0].shape != codes[1].shape
    files = {value.const_value.tobytes() for value in large}
    assert len(saved.weights) == len(files) == len(large) // 2


def test_the_head_may_have_a_precision_of_its_own():
    model = tied(transposed=True)
    pipeline = parse("weight-only(bits=8, only=[lm_head]); weight-only(skip=[lm_head]); block-embeddings")
    outcomes = pipeline.run(model, HERE)
    assert [outcome.changed for _, outcome in outcomes] == [1, 0, 1]
    bits = {node.op_type: node.attributes["bits"].as_int() for node in model.graph if node.op_type != "Reshape"}
    assert bits == {"GatherBlockQuantized": 4, "MatMulNBits": 8}


def test_a_head_that_still_reads_the_table_makes_it_refuse():
    model = tied(transposed=False)
    outcome = BlockEmbeddings().run(model, HERE)
    assert outcome.changed == 0
    assert "node_logits reads the table too" in outcome.refused[0].reason
    assert outcome.refused[0].remedy == "run weight-only before"


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (TABLE[:40], "a table of 40 rows is too small to matter"),
        (TABLE[:, :8].copy(), "rows of 8 are too short for a scale each"),
        (TABLE[:, :40].copy(), "rows of 40 are no multiple of a block of 32"),
        (TABLE.astype(np.float16), "the table is not float32"),
        (np.where(TABLE > 3, np.nan, TABLE), "the table has values that are not finite"),
    ],
)
def test_refusals(table, reason):
    model = lookup(table).model()
    nodes, initializers = list(model.graph), dict(model.graph.initializers)
    outcome = BlockEmbeddings().run(model, HERE)
    assert outcome.changed == 0
    assert [refusal.reason for refusal in outcome.refused] == [reason]
    assert list(model.graph) == nodes
    assert dict(model.graph.initializers) == initializers


def test_other_targets_are_refused():
    outcome = BlockEmbeddings().run(lookup().model(), Context(CUDA))
    assert (outcome.changed, len(outcome.refused)) == (0, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [("bits=5", "bits is 5"), ("block_size=8", "block_size is 8"), ("method=gptq", "rtn, mse, hqq")],
)
def test_impossible_options_are_refused(text, message):
    with pytest.raises(UsageError, match=message):
        parse(f"block-embeddings({text})")


def test_a_second_run_changes_nothing():
    model = Encoder().build()
    assert BlockEmbeddings().run(model, HERE).changed == 1
    before = ir.to_proto(model).SerializeToString()
    assert BlockEmbeddings().run(model, HERE).changed == 0
    assert ir.to_proto(model).SerializeToString() == before
