"""order-columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from passes.affine import Affine, affine_of, constant_floats, matrix_of, put_matrix, read_only_by, refill
from passes.base import Context, Effect, Outcome, Purpose, Refusal
from passes.origins import sort_origins
from passes.shapes import Dim, Dims, dims_of, last_dim
from passes.sites import constant_of, linear_sites
from passes.splice import Names, add_constant, label, new_node, new_value, take_place
from passes.surgery import is_operator, opset, remove_dead

from .excerpt import Excerpt, is_told, told

_MOVES = ("Reshape", "Transpose", "Split", "Slice", "Unsqueeze", "Squeeze", "Identity")
_OPSET = 13
_ROWS = (2, 3)
"""Batch and length of the numbers that are run through the moves."""


@dataclass(frozen=True, eq=False)
class _Columns:
    """A product of which values ``[batch, sequence, *]`` take each column once.

    Attributes:
        affine: The product with its bias.
        ends: The values, in the order in which they are read.
        taken: For each which columns it takes, in its order.
    """

    affine: Affine
    ends: tuple[ir.Value, ...]
    taken: tuple[NDArray[np.int64], ...]


@dataclass(frozen=True)
class OrderColumns:
    """Let a product make its columns in the order in which they are read.

    ``x W + b``, whose columns Reshape, Transpose, Split, Slice, Squeeze and Unsqueeze sort into values ``[batch,
    sequence, *]`` -> ``Split(x W' + b')`` with the columns of W and b sorted instead. GPT-NeoX keeps query, key and
    value of each head side by side; pack-attention finds them behind each other afterwards. Refused: weights and biases
    that others read too, or not of float32. Left alone: products of which a column is read twice, never or in another
    shape, and those that are only split.
    """

    name: ClassVar[str] = "order-columns"
    effect: ClassVar[Effect] = Effect.EXACT
    purpose: ClassVar[Purpose] = Purpose.SPEED

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Sort them; counts the products."""
        changed = 0
        refused: list[Refusal] = []
        names = Names(model.graph)
        places = {node: index for index, node in enumerate(model.graph)}
        for site in linear_sites(model):
            affine = affine_of(site)
            columns = None if affine is None or opset(model) < _OPSET else _columns(affine, places, opset(model))
            if columns is None:
                continue
            reason = _reason_against(columns.affine)
            if reason:
                refused.append(Refusal(label(site.node), reason))
            else:
                _sort(model.graph, names, columns)
                changed += 1
        return Outcome(changed, tuple(refused))


def _columns(affine: Affine, places: dict[ir.Node, int], version: int) -> _Columns | None:
    """What takes which columns; None where it is not each once, or where there is nothing to sort."""
    source = affine.output
    lengths, width = (dims_of(source) or ())[:-1], last_dim(source)
    if len(lengths) != len(_ROWS) or width is None or any(isinstance(dim, int) for dim in lengths):
        return None
    nodes, ends, shapes = _moves(source)
    if not nodes or (len(nodes) == 1 and nodes[0].op_type == "Split") or not _readable(ends, shapes, lengths):
        return None
    nodes.sort(key=places.__getitem__)
    ends.sort(key=lambda value: min((places.get(use.node, 0), use.idx) for use in value.uses()))
    taken = _taken(Excerpt(nodes, [source, *shapes], ends, version), source, shapes, lengths, width)
    if taken is None or not np.array_equal(np.sort(np.concatenate(taken)), np.arange(width)):
        return None
    return _Columns(affine, tuple(ends), tuple(taken))


def _moves(source: ir.Value) -> tuple[list[ir.Node], list[ir.Value], list[ir.Value]]:
    """The nodes that move what the value holds, the values that others read of them, the shapes that they read."""
    nodes: dict[ir.Node, None] = {}
    ends: dict[ir.Value, None] = {}
    shapes: dict[ir.Value, None] = {}
    pending = [source]
    while pending:
        value = pending.pop()
        users = [use.node for use in value.uses()]
        moving = [use.node for use in value.uses() if is_operator(use.node, *_MOVES) and use.idx == 0]
        if len(moving) < len(users) or value.is_graph_output():
            ends[value] = None
        for node in moving:
            nodes[node] = None
            shapes |= {item: None for item in node.inputs[1:] if item is not None and constant_of(item) is None}
            pending += node.outputs
    return list(nodes), list(ends), list(shapes)


def _readable(ends: Sequence[ir.Value], shapes: Sequence[ir.Value], lengths: Dims) -> bool:
    """Whether the ends have the rows of the product, none is an output of the graph, and all shapes are known."""
    rows = all((dims_of(value) or ())[:-1] == lengths and last_dim(value) is not None for value in ends)
    return (
        rows and not any(value.is_graph_output() for value in ends) and all(is_told(item, lengths) for item in shapes)
    )


def _taken(
    excerpt: Excerpt, source: ir.Value, shapes: Sequence[ir.Value], lengths: Dims, width: int
) -> list[NDArray[np.int64]] | None:
    """The columns that each end takes, the same in every row; None where they are not."""
    rows: dict[Dim, int] = dict(zip(lengths, _ROWS, strict=True))
    numbers = np.arange(int(np.prod(_ROWS)) * width).reshape(*_ROWS, width)
    feeds: dict[ir.Value, NDArray[np.generic]] = {source: numbers.astype(np.float32)}
    try:
        found = excerpt(feeds | {value: told(value, rows) for value in shapes})
    except ValueError:
        return None
    taken = [(array.astype(np.int64) - numbers[..., :1]) for array in found]
    if any((columns != columns[:1, :1]).any() for columns in taken):
        return None
    return [columns[0, 0] for columns in taken]


def _reason_against(affine: Affine) -> str:
    site = affine.site
    tensors = [constant_of(site.weight), *([] if affine.bias is None else [constant_of(affine.bias)])]
    alone = read_only_by(site.weight, [(site.node, 1)])
    if affine.bias is not None and affine.bias_use is not None:
        alone = alone and read_only_by(affine.bias, [affine.bias_use])
    reasons = (
        (not alone, "its weight or bias is used elsewhere too"),
        (any(item is None or item.dtype != ir.DataType.FLOAT for item in tensors), "it is not of float32"),
    )
    return next((reason for applies, reason in reasons if applies), "")


def _sort(graph: ir.Graph, names: Names, columns: _Columns) -> None:
    affine, order = columns.affine, np.concatenate(columns.taken)
    if not np.array_equal(order, np.arange(order.size)):
        put_matrix(affine.site, matrix_of(affine.site)[:, order])
        sort_origins(affine.site.node, order)
        bias = constant_floats(affine.bias, order.size)
        if affine.bias is not None and bias is not None:
            refill(affine.bias, bias[order])
    whole, maker = affine.output, affine.output.producer()
    if maker is None:
        raise ValueError(f"{whole.name} is made by no node")
    widths = np.array([len(taken) for taken in columns.taken], np.int64)
    sizes = add_constant(graph, names.fresh(f"{whole.name}.widths"), widths)
    outputs = [new_value(names.fresh(f"{value.name}.part"), whole.dtype or ir.DataType.FLOAT) for value in columns.ends]
    graph.insert_after(maker, new_node("Split", [whole, sizes], outputs, maker, {"axis": -1}))
    for old, new in zip(columns.ends, outputs, strict=True):
        take_place(new, old)
        remove_dead([old])
