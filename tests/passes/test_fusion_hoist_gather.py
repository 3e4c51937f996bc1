"""hoist-gather: structure, numbers, non-matches, idempotence."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from builders import Array, GraphBuilder, apply, apply_equal, operators, random
from hypothesis import given
from hypothesis import strategies as st

from passes.fusion import HoistGather, UnfuseAttention

INT64 = ir.DataType.INT64
MICROSOFT = "com.microsoft"
WIDTH, INNER = 16, 32
ROWS = ("batch", "sequence", WIDTH)
WIDE = ("batch", "sequence", INNER)
FEEDS = {"mixed": random(0, 2, 5, WIDTH), "residual": random(1, 2, 5, WIDTH)}
Tail = Callable[[GraphBuilder, ir.Value], ir.Value]


def layer(g: GraphBuilder, mixed: ir.Value, residual: ir.Value) -> ir.Value:
    """What follows the attention of an encoder's layer: its product, two norms, and the two products between them."""
    product = g.add("MatMul", mixed, g.constant(random(2, WIDTH, WIDTH)), shape=ROWS)
    total = g.add("Add", g.add("Add", product, g.constant(random(3, WIDTH)), shape=ROWS), residual, shape=ROWS)
    scale, shift = g.constant(random(4, WIDTH)), g.constant(random(5, WIDTH))
    normed = g.add("LayerNormalization", total, scale, shift, shape=ROWS, axis=-1)
    inner = g.add("MatMul", normed, g.constant(random(6, WIDTH, INNER)), shape=WIDE)
    active = g.add("Gelu", inner, shape=WIDE)
    outer = g.add("MatMul", active, g.constant(random(7, INNER, WIDTH)), shape=ROWS)
    return g.add("Add", outer, normed, shape=ROWS, name="layer")


def first(g: GraphBuilder, rows: ir.Value) -> ir.Value:
    """A classifier of the first token."""
    chosen = g.add("Gather", rows, g.constant(np.array(0)), shape=("batch", WIDTH), axis=1, name="first")
    return g.add("MatMul", chosen, g.constant(random(8, WIDTH, 3)), shape=("batch", 3))


def encoder(tail: Tail = first) -> ir.Model:
    g = GraphBuilder()
    mixed, residual = g.input("mixed", ROWS), g.input("residual", ROWS)
    return g.finish(tail(g, layer(g, mixed, residual)))


def products(model: ir.Model) -> list[object]:
    """How many rows each product has."""
    found = [node.outputs[0].shape for node in model.graph if node.op_type in ("MatMul", "MatMulNBits")]
    return [None if shape is None else shape[1] for shape in found if shape is not None and len(shape) == 3]


def test_a_classifier_computes_the_first_row_alone() -> None:
    model = encoder()
    before = operators(model)
    assert apply_equal(HoistGather(), model, FEEDS).changed == 1
    assert operators(model) == {**before, "Gather": 2, "Squeeze": 1}
    assert products(model) == [1, 1, 1]
    read = [node.inputs[0] for node in model.graph if node.op_type == "Gather"]
    assert set(read) == set(model.graph.inputs)
    assert all(value.uses() for value in model.graph.initializers.values())


def test_names_and_module_paths_stay() -> None:
    model = encoder()
    nodes = {node.name: node.outputs[0].name for node in model.graph if node.op_type != "Gather"}
    apply(HoistGather(), model)
    after = {node.name: node.outputs[0].name for node in model.graph}
    assert nodes.items() <= after.items()


