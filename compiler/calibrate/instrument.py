"""Copies of a graph that give the values one wants to see, or only how large they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common

from ..graphs import GraphFolder

_OUTPUT = "hasten.observed"
_NODE = "hasten.node"
_FLOATS = {ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE}


def instrument(model: ir.Model, values: Sequence[ir.Value], *, shapes: bool = False) -> ir.Model:
    """A copy of ``model`` whose outputs are ``values``, in that order; what they do not depend on is left out.

    Args:
        model: Stays as it is; its tensors are shared.
        values: Float values of the main graph, inputs among them. What is not float32 is cast to it.
        shapes: Give the shape of each, int64 [rank], instead of the value.

    Returns:
        The copy, with its inputs; its nodes have names of their own.

    Raises:
        ValueError: A value has no name, is not of the main graph, or holds no floats.
    """
    copy = model.clone()
    twins = dict(zip(_values(model.graph), _values(copy.graph), strict=True))
    graph = copy.graph
    graph.outputs.clear()
    for index, value in enumerate(values):
        if value not in twins or not value.name:
            raise ValueError(f"{value.name!r} is no named value of the main graph")
        if value.dtype is not None and value.dtype not in _FLOATS:
            raise ValueError(f"{value.name!r} holds {value.dtype}, and only floats are observed")
        graph.outputs.append(_output(graph, twins[value], f"{_OUTPUT}.{index}", shapes=shapes))
    if copy.functions:
        common.InlinePass()(copy)
    common.RemoveUnusedNodesPass()(copy)
    for index, node in enumerate(graph):
        node.name = f"{_NODE}.{index}"
        node.metadata_props.clear()
    return copy


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all tensors of the graph and of its branches, each counted once."""
    tensors = {id(value.const_value): value.const_value for graph in model.graphs() for value in _stored(graph)}
    return sum(tensor.nbytes for tensor in tensors.values() if tensor is not None)


@contextmanager
def saved(model: ir.Model, folder: GraphFolder) -> Iterator[Path]:
    """The graph as a file where its weights lie: ONNX Runtime refuses weights outside the folder. Deleted at the end.

    Raises:
        OutputError: It cannot be written.
    """
    path = folder.save(model).path
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


def _stored(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.initializers.values()


def _output(graph: ir.Graph, value: ir.Value, name: str, *, shapes: bool) -> ir.Value:
    if value.dtype == ir.DataType.FLOAT and value.producer() is not None and not shapes:
        return value
    # Also where the type is not known: a cast of float32 to itself changes nothing.
    kind = ir.DataType.INT64 if shapes else ir.DataType.FLOAT
    output = ir.Value(name=name, type=ir.TensorType(kind))
    attributes = {} if shapes else {"to": ir.DataType.FLOAT}
    node = ir.node("Shape" if shapes else "Cast", [value], attributes, outputs=[output])
    maker = value.producer()
    if maker is None:
        graph.append(node)
    else:  # at once, so that what is only measured need not wait for the end
        graph.insert_after(maker, node)
    return output
