"""What is known of shapes without running the graph: dimensions as integers or as names that stand for equal numbers.

Two equal names are taken for equal dimensions, as ONNX's ``dim_param`` has it, and no dimension is taken to be 0.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from .sites import integer_attribute
from .surgery import integers, is_operator, producer

Dim = int | str
"""A known length, or the name of an unknown one; equal names are equal lengths."""
Dims = tuple[Dim, ...]

_DEPTH = 12
"""How many nodes upstream a shape computation is followed."""


def dims_of(value: ir.Value | None) -> Dims | None:
    """The dimensions of a tensor; None if not even the rank is known. An unnamed dimension gets a name of its own."""
    if value is None or value.shape is None:
        return None
    return tuple(_dim(value, index) for index in range(len(value.shape)))


def contents_of(value: ir.Value | None, depth: int = _DEPTH) -> Dims | None:
    """The numbers that an integer tensor of a shape computation holds, scalars as one; None if they cannot be told.

    Follows Shape, Concat, Gather, Slice, Squeeze, Unsqueeze, Reshape, Cast, Identity, constants, and the way exporters
    spell Expand's -1: ``Where(Equal(shape, -1), ones, shape)``.
    """
    known = integers(value)
    node = None if value is None or depth == 0 else value.producer()
    if known is not None or node is None:
        return known
    result: Dims | None = None
    if is_operator(node, "Shape"):
        result = _shape_contents(node)
    elif is_operator(node, "Concat"):
        parts = [contents_of(item, depth - 1) for item in node.inputs]
        result = None if None in parts else tuple(dim for part in parts for dim in part or ())
    elif is_operator(node, "Gather", "Slice"):
        result = _selected(node, depth)
    elif is_operator(node, "Squeeze", "Unsqueeze", "Reshape", "Cast", "Identity"):
        result = contents_of(node.inputs[0], depth - 1)
    elif is_operator(node, "Where"):
        result = _ones_for_minus_one(node, depth)
    return result


def reshaped(node: ir.Node) -> Dims | None:
    """The dimensions that a Reshape makes, -1 and copied ones resolved where that can be told; None if not.

    A -1 that cannot be resolved gets a name of its own.
    """
    source, wanted = dims_of(node.inputs[0]), contents_of(node.inputs[1])
    if wanted is None or (0 in wanted and integer_attribute(node, "allowzero", 0) == 1):
        return None
    result: list[Dim] = []
    for index, dim in enumerate(wanted):
        if dim == 0 and (source is None or index >= len(source)):
            return None
        result.append(source[index] if dim == 0 and source is not None else dim)
    if -1 in result:
        rest = [dim for dim in result if dim != -1]
        result[result.index(-1)] = _quotient(source, rest) or f"{node.outputs[0].name}[-1]"
    return tuple(result)


def same_dims(left: Dims | None, right: Dims | None) -> bool:
    """Whether both are known and equal."""
    return left is not None and left == right


def last_dim(value: ir.Value | None) -> int | None:
    """Length of the last axis, if it is a known number."""
    dims = dims_of(value)
    return dims[-1] if dims and isinstance(dims[-1], int) else None


def permuted_from(value: ir.Value | None, order: tuple[int, ...]) -> ir.Value | None:
    """The value that a Transpose with exactly this permutation made ``value`` from."""
    node = producer(value, "Transpose")
    if node is None or "perm" not in node.attributes or tuple(node.attributes["perm"].as_ints()) != order:
        return None
    return node.inputs[0]


def _dim(value: ir.Value, index: int) -> Dim:
    dim = value.shape[index] if value.shape is not None else None
    if isinstance(dim, int):
        return dim
    name = dim.value if dim is not None else None
    return name if name is not None else f"{value.name}[{index}]"


def _shape_contents(node: ir.Node) -> Dims | None:
    dims = dims_of(node.inputs[0])
    if dims is None:
        return None
    start = integer_attribute(node, "start", 0)
    end = integer_attribute(node, "end", len(dims))
    return dims[start:end]


def _selected(node: ir.Node, depth: int) -> Dims | None:
    """Contents of a Gather or Slice of a list of dimensions."""
    source = contents_of(node.inputs[0], depth - 1)
    arguments = [integers(value) for value in node.inputs[1:] if value is not None]
    if source is None or any(item is None or not item for item in arguments):
        return None
    if node.op_type == "Gather":
        indices = arguments[0] or ()
        inside = all(-len(source) <= index < len(source) for index in indices)
        return tuple(source[index] for index in indices) if inside else None
    if len(arguments) < 2:
        return None
    starts, ends = arguments[0] or (), arguments[1] or ()
    steps = arguments[3] or () if len(arguments) == 4 else (1,)
    return source[starts[0] : ends[0]] if steps == (1,) and len(starts) == 1 else None


def _ones_for_minus_one(node: ir.Node, depth: int) -> Dims | None:
    check, shape = producer(node.inputs[0], "Equal"), node.inputs[2]
    contents = contents_of(shape, depth - 1)
    if check is None or contents is None or shape not in check.inputs:
        return None
    return tuple(1 if dim == -1 else dim for dim in contents)


def _quotient(source: Dims | None, rest: list[Dim]) -> Dim | None:
    """What is left of the elements of ``source`` after dividing by ``rest``: one dimension, or None."""
    if source is None:
        return None
    left = [dim for dim in source if isinstance(dim, str)]
    for dim in rest:
        if isinstance(dim, str):
            if dim not in left:
                return None
            left.remove(dim)
    number = math.prod(dim for dim in source if isinstance(dim, int))
    divisor = math.prod(dim for dim in rest if isinstance(dim, int))
    if divisor == 0 or number % divisor:
        return None
    if not left:
        return number // divisor
    return left[0] if len(left) == 1 and number == divisor else None