def decoder(split: bool = False) -> ir.Model:
    """What follows the attention of a decoder's last layer: as `fuse-skip-layer-norm` and `pack-products` leave it."""
    g = GraphBuilder()
    mixed, residual = g.input("mixed", ROWS), g.input("residual", ROWS)
    places = g.input("logits_index", ("batch", "positions"), INT64)

    def norm(*inputs: ir.Value) -> tuple[ir.Value, ir.Value]:
        normed = g.add("SkipSimplifiedLayerNormalization", *inputs, domain=MICROSOFT, shape=ROWS, outputs=4)
        node = normed.producer()
        assert node is not None
        node.outputs[1].name = node.outputs[2].name = ""
        node.outputs[3].dtype, node.outputs[3].shape = ir.DataType.FLOAT, ir.Shape(ROWS)
        return normed, node.outputs[3]

    product = g.add("MatMul", mixed, g.constant(random(2, WIDTH, WIDTH)), shape=ROWS)
    normed, total = norm(residual, product, g.constant(random(3, WIDTH)))
    if split:
        both = g.add("MatMul", normed, g.constant(random(4, WIDTH, 2 * INNER)), shape=("batch", "sequence", 2 * INNER))
        gate = g.add("Split", both, g.constant(np.array([INNER, INNER])), shape=WIDE, outputs=2, axis=-1)
        node = gate.producer()
        assert node is not None
        up = node.outputs[1]
        up.dtype, up.shape = ir.DataType.FLOAT, ir.Shape(WIDE)
    else:
        gate = g.add("MatMul", normed, g.constant(random(4, WIDTH, INNER)), shape=WIDE)
        up = g.add("MatMul", normed, g.constant(random(5, WIDTH, INNER)), shape=WIDE)
    gate = g.add("QuickGelu", gate, domain=MICROSOFT, shape=WIDE, alpha=1.0)
    inner = g.add("Mul", gate, up, shape=WIDE)
    outer = g.add("MatMul", inner, g.constant(random(6, INNER, WIDTH)), shape=ROWS)
    last, _ = norm(total, outer, g.constant(random(7, WIDTH)))
    at = g.add("Unsqueeze", places, g.constant(np.array([2])), shape=("batch", "positions", 1), dtype=INT64)
    chosen = g.add("GatherND", last, at, shape=("batch", "positions", WIDTH), batch_dims=1)
    return g.finish(g.add("MatMul", chosen, g.constant(random(8, WIDTH, 9)), shape=("batch", "positions", 9)))


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("places", [[[4], [1]], [[0, 3, 3], [2, 1, 4]], [[-1], [-5]]])
def test_a_decoder_computes_the_rows_it_is_asked_for(split: bool, places: list[list[int]]) -> None:
    model = decoder(split)
    feeds = {**FEEDS, "logits_index": np.array(places)}
    assert apply_equal(HoistGather(), model, feeds).changed == 1
    assert operators(model)["GatherND"] == 2
    assert {str(rows) for rows in products(model)} == {"positions"}


def several(g: GraphBuilder, rows: ir.Value) -> ir.Value:
    return g.add("Gather", rows, g.constant(np.array([3, -1, 0])), shape=("batch", 3, WIDTH), axis=-2)


def test_several_rows_by_a_list() -> None:
    model = encoder(several)
    assert apply_equal(HoistGather(), model, FEEDS).changed == 1
    assert products(model) == [3, 3, 3]
    assert "Squeeze" not in operators(model)


def test_a_place_that_is_computed() -> None:
    """By nodes that stand behind what they are now needed for."""

    def tail(g: GraphBuilder, rows: ir.Value) -> ir.Value:
        place = g.input("place", (), INT64)
        at = g.add("Add", place, g.constant(np.array(1)), shape=(), dtype=INT64)
        return g.add("Gather", rows, at, shape=("batch", WIDTH), axis=1)

    model = encoder(tail)
    assert apply_equal(HoistGather(), model, {**FEEDS, "place": np.array(2)}).changed == 1
    assert products(model) == [1, 1, 1]


def test_two_rows_in_turn() -> None:
    """Of the rows that were chosen, one again."""

    def tail(g: GraphBuilder, rows: ir.Value) -> ir.Value:
        some = several(g, rows)
        more = g.add("MatMul", some, g.constant(random(8, WIDTH, WIDTH)), shape=("batch", 3, WIDTH))
        return g.add("Gather", more, g.constant(np.array(1)), shape=("batch", WIDTH), axis=1)

    model = encoder(tail)
    assert apply_equal(HoistGather(), model, FEEDS).changed == 2
    assert products(model) == [1, 1, 1, 1]


def mixing(g: GraphBuilder, rows: ir.Value) -> ir.Value:
    turned = g.add("Transpose", rows, shape=("batch", WIDTH, "sequence"), perm=[0, 2, 1])
    scores = g.add("MatMul", rows, turned, shape=("batch", "sequence", "sequence"))
    return first(g, g.add("MatMul", scores, rows, shape=ROWS))


def other_axis(g: GraphBuilder, rows: ir.Value) -> ir.Value:
    return g.add("Gather", rows, g.constant(np.array(0)), shape=("batch", "sequence"), axis=2)


def many(g: GraphBuilder, rows: ir.Value) -> ir.Value:
    places = g.constant(np.array([[0, 1], [2, 3]]))
    return g.add("Gather", rows, places, shape=("batch", 2, 2, WIDTH), axis=1)


def by_position(g: GraphBuilder, rows: ir.Value) -> ir.Value:
    """A table with a row for each position is added: it would have to be gathered from, too."""
    return first(g, g.add("Add", rows, g.constant(random(9, 1, 5, WIDTH)), shape=ROWS))


def soft(g: GraphBuilder, rows: ir.Value) -> ir.Value:
    return first(g, g.add("Softmax", rows, shape=ROWS, axis=1))


def norm_over_rows(g: GraphBuilder, rows: ir.Value) -> ir.Value:
    scale = g.constant(np.ones((5, WIDTH), np.float32))
    return first(g, g.add("LayerNormalization", rows, scale, shape=ROWS, axis=1))


