"""prompt-int8: structure, both forms against an oracle in a real ONNX Runtime, rows apart, refusals, idempotence."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from encoder_graphs import ALL, DISABLED, FLOAT, INT64, Builder, Encoder, operators, run

from artifacts.errors import UsageError
from artifacts.target import CPU, CUDA
from passes.base import Context, Effect, Pass, Purpose
from passes.grammar import check, signature
from passes.observers import Verifying
from passes.pipeline import Pipeline, parse
from passes.quantize.arithmetic import quantize_columns
from passes.quantize.blocks import pack, unpack
from passes.quantize.prompt_branches import SMALLEST, stored_weight
from passes.quantize.prompt_int8 import PromptInt8
from passes.quantize.weight_only import WeightOnly

HERE = Context(CPU)
RNG = np.random.default_rng(7)
WIDTH, COLUMNS, WORDS = 72, 32, 50
WEIGHT = (RNG.normal(size=(WIDTH, COLUMNS)) + 0.3).astype(np.float32)
BIAS = RNG.normal(size=COLUMNS).astype(np.float32)
HEAD = RNG.normal(size=(COLUMNS, WORDS)).astype(np.float32)
TABLE = (RNG.normal(size=(WORDS, WIDTH)) * np.logspace(-3, 3, WORDS)[:, None]).astype(np.float32)
TABLE[0] = 0.0
EPS = float(np.finfo(np.float32).eps)


def decoder(opset: int = 21, *, bias: bool = True) -> ir.Model:
    """A product of embedded tokens, and a head over what logits_index names of it."""
    graph = Builder(opset)
    ids = graph.input("input_ids", INT64, ["batch", "sequence"])
    places = graph.input("logits_index", INT64, ["batch", "positions"])
    words = graph.add("Gather", graph.constant("table", TABLE), ids, name="words")
    hidden = graph.add("MatMul", words, graph.constant("w", WEIGHT), name="product", path="layer/layer.dense")
    if bias:
        hidden = graph.add("Add", hidden, graph.constant("b", BIAS), name="hidden")
    wide = graph.add("Unsqueeze", places, graph.ints(-1), name="places", dtype=INT64)
    chosen = graph.add("GatherND", hidden, wide, name="chosen", batch_dims=1)
    logits = graph.add("MatMul", chosen, graph.constant("head", HEAD), name="logits", path="lm_head")
    hidden.shape = ir.Shape(["batch", "sequence", COLUMNS])
    logits.shape = ir.Shape(["batch", "positions", WORDS])
    return graph.model(hidden, logits)


def made(item: PromptInt8, bits: int = 4, *, symmetric: bool = False, bias: bool = True) -> tuple[ir.Model, ir.Model]:
    """The graph before and after the pass."""
    before = decoder(bias=bias)
    WeightOnly(bits, symmetric=symmetric).run(before, HERE)
    after = before.clone()
    ((_, outcome),) = Pipeline((item,)).run(after, HERE, observers=(Verifying(HERE),))
    assert (outcome.changed, outcome.refused) == (1, ())
    return before, after


def fed(ids: list[list[int]]) -> dict[str, np.ndarray]:
    return {"input_ids": np.array(ids), "logits_index": np.zeros((len(ids), 1), np.int64)}


def branches(model: ir.Model) -> tuple[ir.Node, ir.Graph, ir.Graph]:
    (chosen,) = (node for node in model.graph if node.op_type == "If")
    return chosen, chosen.attributes["then_branch"].as_graph(), chosen.attributes["else_branch"].as_graph()


def test_it_is_a_pass():
    assert isinstance(PromptInt8(), Pass)
    assert (PromptInt8.name, PromptInt8.effect, PromptInt8.purpose) == ("prompt-int8", Effect.LOSSY, Purpose.SPEED)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("count", [1, 3, 8, 9])
def test_codes_are_unpacked_as_they_were_packed(bits, count):
    codes = RNG.integers(0, 1 << bits, (5, 2, count)).astype(np.uint8)
    assert unpack(pack(codes, bits), bits, count).tolist() == codes.tolist()


def test_structure():
    before, after = made(PromptInt8())
    assert signature(after) == signature(before)
    (product,) = (
        node for node in before.graph if node.op_type == "MatMulNBits" and node.attributes["N"].as_int() == COLUMNS
    )
    chosen, then, step = branches(after)
    (kept,) = step
    assert (kept.op_type, kept.domain, kept.attributes) == (product.op_type, product.domain, product.attributes)
    assert kept.inputs[0] is after.graph.initializers["table"].uses()[0].node.outputs[0]
    assert [value.name for value in step.initializers.values()] == [value.name for value in kept.inputs[1:] if value]
    for old, new in zip(product.inputs[1:], kept.inputs[1:], strict=True):
        assert (old is None) == (new is None)
        if old is not None and new is not None:
            assert old.const_value is new.const_value
            assert old.name not in after.graph.initializers, "nobody else reads it"
    assert operators_of(then) == ["Abs", "ReduceMax", "Max", "Mul", "Shape", "Expand", "QuantizeLinear",
                                  "MatMulIntegerToFloat", "Mul", "Add"]  # fmt: skip
    assert {value.name for node in then for value in node.inputs if value and value.graph is not then} >= {"words"}
    assert chosen.outputs[0] is after.graph.outputs[0]
    (longer,) = (node for node in after.graph if node.op_type == "GreaterOrEqual")
    assert chosen.inputs == (longer.outputs[0],)
    assert [node.op_type for node in after.graph][:2] == ["Shape", "GreaterOrEqual"]
    assert operators(after)["MatMulNBits"] == 1, "the head stays as it is"


def test_many_texts_take_the_form_of_prompts_and_so_does_the_head():
    before, after = made_all(PromptInt8(texts=3))
    _, alone = made(PromptInt8())
    heads = [node for node in after.graph if node.op_type == "If"]
    assert [node.inputs[0].producer().op_type for node in heads] == ["Or", "GreaterOrEqual"]
    for texts in (1, 2, 3, 5):
        ids = [[7 + text] for text in range(texts)]
        reads = fed([[*one, 4] for one in ids])
        # A step of few texts is that of before, bit by bit; one of many is what a prompt's token is.
        found, old, prompt = run(after, fed(ids), ALL), run(before, fed(ids), ALL), run(alone, reads, ALL)
        if texts < 3:
            np.testing.assert_array_equal(found, old)
        else:
            assert not np.array_equal(found, old)
            np.testing.assert_array_equal(found[:, 0], prompt[:, 0])


def made_all(item: PromptInt8) -> tuple[ir.Model, ir.Model]:
    """As `made`, where the head is rewritten too."""
    before = decoder()
    WeightOnly(symmetric=False).run(before, HERE)
    after = before.clone()
    ((_, outcome),) = Pipeline((item,)).run(after, HERE, observers=(Verifying(HERE),))
    assert (outcome.changed, outcome.refused) == (2, ())
    assert Pipeline((item,)).run(after, HERE)[0][1].changed == 0
    return before, after


def operators_of(graph: ir.Graph) -> list[str]:
    return [node.op_type for node in graph]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("level", [ALL, DISABLED])
@pytest.mark.parametrize("reduced", [False, True])
def test_a_prompt_is_read_in_int8(bits, symmetric, bias, level, reduced):
    _, after = made(PromptInt8(reduce_range=reduced), bits, symmetric=symmetric, bias=bias)
    ids = [list(range(WORDS)), list(range(WORDS))[::-1]]
    found = run(after, fed(ids), level).astype(np.float64)
    x = TABLE[np.array(ids)].astype(np.float64)
    _, _, step = branches(after)
    stored = stored_weight(next(iter(step)))
    weight = quantize_columns(stored, reduce_range=reduced)
    scale = np.maximum(np.abs(x).max(-1, keepdims=True), SMALLEST) / 127
    codes = weight.values.astype(np.float64) * weight.scale
    added = BIAS if bias else np.zeros(COLUMNS)
    # An input is rounded by half a step at most, or a hair more where it lay between two; a weight by half its own.
    exact = x @ stored.astype(np.float64) + added
    rounded = (0.5 + 2.0**-14) * scale * np.abs(codes).sum(0) + np.abs(x).sum(-1, keepdims=True) * weight.scale / 2
    floats = 8 * EPS * ((np.abs(x) + scale) @ np.abs(codes) + np.abs(added))
    assert (np.abs(found - exact) <= rounded + floats).all()
    # What is nearest is the same in all but a few places: then the difference is that of float32 alone.
    nearest = (np.rint(x / scale) * scale) @ codes + added
    assert (np.abs(found - nearest) <= floats + EPS * np.abs(exact)).mean() > 0.95
    assert np.array_equal(found[0, 0], np.broadcast_to(added, COLUMNS).astype(np.float32)), "a row of zeros"


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("level", [ALL, DISABLED])
def test_a_step_is_computed_as_before_bit_by_bit(bits, level):
    before, after = made(PromptInt8(), bits)
    for rows in (1, 2, 8, 33):
        feeds = fed(RNG.integers(0, WORDS, (rows, 1)).tolist())
        np.testing.assert_array_equal(run(after, feeds, level), run(before, feeds, level))


def test_how_many_tokens_a_step_may_have():
    before, after = made(PromptInt8(above=4))
    for length in (1, 4, 5):
        feeds = fed(RNG.integers(30, WORDS, (2, length)).tolist())
        assert np.array_equal(run(after, feeds), run(before, feeds)) == (length <= 4)


def test_a_token_does_not_depend_on_what_else_is_read():
    _, after = made(PromptInt8())
    ids = RNG.integers(0, WORDS, (3, 40)).tolist()
    together = run(after, fed(ids))
    for row, found in zip(ids, together, strict=True):
        for start, stop in ((0, 40), (0, 2), (5, 21), (38, 40)):
            np.testing.assert_array_equal(run(after, fed([row[start:stop]]))[0], found[start:stop])


def test_a_weight_that_two_products_share_is_rounded_once():
    model = decoder(bias=False)
    words = next(node.outputs[0] for node in model.graph if node.outputs[0].name == "words")
    twin = ir.node(
        "MatMul", [words, model.graph.initializers["w"]], outputs=[ir.Value(name="twin", type=ir.TensorType(FLOAT))]
    )
    twin.outputs[0].shape = ir.Shape(["batch", "sequence", COLUMNS])
    model.graph.insert_after(words.producer(), twin)
    model.graph.outputs.append(twin.outputs[0])
    WeightOnly().run(model, HERE)
    assert PromptInt8().run(model, HERE).changed == 2
    check(model, CPU)
    weights = [value for value in model.graph.initializers.values() if value.dtype == ir.DataType.INT8]
    assert [len(tuple(value.uses())) for value in weights] == [2]
    np.testing.assert_array_equal(*(value for value in (run_all(model, fed([[3, 4]]), "product", "twin"))))


def run_all(model: ir.Model, feeds: dict[str, np.ndarray], *names: str) -> list[np.ndarray]:
    found = []
    for name in names:
        copy = model.clone()
        kept = [value for value in copy.graph.outputs if value.name == name]
        copy.graph.outputs.clear()
        copy.graph.outputs.extend(kept)
        found.append(run(copy, feeds))
    return found


def test_what_is_no_decoder_or_has_no_such_products_is_left():
    for model in (Encoder().build(), decoder()):
        before = ir.to_proto(model).SerializeToString()
        assert PromptInt8().run(model, HERE).changed == 0
        assert ir.to_proto(model).SerializeToString() == before
    encoder = Encoder().build()
    WeightOnly().run(encoder, HERE)
    assert PromptInt8().run(encoder, HERE) == PromptInt8().run(encoder, HERE)
    assert PromptInt8().run(encoder, HERE).changed == 0


@pytest.mark.parametrize(
    ("item", "context", "opset", "reason"),
    [
        (PromptInt8(), Context(CUDA), 21, "no kernel for it is known of CUDAExecutionProvider"),
        (PromptInt8(), HERE, 20, "opset 20 does not quantize in blocks"),
        (PromptInt8(skip=("layer*",)), HERE, 21, "layer.dense is skipped by 'layer*'"),
        (PromptInt8(only=("other",)), HERE, 21, "the only pattern fits no product in few bits"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refusals(item, context, opset, reason):
    model = decoder(opset)
    WeightOnly().run(model, HERE)
    before = ir.to_proto(model).SerializeToString()
    outcome = item.run(model, context)
    assert (outcome.changed, [refusal.reason for refusal in outcome.refused]) == (0, [reason])
    assert ir.to_proto(model).SerializeToString() == before


def test_rows_in_an_order_of_their_own_are_refused():
    model = decoder(bias=False)
    WeightOnly().run(model, HERE)
    node = next(node for node in model.graph if node.op_type == "MatMulNBits")
    order = ir.Value(
        name="order", const_value=ir.tensor(np.arange(96, dtype=np.int32)), type=ir.TensorType(ir.DataType.INT32)
    )
    model.graph.register_initializer(order)
    node.resize_inputs(5)
    node.replace_input_with(4, order)
    outcome = PromptInt8().run(model, HERE)
    assert [refusal.reason for refusal in outcome.refused] == ["its rows are in an order of their own"]


def test_the_text_form_reads_back():
    pipeline = Pipeline((PromptInt8(4, reduce_range=True, skip=("a",)),))
    assert parse(str(pipeline)) == pipeline
    with pytest.raises(UsageError, match="above is 0; a step has 1 token"):
        parse("prompt-int8(above=0)")
