"""Attentions of decoders whose queries and keys are turned by position, spelled as exporters do, and feeds for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from builders import Array, GraphBuilder, evaluate, random

INT64, INT32 = ir.DataType.INT64, ir.DataType.INT32
HEADS, KV_HEADS, CAPACITY = 4, 2, 24
_END = 2**63 - 1


@dataclass(frozen=True)
class Form:
    """How an attention spells its rotary position embedding.

    Attributes:
        width: Of a head.
        turned: How many of its numbers are turned, the first ones.
        neighbours: They are paired with their neighbours; else the first half with the second.
        factor: Of cosines and sines.
        norm: Queries and keys are normalized before: "", "before" or "behind" the Transpose to heads; "clip": clipped.
        rows: Cosines and sines are looked up in tables of so many; 0: computed.
        biased: The products have biases.
        other_keys: The keys are turned by other angles than the queries.
        growing: The queries are multiplied by a number that grows with their position.
        relative: The angles depend on the "largest" or the "first" position of the call too.
    """

    width: int = 16
    turned: int = 16
    neighbours: bool = False
    factor: float = 1.0
    norm: str = ""
    rows: int = 0
    biased: bool = False
    other_keys: bool = False
    growing: bool = False
    relative: str = ""


class Attention(GraphBuilder):
    """One attention with its three products."""

    def __init__(self, form: Form, hidden: int = 32) -> None:
        super().__init__(23)
        self.form, self.hidden = form, hidden

    def build(self) -> ir.Model:
        width = self.form.width
        x = self.input("x", ("batch", "sequence", self.hidden))
        self.positions = self.input("position_ids", ("batch", "sequence"), INT64)
        lengths = self.input("seqlens_k", ("batch",), INT32), self.input("total_sequence_length", (), INT32)
        cache = ("batch", KV_HEADS, "capacity", width)
        past = self.input("past.key", cache), self.input("past.value", cache)
        batch, sequence = (self.add("Shape", x, start=axis, end=axis + 1, dtype=INT64, shape=(1,)) for axis in (0, 1))
        self.lengths = batch, sequence
        tables = {name: self.tables(name) for name in (("q", "k") if self.form.other_keys else ("q",))}
        query = self.turned(self.product(x, "q", HEADS), "q", HEADS, *tables["q"])
        key = self.turned(self.product(x, "k", KV_HEADS), "k", KV_HEADS, *tables.get("k", tables["q"]))
        value = self.product(x, "v", KV_HEADS)
        attributes = {"num_heads": HEADS, "kv_num_heads": KV_HEADS, "scale": width**-0.5}
        operands = query, key, value, *past, *lengths
        output = self.add("GroupQueryAttention", *operands, domain="com.microsoft", outputs=3, **attributes)
        node = output.producer()
        assert node is not None
        shapes = ("batch", "sequence", HEADS * width), cache, cache
        for result, name, shape in zip(node.outputs, ("y", "present.key", "present.value"), shapes, strict=True):
            result.name, result.shape, result.dtype = name, ir.Shape(shape), ir.DataType.FLOAT
        return self.finish(*node.outputs)

    def product(self, x: ir.Value, name: str, heads: int) -> ir.Value:
        columns = heads * self.form.width
        shape, seed = ("batch", "sequence", columns), ord(name)
        weight = self.constant(random(seed, self.hidden, columns) / 4, f"{name}.weight")
        product = self.add("MatMul", x, weight, shape=shape, name=f"{name}.product")
        if not self.form.biased:
            return product
        return self.add("Add", product, self.constant(random(seed + 1, columns), f"{name}.bias"), shape=shape)

    def tables(self, name: str) -> tuple[ir.Value, ir.Value]:
        """Cosines and sines ``[batch, 1, sequence, turned]``."""
        pairs = self.form.turned // 2
        frequencies = (100.0 if name == "q" else 50.0) ** -(np.arange(pairs, dtype=np.float32) / pairs)
        if self.form.rows:
            turns = np.tile(np.outer(np.arange(self.form.rows), frequencies), 2).astype(np.float32)
            held = [self.constant(function(turns)) for function in (np.cos, np.sin)]
            whole = ("batch", "sequence", 2 * pairs)
            found = [self.add("Gather", table, self.positions, axis=0, shape=whole) for table in held]
            return self.over_heads(found[0]), self.over_heads(found[1])
        places = self.add("Unsqueeze", self.positions, self.constant([2]), dtype=INT64, shape=("batch", "sequence", 1))
        numbers = self.add("Cast", places, to=1, shape=("batch", "sequence", 1))
        if self.form.relative == "largest":
            numbers = self.add("Div", numbers, self.add("ReduceMax", numbers, shape=(1, 1, 1)), shape=numbers.shape)
        elif self.form.relative == "first":
            first = self.add("Slice", numbers, *map(self.constant, ([0], [1], [1])), shape=("batch", 1, 1))
            numbers = self.add("Sub", numbers, first, shape=numbers.shape)
        angles = self.add("Mul", numbers, self.constant(frequencies), shape=("batch", "sequence", pairs))
        whole = ("batch", "sequence", 2 * pairs)
        if self.form.neighbours:
            column = self.add("Unsqueeze", angles, self.constant([3]), shape=("batch", "sequence", pairs, 1))
            twice = self.add("Concat", column, column, axis=-1, shape=("batch", "sequence", pairs, 2))
            both = self.add("Reshape", twice, self.constant([0, 0, 2 * pairs]), shape=whole)
        else:
            both = self.add("Concat", angles, angles, axis=-1, shape=whole)
        return self.table("Cos", both), self.table("Sin", both)

    def table(self, op_type: str, angles: ir.Value) -> ir.Value:
        value = self.add(op_type, angles, shape=angles.shape)
        if self.form.factor != 1.0:
            value = self.add("Mul", value, self.constant(self.form.factor), shape=angles.shape)
        return self.over_heads(value)

    def over_heads(self, table: ir.Value) -> ir.Value:
        return self.add("Unsqueeze", table, self.constant([1]), shape=("batch", 1, "sequence", self.form.turned))

    def turned(self, merged: ir.Value, name: str, heads: int, cosines: ir.Value, sines: ir.Value) -> ir.Value:
        form, lead = self.form, ("batch", heads, "sequence")
        x = self.split(merged, name, heads)
        whole = x if form.turned == form.width else self.cut(x, 0, form.turned, (*lead, form.turned))
        other = self.neighbours(whole, lead) if form.neighbours else self.halves(whole, lead)
        shape = (*lead, form.turned)
        left, right = self.add("Mul", whole, cosines, shape=shape), self.add("Mul", other, sines, shape=shape)
        result = self.add("Add", left, right, shape=shape)
        if whole is not x:
            rest = self.cut(x, form.turned, _END, (*lead, form.width - form.turned))
            result = self.add("Concat", result, rest, axis=-1, shape=(*lead, form.width))
        if form.growing and name == "q":
            result = self.add("Mul", result, self.growth(), shape=result.shape)
        back = self.add("Transpose", result, perm=[0, 2, 1, 3], shape=("batch", "sequence", heads, form.width))
        columns = heads * form.width
        target = self.add("Concat", *self.lengths, self.constant([columns]), axis=0, dtype=INT64, shape=(3,))
        return self.add("Reshape", back, target, shape=("batch", "sequence", columns), name=f"{name}.turned")

    def growth(self) -> ir.Value:
        """``1 + log(1 + floor(position / 4)) [batch, 1, sequence, 1]``."""
        numbers = self.add("Cast", self.positions, to=1, shape=("batch", "sequence"))
        steps = self.add("Floor", self.add("Div", numbers, self.constant(4.0)), shape=numbers.shape)
        logs = self.add("Log", self.add("Add", steps, self.constant(1.0)), shape=numbers.shape)
        total = self.add("Add", logs, self.constant(1.0), shape=numbers.shape)
        return self.add("Unsqueeze", total, self.constant([1, 3]), shape=("batch", 1, "sequence", 1))

    def split(self, merged: ir.Value, name: str, heads: int) -> ir.Value:
        """``[batch, heads, sequence, width]``, normalized if the form says so."""
        width = self.form.width
        target = self.add("Concat", *self.lengths, self.constant([-1, width]), axis=0, dtype=INT64, shape=(4,))
        split = self.add("Reshape", merged, target, shape=("batch", "sequence", heads, width))
        if self.form.norm == "before":
            split = self.normalized(split, name)
        swapped = self.add("Transpose", split, perm=[0, 2, 1, 3], shape=("batch", heads, "sequence", width))
        return self.normalized(swapped, name) if self.form.norm in ("behind", "clip") else swapped

    def normalized(self, x: ir.Value, name: str) -> ir.Value:
        if self.form.norm == "clip":
            return self.add("Clip", x, self.constant(-1.5), self.constant(1.5), shape=x.shape)
        scale = self.constant(random(ord(name) + 2, self.form.width), f"{name}.norm")
        return self.add("RMSNormalization", x, scale, axis=-1, epsilon=1e-6, shape=x.shape)

    def cut(self, x: ir.Value, start: int, stop: int, shape: tuple[int | str, ...], step: int = 1) -> ir.Value:
        return self.add("Slice", x, *(self.constant([item]) for item in (start, stop, 3, step)), shape=shape)

    def halves(self, x: ir.Value, lead: tuple[int | str, ...]) -> ir.Value:
        half = self.form.turned // 2
        first, second = self.cut(x, 0, half, (*lead, half)), self.cut(x, half, _END, (*lead, half))
        negative = self.add("Neg", second, shape=second.shape)
        return self.add("Concat", negative, first, axis=-1, shape=(*lead, 2 * half))

    def neighbours(self, x: ir.Value, lead: tuple[int | str, ...]) -> ir.Value:
        half = self.form.turned // 2
        even, odd = (self.cut(x, start, _END, (*lead, half), 2) for start in (0, 1))
        parts = [
            self.add("Unsqueeze", value, self.constant([4]), shape=(*lead, half, 1))
            for value in (self.add("Neg", odd, shape=odd.shape), even)
        ]
        pairs = self.add("Concat", *parts, axis=-1, shape=(*lead, half, 2))
        return self.add("Reshape", pairs, self.constant([0, 0, 0, 2 * half]), shape=(*lead, 2 * half))


@dataclass(frozen=True)
class Call:
    """One call of a decoder: lengths of the rows after it, and how many tokens of each it brings."""

    lengths: tuple[int, ...]
    sequence: int
    prompt: bool = False

    def feeds(self, model: ir.Model) -> dict[str, Array]:
        rng, rows = np.random.default_rng(0), len(self.lengths)
        ends = np.array(self.lengths)
        starts = np.zeros(rows, np.int64) if self.prompt else ends - self.sequence
        shapes = {str(value.name): value.shape for value in model.graph.inputs}
        cache, hidden = tuple(shapes["past.key"] or ()), tuple(shapes["x"] or ())[-1]
        assert isinstance(hidden, int)
        held = (rows, cache[1], CAPACITY, cache[3])
        return {
            "x": rng.standard_normal((rows, self.sequence, hidden)).astype(np.float32),
            "position_ids": starts[:, None] + np.arange(self.sequence, dtype=np.int64),
            "seqlens_k": (ends - 1).astype(np.int32),
            "total_sequence_length": np.array(self.sequence if self.prompt else ends.max(), np.int32),
            "past.key": rng.standard_normal(held).astype(np.float32),
            "past.value": rng.standard_normal(held).astype(np.float32),
        }

    def results(self, model: ir.Model) -> dict[str, Array]:
        """What the graph gives, without what lies behind the end of a row."""
        outputs = evaluate(model, self.feeds(model))
        valid: dict[str, Array] = {}
        for row, length in enumerate(self.lengths):
            tokens = min(length, self.sequence)
            valid[f"y {row}"] = outputs["y"][row, :tokens]
            for name in ("present.key", "present.value"):
                valid[f"{name} {row}"] = outputs[name][row, :, :length]
        return valid


CALLS: dict[str, Call] = {
    "ragged prompt": Call((7, 3, 5), 7, prompt=True),
    "ragged decode": Call((8, 20, 1), 1),
    "second part of a prompt": Call((13,), 4),
}


def held_equal(model: ir.Model, change: Callable[[], object], reach: float) -> None:
    """Every call gives the same before and after the change, up to ``reach`` times the largest number of each part."""
    before = {name: call.results(model) for name, call in CALLS.items()}
    change()
    for name, call in CALLS.items():
        found = call.results(model)
        for part, expected in before[name].items():
            limit = reach * max(1.0, float(np.abs(expected).max()))
            np.testing.assert_allclose(found[part], expected, rtol=0, atol=limit, err_msg=f"{name}: {part}")
