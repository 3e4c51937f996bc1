"""pack-attention: structure, numbers, what is refused, what is left, idempotence."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from builders import CONTEXT, GraphBuilder, apply, operators, random
from rotary_graphs import HEADS, KV_HEADS, Attention, Form, held_equal

from passes.base import Effect, Purpose
from passes.fusion import FuseRotary, PackAttention, PackProducts

REACH = 64 * float(np.finfo(np.float32).eps)
"""The same numbers out of another buffer: a few roundings of sums of at most 48 products."""
INT64, INT32 = ir.DataType.INT64, ir.DataType.INT32
WIDTH = 16
SIZES = {"q": HEADS * WIDTH, "k": KV_HEADS * WIDTH, "v": KV_HEADS * WIDTH, "rest": 24}
ORDER = ("q", "k", "v")


def attention(order: tuple[str, ...] = ORDER, *, sliced: bool = False, read: str = "") -> ir.Model:
    """An attention that reads parts of one product, cut off in this order; ``read`` is an output of the graph too."""
    g = GraphBuilder(21)
    x = g.input("x", ("batch", "sequence", 32))
    g.input("position_ids", ("batch", "sequence"), INT64)
    lengths = g.input("seqlens_k", ("batch",), INT32), g.input("total_sequence_length", (), INT32)
    cache = ("batch", KV_HEADS, "capacity", WIDTH)
    past = g.input("past.key", cache), g.input("past.value", cache)
    sizes = [SIZES[name] for name in order]
    whole = g.add("MatMul", x, g.constant(random(1, 32, sum(sizes)) / 4), shape=("batch", "sequence", sum(sizes)))
    if sliced:
        ends = np.cumsum(sizes).tolist()
        cuts = [
            g.add("Slice", whole, *map(g.constant, ([end - size], [end], [-1])), shape=("batch", "sequence", size))
            for size, end in zip(sizes, ends, strict=True)
        ]
    else:
        node = g.add("Split", whole, g.constant(sizes), axis=-1, outputs=len(sizes)).producer()
        assert node is not None
        cuts = list(node.outputs)
    parts = dict(zip(order, cuts, strict=True))
    for name, part in parts.items():
        part.name, part.dtype, part.shape = name, ir.DataType.FLOAT, ir.Shape(("batch", "sequence", SIZES[name]))
    attributes = {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "scale": WIDTH**-0.5}
    operands = *(parts[name] for name in ORDER), *past, *lengths
    maker = g.add("GroupQueryAttention", *operands, domain="com.microsoft", outputs=3, **attributes).producer()
    assert maker is not None
    shapes = ("batch", "sequence", SIZES["q"]), cache, cache
    for value, name, shape in zip(maker.outputs, ("y", "present.key", "present.value"), shapes, strict=True):
        value.name, value.shape, value.dtype = name, ir.Shape(shape), ir.DataType.FLOAT
    others = [parts[name] for name in ("rest", read) if name in parts]
    return g.finish(*maker.outputs, *others)


def attention_of(model: ir.Model) -> ir.Node:
    return next(node for node in model.graph if node.op_type == "GroupQueryAttention")


def test_it_is_exact_and_for_speed() -> None:
    assert (PackAttention.effect, PackAttention.purpose) == (Effect.EXACT, Purpose.SPEED)


@pytest.mark.parametrize("sliced", [False, True])
def test_structure_and_numbers(sliced: bool) -> None:
    model = attention(sliced=sliced)
    held_equal(model, lambda: apply(PackAttention(), model), REACH)
    product, node = model.graph
    assert (product.op_type, node.op_type) == ("MatMul", "GroupQueryAttention")
    assert node.inputs[0] is product.outputs[0]
    assert node.inputs[1] is None
    assert node.inputs[2] is None
    assert len(model.graph.initializers) == 1


@pytest.mark.parametrize("order", [(*ORDER, "rest"), ("rest", *ORDER)])
def test_other_parts_stay_parts(order: tuple[str, ...]) -> None:
    model = attention(order)
    rest = model.graph.outputs[3].name
    held_equal(model, lambda: apply(PackAttention(), model), REACH)
    assert operators(model) == {"GroupQueryAttention": 1, "MatMul": 1, "Split": 1}
    split = next(node for node in model.graph if node.op_type == "Split")
    place = order.index("q")
    assert attention_of(model).inputs[0] is split.outputs[place]
    assert model.graph.outputs[3].name == rest == "rest"
    assert model.graph.outputs[3] is split.outputs[1 - place]
    assert str(split.outputs[place].shape) == "[batch,sequence,128]"


@pytest.mark.parametrize("biased", [False, True])
def test_behind_pack_products_and_fuse_rotary_one_product_feeds_the_attention(biased: bool) -> None:
    model = Attention(Form(biased=biased)).build()

    def change() -> None:
        for item in (FuseRotary(32), PackProducts(), PackAttention()):
            assert apply(item, model).changed == 1

    held_equal(model, change, REACH)
    assert operators(model) == {"GroupQueryAttention": 1, "MatMul": 1, **({"Add": 1} if biased else {})}
    assert attention_of(model).attributes["do_rotary"].as_int() == 1


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (attention(("k", "q", "v")), "do not lie behind each other"),
        (attention(("q", "rest", "k", "v")), "do not lie behind each other"),
        (attention((*ORDER, "rest"), sliced=True), "other parts"),
        (attention(read="k"), "used elsewhere"),
    ],
    ids=["order", "gap", "slices of more", "read"],
)
def test_refusals(model: ir.Model, reason: str) -> None:
    before = operators(model)
    (refusal,) = apply(PackAttention(), model).refused
    assert reason in refusal.reason
    assert operators(model) == before


def test_products_of_their_own_are_left() -> None:
    model = Attention(Form()).build()
    before = operators(model)
    outcome = PackAttention().run(model, CONTEXT)
    assert (outcome.changed, outcome.refused) == (0, ())
    assert operators(model) == before
