"""Dimensions carried from the graph's inputs through the operators of a transformer, names kept.

ONNX's own inference gives a new name to each dimension that a Reshape computes; with the names of the inputs carried
through, ``[batch, sequence, 384]`` stays just that, and fusions can prove what they need.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir

from passes.shapes import Dim, Dims, contents_of, dims_of, reshaped
from passes.sites import STANDARD_DOMAINS, integer_attribute
from passes.surgery import integers

_ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Pow", "Where", "Max", "Min")
_ELEMENTWISE = (*_ARITHMETIC, "And", "Or", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
_UNARY = ("Cast", "Softmax", "LayerNormalization", "Gelu", "Erf", "Tanh", "Sqrt", "Relu", "Sigmoid", "Neg", "Not")
_SAME = (*_UNARY, "IsNaN", "Abs", "Exp", "Log", "Clip", "CumSum", "Sign", "Identity")


def propagate(model: ir.Model) -> int:
    """Refine the shapes of values that nodes of the main graph make.

    Returns:
        How many shapes changed. Integers stay integers; shapes of graph outputs stay what they are.
    """
    changed = 0
    for node in model.graph:
        rule = _rule(node)
        dims = rule(node) if rule is not None else None
        if dims is not None and not node.outputs[0].is_graph_output():
            changed += _refine(node.outputs[0], dims)
    return changed


def _rule(node: ir.Node) -> Callable[[ir.Node], Dims | None] | None:
    if node.domain not in STANDARD_DOMAINS:
        return None
    if node.op_type in _SAME:
        return lambda item: dims_of(item.inputs[0])
    if node.op_type in _ELEMENTWISE:
        return _broadcast
    return _RULES.get(node.op_type)


def _refine(value: ir.Value, dims: Dims) -> int:
    old = value.shape
    if old is not None and len(old) != len(dims):
        return 0
    merged: list[int | str | None] = []
    for index, dim in enumerate(dims):
        known = old[index] if old is not None else None
        invented = isinstance(dim, str) and dim.endswith("]")  # one of dims_of's own: it says nothing
        merged.append(known if isinstance(known, int) else _name(known) if invented else dim)
    shape = ir.Shape(merged)
    if shape == old:
        return 0
    value.shape = shape
    return 1


def _name(dim: ir.SymbolicDim | int | None) -> str | None:
    return dim.value if isinstance(dim, ir.SymbolicDim) else None


def _broadcast(node: ir.Node) -> Dims | None:
    return _broadcast_dims([dims_of(value) for value in node.inputs])


def _broadcast_dims(operands: Sequence[Dims | None]) -> Dims | None:
    rank = max((len(dims) for dims in operands if dims is not None), default=0)
    result: list[Dim] = [1] * rank
    for dims in operands:
        if dims is None:
            return None
        for offset, dim in enumerate(dims, start=rank - len(dims)):
            merged = _merged(result[offset], dim)
            if merged is None:
                return None
            result[offset] = merged
    return tuple(result)


def _merged(left: Dim, right: Dim) -> Dim | None:
    """The length of an axis of these two lengths broadcast against each other; None if it cannot be told."""
    if left in (1, right):
        return right
    if right == 1 or isinstance(left, int):
        return left
    return right if isinstance(right, int) else None


def _transposed(node: ir.Node) -> Dims | None:
    dims = dims_of(node.inputs[0])
    if dims is None or "perm" not in node.attributes:
        return None
    return tuple(dims[axis] for axis in node.attributes["perm"].as_ints())


def _multiplied(node: ir.Node) -> Dims | None:
    left, right = dims_of(node.inputs[0]), dims_of(node.inputs[1])
    if left is None or right is None or len(left) < 2 or len(right) < 2:
        return None
    if len(right) == 2:
        return (*left[:-1], right[-1])
    return (*left[:-1], right[-1]) if left[:-2] == right[:-2] else None


def _gathered(node: ir.Node) -> Dims | None:
    source, indices = dims_of(node.inputs[0]), dims_of(node.inputs[1])
    if source is None or indices is None or integer_attribute(node, "axis", 0) != 0:
        return None
    return (*indices, *source[1:])


def _expanded(node: ir.Node) -> Dims | None:
    return _broadcast_dims([dims_of(node.inputs[0]), contents_of(node.inputs[1])])


def _unsqueezed(node: ir.Node) -> Dims | None:
    dims, axes = dims_of(node.inputs[0]), integers(node.inputs[1]) if len(node.inputs) > 1 else None
    if dims is None or axes is None:
        return None
    rank = len(dims) + len(axes)
    places = {axis % rank for axis in axes}
    rest = iter(dims)
    return tuple(1 if index in places else next(rest) for index in range(rank))


def _sliced(node: ir.Node) -> Dims | None:
    """A cut from 0 to a known length along one axis; the length is taken to lie inside, as for position tables."""
    dims, end = dims_of(node.inputs[0]), contents_of(node.inputs[2])
    axes, steps = (integers(node.inputs[index]) if len(node.inputs) > index else None for index in (3, 4))
    plain = integers(node.inputs[1]) == (0,) and steps in (None, (1,)) and axes is not None and len(axes) == 1
    if dims is None or end is None or axes is None or not plain or len(end) != 1 or isinstance(end[0], int):
        return None
    axis = axes[0] % len(dims)
    return (*dims[:axis], end[0], *dims[axis + 1 :])


def _counted(node: ir.Node) -> Dims | None:
    """Range from 0 by 1."""
    plain = integers(node.inputs[0]) == (0,) and integers(node.inputs[2]) == (1,)
    return contents_of(node.inputs[1]) if plain else None


def _averaged(node: ir.Node) -> Dims | None:
    dims, axes = dims_of(node.inputs[0]), integers(node.inputs[1]) if len(node.inputs) > 1 else None
    if dims is None or axes is None or integer_attribute(node, "keepdims", 1) != 1:
        return None
    places = {axis % len(dims) for axis in axes}
    return tuple(1 if index in places else dim for index, dim in enumerate(dims))


_RULES: dict[str, Callable[[ir.Node], Dims | None]] = {
    "ConstantOfShape": lambda node: contents_of(node.inputs[0]),
    "Expand": _expanded,
    "Gather": _gathered,
    "GatherElements": lambda node: dims_of(node.inputs[1]),
    "MatMul": _multiplied,
    "Range": _counted,
    "ReduceMean": _averaged,
    "Reshape": reshaped,
    "Slice": _sliced,
    "Transpose": _transposed,
    "Unsqueeze": _unsqueezed,
}