def read_twice(g: GraphBuilder, rows: ir.Value) -> ir.Value:
    every = g.add("ReduceMean", rows, g.constant(np.array([1])), shape=("batch", WIDTH), keepdims=0)
    chosen = g.add("Gather", rows, g.constant(np.array(0)), shape=("batch", WIDTH), axis=1)
    return g.add("Add", every, chosen, shape=("batch", WIDTH))


def of_unknown_shape(g: GraphBuilder, rows: ir.Value) -> ir.Value:
    return first(g, g.add("Tanh", rows))


def by_its_own_rows(g: GraphBuilder, rows: ir.Value) -> ir.Value:
    """The row with the largest first number."""
    column = g.add("Gather", rows, g.constant(np.array(0)), shape=("batch", "sequence"), axis=2)
    best = g.add("ArgMax", column, shape=("batch", 1), dtype=INT64, axis=1, keepdims=1)
    at = g.add("Unsqueeze", best, g.constant(np.array([2])), shape=("batch", 1, 1), dtype=INT64)
    return g.add("GatherND", rows, at, shape=("batch", 1, WIDTH), batch_dims=1)


@pytest.mark.parametrize(
    "tail",
    [mixing, other_axis, many, by_position, soft, norm_over_rows, read_twice, of_unknown_shape, by_its_own_rows],
)
def test_others_are_left(tail: Tail) -> None:
    model = encoder(tail)
    before = operators(model)
    assert apply_equal(HoistGather(), model, FEEDS).changed == 0
    assert operators(model) == before


def test_rows_that_are_an_output_are_left() -> None:
    g = GraphBuilder()
    rows = layer(g, g.input("mixed", ROWS), g.input("residual", ROWS))
    model = g.finish(first(g, rows), rows)
    assert apply_equal(HoistGather(), model, FEEDS).changed == 0


def test_rows_that_a_branch_reads_are_left() -> None:
    g = GraphBuilder()
    rows = layer(g, g.input("mixed", ROWS), g.input("residual", ROWS))
    branches = {}
    for name, kind in (("then_branch", "Neg"), ("else_branch", "Abs")):
        node = ir.Node("", kind, [rows], name=kind)
        node.outputs[0].name, node.outputs[0].dtype = f"{kind}_out", ir.DataType.FLOAT
        branches[name] = ir.Graph([], [node.outputs[0]], nodes=[node], name=name)
    chosen = g.add("If", g.constant(np.array(True)), shape=ROWS, **branches)
    model = g.finish(first(g, rows), chosen)
    assert apply_equal(HoistGather(), model, FEEDS).changed == 0


def test_without_a_product_nothing_is_gained() -> None:
    g = GraphBuilder()
    model = g.finish(first(g, g.add("Tanh", g.input("mixed", ROWS), shape=ROWS)))
    assert apply_equal(HoistGather(), model, {"mixed": FEEDS["mixed"]}).changed == 0


def test_only_what_nobody_else_reads_moves() -> None:
    """The inner norm is an output: what lies behind it is computed for the first row, and it for all."""
    g = GraphBuilder()
    rows = layer(g, g.input("mixed", ROWS), g.input("residual", ROWS))
    normed = next(node for node in g.graph if node.op_type == "LayerNormalization").outputs[0]
    model = g.finish(first(g, rows), normed)
    assert apply_equal(HoistGather(), model, FEEDS).changed == 1
    assert [str(rows) for rows in products(model)] == ["sequence", "1", "1"]


def test_norms_whose_moments_are_read_are_left() -> None:
    g = GraphBuilder()
    total = g.add("MatMul", g.input("mixed", ROWS), g.constant(random(2, WIDTH, WIDTH)), shape=ROWS)
    normed = g.add("LayerNormalization", total, g.constant(random(4, WIDTH)), shape=ROWS, outputs=2, axis=-1)
    node = normed.producer()
    assert node is not None
    node.outputs[1].dtype = ir.DataType.FLOAT
    model = g.finish(first(g, normed), node.outputs[1])
    assert apply_equal(HoistGather(), model, {"mixed": FEEDS["mixed"]}).changed == 0


UNARY = ("Gelu", "Tanh", "Sigmoid", "Relu", "Neg")


