"""Graphs whose vocabulary is cut: every way in which exporters read ids and make logits, and those nobody knows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from encoder_graphs import DISABLED, FLOAT, INT32, INT64, Builder, run

from artifacts.errors import UnsupportedError
from compiler.vocabulary.graph import cut_vocabulary

ROWS, WIDTH = 40, 8
KEEP = np.array([0, 1, 5, 6, 9, 20, 39, 2], np.int64)
PAD = 5
RNG = np.random.default_rng(3)
TABLE = RNG.normal(size=(ROWS, WIDTH)).astype(np.float32)
HEAD = RNG.normal(size=(WIDTH, ROWS)).astype(np.float32)
BIAS = RNG.normal(size=ROWS).astype(np.float32)
IDS = np.array([[0, 3, 7, 2], [6, 5, 4, 1]])


class Lookup(Builder):
    """``input_ids`` and what a table has for them."""

    def __init__(self) -> None:
        super().__init__()
        self.ids = self.input("input_ids", INT64, ["batch", "sequence"])

    def rows(self, indices: ir.Value | None = None) -> ir.Value:
        return self.add("Gather", self.constant("table", TABLE), indices or self.ids, name="rows", axis=0)

    def flat_ids(self) -> ir.Value:
        return self.add("Reshape", self.ids, self.ints(-1), name="flat", dtype=INT64)

    def logits(self, value: ir.Value, *more: ir.Value) -> ir.Model:
        value.name = "logits"
        value.shape = ir.Shape(["batch", "sequence", ROWS])
        return self.model(value, *more, shape=["batch", "sequence", ROWS])

    def hidden(self, value: ir.Value) -> ir.Model:
        return self.model(value, shape=["batch", "sequence", WIDTH])


def plain() -> ir.Model:
    made = Lookup()
    return made.hidden(made.add("Tanh", made.rows(), name="hidden"))


def product() -> ir.Model:
    made = Lookup()
    logits = made.add("MatMul", made.rows(), made.constant("head", HEAD), name="product")
    return made.logits(made.add("Add", logits, made.constant("bias", BIAS), name="sum"))


def scaled() -> ir.Model:
    """As Gemma, Cohere and Granite have it: capped and scaled; the bias stands on the left."""
    made = Lookup()
    x = made.add("MatMul", made.rows(), made.constant("head", HEAD), name="product")
    x = made.add("Add", made.constant("bias", BIAS.reshape(1, 1, -1)), x, name="sum")
    x = made.add("Div", x, made.floats("cap", 3.0), name="small")
    x = made.add("Mul", made.add("Tanh", x, name="capped"), made.floats("scale", 3.0), name="large")
    return made.logits(made.add("Cast", made.add("Identity", x, name="same"), name="cast", to=FLOAT.value))


def tied() -> ir.Model:
    """As an exporter leaves a tied head: the table is turned round in each run."""
    made = Lookup()
    turned = made.add("Transpose", made.constant("table", TABLE), name="turned", perm=[1, 0])
    turned.shape = ir.Shape([WIDTH, ROWS])
    return made.logits(made.add("MatMul", made.rows(), turned, name="product"))


def gemm(transposed: bool) -> ir.Model:
    made = Lookup()
    flat = made.add("Gather", made.constant("table", TABLE), made.flat_ids(), name="rows", axis=0)
    head = made.constant("head", np.ascontiguousarray(HEAD.T) if transposed else HEAD)
    value = made.add("Gemm", flat, head, made.constant("bias", BIAS), name="product", transB=int(transposed))
    value.name = "logits"
    return made.model(value, shape=["tokens", ROWS])


def positions() -> ir.Model:
    """As RoBERTa counts positions: where an id is not that of padding."""
    made = Lookup()
    pad = made.constant("pad", np.array(PAD, np.int64))
    padded = made.add("Equal", made.ids, pad, name="padded", dtype=ir.DataType.BOOL)
    mask = made.add("Cast", made.add("Not", padded, name="used", dtype=ir.DataType.BOOL), name="mask", to=FLOAT.value)
    wide = made.add("Unsqueeze", mask, made.ints(-1), name="wide")
    return made.hidden(made.add("Mul", made.rows(), wide, name="hidden"))


def moved() -> ir.Model:
    """Ids that are cast, cut and given another shape before they look anything up."""
    made = Lookup()
    narrow = made.add("Cast", made.ids, name="narrow", dtype=INT32, to=INT32.value)
    first = made.add("Slice", narrow, made.ints(0), made.ints(2), made.ints(1), name="first", dtype=INT32)
    made.add("Shape", made.ids, name="shape", dtype=INT64)
    return made.hidden(
        made.add("Tanh", made.rows(made.add("Identity", first, name="same", dtype=INT32)), name="hidden")
    )


def constant_node() -> ir.Model:
    made = Lookup()
    table = made.add("Constant", name="held", value=ir.tensor(TABLE))
    return made.hidden(made.add("Tanh", made.add("Gather", table, made.ids, name="rows", axis=0), name="hidden"))


HEADS: dict[str, Callable[[], ir.Model]] = {
    "product": product,
    "scaled": scaled,
    "tied": tied,
    "Gemm": lambda: gemm(False),
    "Gemm transposed": lambda: gemm(True),
}
BODIES = {"plain": plain, "positions": positions, "moved": moved, "constant node": constant_node}


@pytest.mark.parametrize("name", [*HEADS, *BODIES])
def test_new_ids_give_what_the_old_ones_gave(name: str) -> None:
    head = name in HEADS
    model = {**HEADS, **BODIES}[name]()
    wanted = run(model, {"input_ids": KEEP[IDS]}, DISABLED)
    cut_vocabulary(model, KEEP, head=head)
    found = run(model, {"input_ids": IDS}, DISABLED)
    expected = wanted[..., KEEP] if head else wanted
    # Fewer columns may be summed in another order: 8 products, so 8 roundings of numbers of size 10 at most.
    np.testing.assert_allclose(found, expected, rtol=0, atol=8 * 10 * 2**-23 if head else 0)
    assert all(ROWS not in value.const_value.shape for value in model.graph.initializers.values())  # type: ignore[union-attr]
    shape = model.graph.outputs[0].shape
    assert shape is not None
    assert shape[-1] == (len(KEEP) if head else WIDTH)


def test_padding_is_another_number() -> None:
    model = positions()
    cut_vocabulary(model, KEEP, head=False)
    (node,) = (node for node in model.graph if node.op_type == "Equal")
    compared = node.inputs[1]
    assert compared is not None
    assert compared.const_value is not None
    assert int(compared.const_value.numpy()) == KEEP.tolist().index(PAD)


def test_a_comparison_with_a_token_that_goes_is_never_true() -> None:
    model = positions()
    cut_vocabulary(model, KEEP[KEEP != PAD], head=False)
    found = run(model, {"input_ids": np.arange(len(KEEP) - 1)[None]})
    assert (np.abs(found).sum(-1) > 0).all()


def test_a_table_and_its_head_share_their_memory_afterwards() -> None:
    made = Lookup()
    logits = made.add("MatMul", made.rows(), made.constant("head", HEAD), name="product")
    model = made.logits(logits)
    model.graph.initializers["head"].const_value = ir.Tensor(TABLE.T, name="head")
    model.graph.initializers["table"].const_value = ir.Tensor(TABLE, name="table")
    cut_vocabulary(model, KEEP, head=True)
    table, head = (model.graph.initializers[name].const_value.numpy() for name in ("table", "head"))  # type: ignore[union-attr]
    assert np.shares_memory(table, head)
    assert (table.shape, head.shape) == ((len(KEEP), WIDTH), (WIDTH, len(KEEP)))


def test_tables_that_are_read_from_disk_are_told_apart() -> None:
    made = Lookup()
    tables = [RNG.normal(size=(ROWS, WIDTH)).astype(np.float32) for _ in range(4)]
    rows = []
    for index, array in enumerate(tables):
        lazy = ir.LazyTensor(
            lambda array=array: ir.tensor(array.copy()), FLOAT, ir.Shape(array.shape), name=f"t{index}"
        )
        value = ir.Value(name=f"t{index}", const_value=lazy)
        made.graph.register_initializer(value)
        rows.append(made.add("Gather", value, made.ids, name=f"rows{index}", axis=0))
    model = made.hidden(made.add("Sum", *rows, name="hidden"))
    cut_vocabulary(model, KEEP, head=False)
    for index, array in enumerate(tables):
        kept = model.graph.initializers[f"t{index}"].const_value
        assert kept is not None
        np.testing.assert_array_equal(kept.numpy(), array[KEEP])


def test_other_types_keep_theirs() -> None:
    made = Lookup()
    table = ir.tensor(TABLE, name="table", dtype=None)
    half = ir.Value(name="half", const_value=ir.Tensor(TABLE.astype(np.float16), name="half"))
    made.graph.register_initializer(half)
    model = made.hidden(made.add("Gather", half, made.ids, name="rows", dtype=ir.DataType.FLOAT16, axis=0))
    cut_vocabulary(model, KEEP, head=False)
    kept = model.graph.initializers["half"].const_value
    assert kept is not None
    assert (kept.dtype, tuple(kept.shape)) == (ir.DataType.FLOAT16, (len(KEEP), WIDTH))
    np.testing.assert_array_equal(kept.numpy(), table.numpy().astype(np.float16)[KEEP])


def compared_in_size() -> ir.Model:
    made = Lookup()
    made.add("Less", made.ids, made.ints(7), name="small", dtype=ir.DataType.BOOL)
    return made.hidden(made.rows())


def handed_back() -> ir.Model:
    made = Lookup()
    return made.model(made.rows(), made.add("Identity", made.ids, name="again", dtype=INT64), shape=["b", "s"])


def read_by_another() -> ir.Model:
    made = Lookup()
    total = made.add("ReduceSum", made.constant("table", TABLE), made.ints(0), name="total")
    return made.hidden(made.add("Add", made.rows(), total, name="hidden"))


def given_back() -> ir.Model:
    made = Lookup()
    hidden = made.hidden(made.rows())
    made.graph.outputs.append(made.constant("table", TABLE))
    return hidden


def as_float() -> ir.Model:
    made = Lookup()
    made.add("Cast", made.ids, name="real", to=FLOAT.value)
    return made.hidden(made.rows())


def other_axis() -> ir.Model:
    made = Lookup()
    return made.hidden(made.add("Gather", made.constant("table", TABLE.T), made.ids, name="rows", axis=1))


def computed_table() -> ir.Model:
    made = Lookup()
    table = made.add("Tanh", made.constant("table", TABLE), name="made")
    return made.hidden(made.add("Gather", table, made.ids, name="rows", axis=0))


def short_table() -> ir.Model:
    made = Lookup()
    return made.hidden(made.add("Gather", made.constant("short", TABLE[:30]), made.ids, name="rows", axis=0))


def no_table() -> ir.Model:
    made = Lookup()
    return made.model(made.add("Shape", made.ids, name="shape", dtype=INT64), shape=[2])


def softmax() -> ir.Model:
    made = Lookup()
    logits = made.add("MatMul", made.rows(), made.constant("head", HEAD), name="product")
    return made.logits(made.add("Softmax", logits, name="odds", axis=-1))


def two_readers() -> ir.Model:
    made = Lookup()
    logits = made.add("MatMul", made.rows(), made.constant("head", HEAD), name="product")
    best = made.add("ReduceMax", logits, made.ints(-1), name="best")
    return made.logits(made.add("Identity", logits, name="same"), best)


def sum_of_two() -> ir.Model:
    made = Lookup()
    one = made.add("MatMul", made.rows(), made.constant("head", HEAD), name="one")
    return made.logits(made.add("Add", one, made.add("Tanh", made.rows(), name="other"), name="sum"))


REFUSED: dict[str, tuple[Callable[[], ir.Model], bool, str]] = {
    "compared in size": (compared_in_size, False, "node_small .Less. reads token ids in a way"),
    "handed back": (handed_back, False, "gives token ids back, as again"),
    "read by another": (read_by_another, False, "node_total .ReduceSum. reads table too"),
    "given back": (given_back, False, "gives table back"),
    "as float": (as_float, False, "node_real .Cast. reads token ids"),
    "other axis": (other_axis, False, "along another axis"),
    "computed table": (computed_table, False, "a table that is no constant"),
    "short table": (short_table, False, "short, which has no row for each token"),
    "no table": (no_table, False, "looks no token ids up"),
    "softmax": (softmax, True, "Softmax. makes logits in a way"),
    "two readers": (two_readers, True, "more than logits is made of product"),
    "sum of two": (sum_of_two, True, "Add. makes logits in a way"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_refused_and_stays(name: str) -> None:
    build, head, reason = REFUSED[name]
    model = build()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    with pytest.raises(UnsupportedError, match=reason) as told:
        cut_vocabulary(model, KEEP, head=head)
    assert "--vocabulary" in told.value.remedy
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
