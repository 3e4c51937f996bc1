"""Cut a graph to some rows of its vocabulary: the tables that token ids look up, and the columns of the head.

Everything that reads ids is followed from ``input_ids``, and everything that makes logits back from ``logits``, before
anything is changed: what is not understood is refused, so that what remains is the same function of the tokens kept.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from artifacts.errors import UnsupportedError
from passes.sites import constant_of, integer_attribute
from passes.splice import Names, add_constant, label
from passes.surgery import is_operator, producer, remove_dead

from .tokenizer import renumbering

IDS, LOGITS = "input_ids", "logits"
_REMEDY = "Compile without --vocabulary"
_NOWHERE = -1
"""Stands in a comparison for the id of a token that is not kept: no token has it."""
_MOVING = (
    *("Identity", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Expand", "Slice"),
    *("Gather", "GatherElements", "GatherND", "Cast"),
)
"""Operators that give the elements of their first input, and read nothing of what they are."""
_INTEGERS = (ir.DataType.INT32, ir.DataType.INT64)
_ELEMENTWISE = ("Identity", "Cast", "Tanh", "Neg", "Clip")
_PAIRED = ("Add", "Sub", "Mul", "Div")
_LOGITS = "makes logits in a way that is not known"

_Made = dict[tuple[object, ...], tuple[NDArray[np.generic], NDArray[np.generic]]]
"""Where the rows of a constant lie in memory -> the rows, held so that no others come to lie there, and those taken."""


def cut_vocabulary(model: ir.Model, ids: NDArray[np.int64], *, head: bool) -> None:
    """Renumber the token ids of a graph, in place; row or column ``n`` becomes what row ``ids[n]`` was.

    Args:
        model: Takes ``input_ids``.
        ids: Old ids in the order of the new ones, int64 [n].
        head: Its output ``logits [..., vocabulary]`` is cut too.

    Raises:
        UnsupportedError: The graph reads ids, or makes logits, in a way that is not known here; it stays as it was.
    """
    cuts = _Cuts(ids)
    cuts.follow(next(value for value in model.graph.inputs if value.name == IDS))
    if head:
        cuts.trace(next(value for value in model.graph.outputs if value.name == LOGITS), frozenset())
    cuts.check()
    cuts.apply(model)


class _Cuts:
    """What is to be cut and renumbered, found first and done afterwards."""

    def __init__(self, ids: NDArray[np.int64]) -> None:
        self._ids = ids
        self._new = renumbering(ids)
        self._axes: dict[ir.Value, int] = {}
        self._reads: dict[ir.Value, set[tuple[ir.Node, int]]] = {}
        self._compared: list[tuple[ir.Node, int]] = []
        self._shapes: list[tuple[ir.Value, int]] = []

    def follow(self, value: ir.Value) -> None:
        """See to everything that reads ``value``, which holds token ids."""
        if value.is_graph_output():
            raise UnsupportedError(f"the graph gives token ids back, as {value.name}", _REMEDY)
        for node, place in value.uses():
            if is_operator(node, "Gather") and place == 1:
                if integer_attribute(node, "axis", 0) != 0:
                    raise _unknown(node, "looks token ids up along another axis than the first")
                self._cut(node, 0, 0)
            elif is_operator(node, "Equal") and _integers(node.inputs[1 - place]) is not None:
                self._compared.append((node, 1 - place))
            elif is_operator(node, *_MOVING) and place == 0 and _stays_integer(node):
                self.follow(node.outputs[0])
            elif not is_operator(node, "Shape", "Size"):
                raise _unknown(node, "reads token ids in a way that is not known")

    def trace(self, value: ir.Value, readers: frozenset[ir.Node]) -> None:
        """Find what makes ``value [..., vocabulary]`` out of hidden states; only ``readers`` may read it."""
        node = value.producer()
        if node is None or {use.node for use in value.uses()} - readers or (readers and value.is_graph_output()):
            what = f"the vocabulary cannot be trimmed: more than logits is made of {value.name}"
            raise UnsupportedError(what, _REMEDY)
        self._shapes.append((value, -1))
        if is_operator(node, *_ELEMENTWISE):
            self._operand(node, 0)
        elif is_operator(node, *_PAIRED):
            places = [place for place in (0, 1) if constant_of(node.inputs[place]) is not None]
            if len(places) != 1:
                raise _unknown(node, _LOGITS)
            self._along(node, places[0])
            self._operand(node, 1 - places[0])
        elif is_operator(node, "MatMul"):
            self._cut(node, 1, 1)
        elif is_operator(node, "Gemm"):
            self._cut(node, 1, 0 if integer_attribute(node, "transB", 0) else 1)
            if len(node.inputs) > 2 and node.inputs[2] is not None:
                self._along(node, 2)
        else:
            raise _unknown(node, _LOGITS)

    def check(self) -> None:
        """Refuse constants that something else reads too, and graphs without a table."""
        if not self._axes:
            raise UnsupportedError("the vocabulary cannot be trimmed: the graph looks no token ids up", _REMEDY)
        for value, reads in self._reads.items():
            others = [use.node for use in value.uses() if (use.node, use.idx) not in reads]
            if others:
                raise _unknown(others[0], f"reads {value.name} too, which has a row for each token")
            if value.is_graph_output():
                raise UnsupportedError(f"the graph gives {value.name} back, a row for each token", _REMEDY)

    def apply(self, model: ir.Model) -> None:
        """Do it."""
        names = Names(model.graph)
        made: _Made = {}
        for value, axis in self._axes.items():
            tensor = constant_of(value)
            if tensor is not None:
                _put(model, names, value, _taken(tensor.numpy(), axis, self._ids, made), tensor.dtype)
        for node, place in self._compared:
            old = _integers(node.inputs[place])
            if old is not None:
                array = np.array([self._new.get(int(one), _NOWHERE) for one in old.flat], old.dtype).reshape(old.shape)
                node.replace_input_with(place, add_constant(model.graph, names.fresh(f"{label(node)}_ids"), array))
        for value, axis in self._shapes:
            if value.shape is not None:
                dims = list(value.shape)
                dims[axis] = len(self._ids)
                value.shape = ir.Shape(dims)

    def _operand(self, node: ir.Node, place: int) -> None:
        value = node.inputs[place]
        if value is None:
            raise _unknown(node, _LOGITS)
        self.trace(value, frozenset((node,)))

    def _along(self, node: ir.Node, place: int) -> None:
        """A constant beside logits: one number for all of them, or one for each."""
        tensor = constant_of(node.inputs[place])
        if tensor is None:
            raise _unknown(node, _LOGITS)
        if len(tensor.shape) and tensor.shape[-1] != 1:
            self._cut(node, place, len(tensor.shape) - 1)

    def _cut(self, node: ir.Node, place: int, axis: int) -> None:
        """Mark what a node reads, a constant, to be cut along an axis; past what only turns it round."""
        value = node.inputs[place]
        turned = producer(value, "Transpose", "Identity", "Cast") if constant_of(value) is None else None
        if value is None or (turned is None and constant_of(value) is None):
            raise _unknown(node, "reads a table that is no constant")
        self._reads.setdefault(value, set()).add((node, place))
        if turned is not None:
            order = turned.attributes.get_ints("perm", [1, 0]) if turned.op_type == "Transpose" else None
            if order is not None and list(order) != [1, 0]:
                raise _unknown(turned, "turns a table in a way that is not known")
            self._shapes.append((value, axis))
            self._cut(turned, 0, axis if order is None else 1 - axis)
            return
        tensor = constant_of(value)
        rows = tensor.shape[axis] if tensor is not None and axis < len(tensor.shape) else 0
        if not isinstance(rows, int) or rows <= self._ids.max() or self._axes.setdefault(value, axis) != axis:
            raise _unknown(node, f"reads {value.name}, which has no row for each token")


def _unknown(node: ir.Node, does: str) -> UnsupportedError:
    return UnsupportedError(f"the vocabulary cannot be trimmed: {label(node)} ({node.op_type}) {does}", _REMEDY)


def _integers(value: ir.Value | None) -> NDArray[np.generic] | None:
    tensor = constant_of(value)
    return tensor.numpy() if tensor is not None and tensor.dtype.is_integer() else None


def _stays_integer(node: ir.Node) -> bool:
    return node.op_type != "Cast" or ir.DataType(integer_attribute(node, "to", 0)) in _INTEGERS


def _put(model: ir.Model, names: Names, value: ir.Value, array: NDArray[np.generic], dtype: ir.DataType) -> None:
    """Let a constant hold another array."""
    if value.is_initializer():
        value.const_value = ir.Tensor(array, dtype=dtype, name=value.name)
        value.shape = ir.Shape(array.shape)
    else:
        value.replace_all_uses_with(add_constant(model.graph, names.fresh(f"{value.name}_kept"), array))
        remove_dead([value])


def _taken(array: NDArray[np.generic], axis: int, ids: NDArray[np.int64], made: _Made) -> NDArray[np.generic]:
    """The array at these places of an axis; a table and a head that share their memory do so afterwards."""
    rows = np.moveaxis(array, axis, 0)
    key = (rows.__array_interface__["data"], rows.shape, rows.strides, rows.dtype.str)
    if key not in made:
        made[key] = rows, np.ascontiguousarray(rows[ids])
    return np.moveaxis(made[key][1], 0, axis)