@given(st.data())
def test_whatever_is_computed_row_by_row(data: st.DataObject) -> None:
    """Chains and residual sums drawn at random, some of them read elsewhere: the numbers stay."""
    g = GraphBuilder()
    values = [g.input("mixed", ROWS), g.input("residual", ROWS)]
    for number in range(data.draw(st.integers(1, 8))):
        one, other = (data.draw(st.sampled_from(values)) for _ in range(2))
        kind = data.draw(st.sampled_from(["MatMul", "Add", "Mean", *UNARY]))
        if kind == "MatMul":
            weight = g.constant(random(number, WIDTH, WIDTH) / np.float32(4))
            values.append(g.add("MatMul", one, weight, shape=ROWS))
        elif kind == "Mean":
            mean = g.add("ReduceMean", one, g.constant(np.array([1])), shape=("batch", 1, WIDTH), keepdims=1)
            values.append(g.add("Sub", other, mean, shape=ROWS))
        elif kind == "Add":
            values.append(g.add("Add", one, other, shape=ROWS))
        else:
            values.append(g.add(kind, one, shape=ROWS))
    outputs = [first(g, values[-1])]
    if data.draw(st.booleans()):
        outputs.append(g.add("ReduceMax", data.draw(st.sampled_from(values)), shape=(1, 1, 1)))
    apply_equal(HoistGather(), g.finish(*outputs), FEEDS)


def attention(
    mask: str = "", *, packed: bool = False, shared: bool = False, tail: Tail = first, **attributes: object
) -> ir.Model:
    """A layer of its own attention; ``mask``: which input of it there is."""
    g = GraphBuilder()
    x = g.input("residual", ROWS)
    inputs: list[ir.Value | None]
    if packed:
        three = ("batch", "sequence", 3 * WIDTH)
        both = g.add("MatMul", x, g.constant(random(10, WIDTH, 3 * WIDTH)), shape=three)
        query = g.add("Split", both, g.constant(np.full(3, WIDTH)), shape=ROWS, outputs=3, axis=-1)
        node = query.producer()
        assert node is not None
        for other in node.outputs[1:]:
            other.dtype, other.shape = ir.DataType.FLOAT, ir.Shape(ROWS)
        inputs = list(node.outputs)
    else:
        inputs = [g.add("MatMul", x, g.constant(random(seed, WIDTH, WIDTH)), shape=ROWS) for seed in (10, 11, 12)]
    if shared:
        inputs[1] = inputs[0]
    if mask == "padding":
        inputs += [None, g.input("mask", ("batch", "sequence"), ir.DataType.INT32)]
    elif mask == "rows of padding":
        inputs += [None, g.input("mask", ("batch", "sequence", "sequence"), ir.DataType.INT32)]
    elif mask == "bias":
        inputs += [None, None, g.input("mask", ("batch", 1, "sequence", "sequence"))]
    mixed = g.add("MultiHeadAttention", *inputs, domain=MICROSOFT, shape=ROWS, num_heads=2, **attributes)
    return g.finish(tail(g, layer(g, mixed, x)))


MASKS: dict[str, Array] = {
    "padding": np.array([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]], np.int32),
    "rows of padding": np.tril(np.ones((2, 5, 5), np.int32)),
    "bias": random(20, 2, 1, 5, 5),
}


def fed(mask: str) -> dict[str, Array]:
    return {"residual": FEEDS["residual"]} | ({"mask": MASKS[mask]} if mask else {})


@pytest.mark.parametrize("tail", [first, several])
@pytest.mark.parametrize("mask", ["", "padding", "bias"])
def test_an_attention_has_its_query_s_rows(mask: str, tail: Tail) -> None:
    model = attention(mask, tail=tail)
    assert apply_equal(HoistGather(), model, fed(mask)).changed == 1
    rows = 1 if tail is first else 3
    assert [str(found) for found in products(model)] == [str(rows), "sequence", "sequence", *[str(rows)] * 3]
    axes = sorted(node.attributes["axis"].as_int() for node in model.graph if node.op_type == "Gather")
    assert axes == ([1, 2] if mask == "bias" else [1])
    assert apply_equal(UnfuseAttention(), model, fed(mask)).changed == 1


@pytest.mark.parametrize(
    ("mask", "options"),
    [
        ("", {"packed": True}),
        ("", {"shared": True}),
        ("", {"unidirectional": 1}),
        ("rows of padding", {}),
    ],
)
def test_attentions_whose_other_rows_are_needed_are_left(mask: str, options: dict[str, bool]) -> None:
    model = attention(mask, **options)
    assert apply_equal(HoistGather(), model, fed(mask)).changed == 1
    before, behind = products(model)[:-3], products(model)[-3:]
    assert {str(rows) for rows in before} == {"sequence"}
    assert behind == [1, 1, 1]


def each_its_own(g: GraphBuilder, rows: ir.Value) -> ir.Value:
    at = g.constant(np.array([[[4]], [[1]]]))
    return g.add("GatherND", rows, at, shape=("batch", 1, WIDTH), batch_dims=1)


@pytest.mark.parametrize(("mask", "query"), [("padding", "1"), ("bias", "sequence")])
def test_rows_that_are_others_in_each_batch(mask: str, query: str) -> None:
    model = attention(mask, tail=each_its_own)
    assert apply_equal(HoistGather(), model, fed(mask)).changed == 1
    assert str(products(model)[0]) == query
