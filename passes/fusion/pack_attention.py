"""pack-attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from passes.base import Context, Effect, Outcome, Purpose, Refusal
from passes.shapes import last_dim
from passes.sites import integer_attribute
from passes.splice import Names, add_constant, label, new_value, take_place
from passes.surgery import (
    MICROSOFT,
    copy_path,
    integers,
    is_operator,
    needed,
    only_user,
    opset,
    producer,
    remove_dead,
)

_OPSET = 13


@dataclass(frozen=True, eq=False)
class _Parts:
    """Queries, keys and values as neighbouring parts of one value.

    Attributes:
        whole: ``[batch, sequence, *]``, the value that they are cut from.
        start: Where the queries start in it.
        cuts: The nodes that cut them off.
    """

    whole: ir.Value
    start: int
    cuts: tuple[ir.Node, ...]


@dataclass(frozen=True)
class PackAttention:
    """Let GroupQueryAttention read queries, keys and values as the one product that they are cut from.

    ``GQA(q, k, v)`` with ``q, k, v`` parts of one value behind each other, by Split or Slice along the last axis ->
    ``GQA(whole)``, key and value left out. Where the whole has more parts, as where an MLP reads the same input, it is
    split in fewer. Run pack-products before, which makes the one product, and fuse-rotary, behind which nothing stands
    between it and the attention. Refused: parts in another order, or that others read too; graphs of an opset below 13.
    Attentions whose operands are no parts of one value are left.
    """

    name: ClassVar[str] = "pack-attention"
    effect: ClassVar[Effect] = Effect.EXACT
    purpose: ClassVar[Purpose] = Purpose.SPEED

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Pack; counts the attentions."""
        changed = 0
        refused: list[Refusal] = []
        for node in [node for node in model.graph if is_operator(node, "GroupQueryAttention", domain=MICROSOFT)]:
            operands = node.inputs[:3]
            if any(value is None for value in operands):
                continue
            parts = _parts([needed(value) for value in operands], _widths(node))
            if parts is None:
                continue
            reason = parts if isinstance(parts, str) else _reason_against(model, node)
            if reason or isinstance(parts, str):
                refused.append(Refusal(label(node), reason))
            else:
                _pack(model.graph, node, parts)
                changed += 1
        return Outcome(changed, tuple(refused))


def _widths(node: ir.Node) -> list[int]:
    """Widths of queries, keys and values; of no use (0) where they are not known."""
    heads, kv_heads = (integer_attribute(node, name, 0) for name in ("num_heads", "kv_num_heads"))
    width = last_dim(node.inputs[0]) or 0
    shared = width // heads * kv_heads if heads else 0
    return [width, shared, shared]


def _parts(operands: Sequence[ir.Value], widths: Sequence[int]) -> _Parts | str | None:
    """What the operands are parts of, the reason why they cannot be packed, or None where they are no such parts."""
    found = [_cut_from(value) for value in operands]
    known = [item for item in found if item is not None]
    if len(known) < len(operands) or any(item[0] is not known[0][0] for item in known):
        return None
    starts = [start for _, start, _ in known]
    wanted = [starts[0], starts[0] + widths[0], starts[0] + widths[0] + widths[1]]
    if starts != wanted or [stop - start for _, start, stop in known] != list(widths):
        return "queries, keys and values do not lie behind each other in what they are cut from"
    cuts = tuple(dict.fromkeys(node for value in operands if (node := value.producer()) is not None))
    whole = known[0][0]
    if not is_operator(cuts[0], "Split") and (starts[0] != 0 or sum(widths) != last_dim(whole)):
        return "they are slices of a value that has other parts"
    return _Parts(whole, starts[0], cuts)


def _cut_from(value: ir.Value) -> tuple[ir.Value, int, int] | None:
    """``(whole, start, stop)`` where the value is that part of the last axis of ``whole``."""
    node = producer(value, "Split", "Slice")
    width = None if node is None else last_dim(node.inputs[0])
    if node is None or width is None or node.inputs[0] is None:
        return None
    rank = len(node.inputs[0].shape or ())
    if node.op_type == "Split":
        sizes = _sizes(node)
        if integer_attribute(node, "axis", 0) not in (-1, rank - 1) or sizes is None:
            return None
        index = list(node.outputs).index(value)
        return node.inputs[0], sum(sizes[:index]), sum(sizes[: index + 1])
    start, stop, axes, steps = (integers(item) for item in (*node.inputs[1:], *[None] * 2)[:4])
    if start is None or stop is None or axes not in ((-1,), (rank - 1,)) or steps not in (None, (1,)):
        return None
    return node.inputs[0], start[0] + width * (start[0] < 0), min(stop[0] + width * (stop[0] < 0), width)


def _sizes(split: ir.Node) -> list[int] | None:
    """How long the parts of a Split are."""
    sizes = [last_dim(value) for value in split.outputs]
    known = [size for size in sizes if size is not None]
    return known if len(known) == len(sizes) else None


def _reason_against(model: ir.Model, node: ir.Node) -> str:
    alone = all(only_user(needed(value)) is node for value in node.inputs[:3])
    reasons = (
        (not alone, "its queries, keys or values are used elsewhere too"),
        (opset(model) < _OPSET, f"Split needs opset {_OPSET}, the graph has {opset(model)}"),
    )
    return next((reason for applies, reason in reasons if applies), "")


def _pack(graph: ir.Graph, node: ir.Node, parts: _Parts) -> None:
    old = [needed(value) for value in node.inputs[:3]]
    cut, whole = parts.cuts[0], parts.whole
    packed = whole if len(parts.cuts) == 3 or len(cut.outputs) == 3 else _fewer(graph, cut, old)
    for index, value in enumerate((packed, None, None)):
        node.replace_input_with(index, value)
    remove_dead(old)


def _fewer(graph: ir.Graph, split: ir.Node, merged: Sequence[ir.Value]) -> ir.Value:
    """Replace a Split by one that leaves some neighbouring parts together; those as one value."""
    whole, sizes, first = needed(split.inputs[0]), _sizes(split) or [], list(split.outputs).index(merged[0])
    stop, names = first + len(merged), Names(graph)
    kept = [value for value in split.outputs if value not in merged]
    sizes[first:stop] = [sum(sizes[first:stop])]
    dtype, base = whole.dtype or ir.DataType.FLOAT, f"{merged[0].name}.packed"
    outputs = [new_value(names.fresh(f"{base}.part"), dtype) for _ in sizes]
    lengths = add_constant(graph, names.fresh(f"{base}.widths"), np.array(sizes, np.int64))
    new = ir.node("Split", [whole, lengths], {"axis": -1}, outputs=outputs, name=f"{outputs[0].name}.Split")
    copy_path(split, new)
    graph.insert_before(split, new)
    for old, fresh in zip(kept, [*outputs[:first], *outputs[first + 1 :]], strict=True):
        take_place(fresh, old)
    shape = list(whole.shape or ())
    outputs[first].shape = ir.Shape([*shape[:-1], sizes[first]])
    return outputs[first]
