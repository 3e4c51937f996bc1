"""Two graphs as one that reads the same inputs, so that what one computes is seen beside what the other does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from artifacts.signature import cache_names
from passes.splice import Names, add_constant

_CACHE = cache_names(0)[0][0].split(".", maxsplit=1)[0] + "."


class DifferentInputsError(ValueError):
    """The two graphs take different things."""


@dataclass(frozen=True, eq=False)
class Merged:
    """A graph that computes what two graphs do.

    Attributes:
        model: The graph, without outputs.
        mine: Values of the one graph in it, by the names that they have there and here.
        theirs: Values of the other graph in it, by the names that they have there.
    """

    model: ir.Model
    mine: Mapping[str, ir.Value]
    theirs: Mapping[str, ir.Value]


def merge(model: ir.Model, original: ir.Model) -> Merged:
    """One graph of copies of both, with the inputs of ``model``; tensors are shared.

    A KV cache of ``original`` that ``model`` does not take, or takes in another shape, is zeros, as it is before the
    first token.

    Raises:
        DifferentInputsError: Another input differs, or a version of an operator set.
    """
    copy, other = model.clone(), original.clone()
    if other.functions:
        common.InlinePass()(other)
    graph = copy.graph
    for domain, version in other.graph.opset_imports.items():
        if graph.opset_imports.setdefault(domain, version) != version:
            raise DifferentInputsError(
                f"the original is of version {version} of the operators of {domain or 'ai.onnx'}"
            )
    mine, theirs = _by_name(graph), _by_name(other.graph)
    names = Names(graph)
    for name, value in _by_name(other.graph).items():
        if value.is_graph_input():
            theirs[name] = _input(graph, names, value)
            value.replace_all_uses_with(theirs[name])
    other.graph.outputs.clear()
    for inner in other.graph.subgraphs():
        for value in (*inner.inputs, *inner.initializers.values()):
            value.name = names.fresh(f"original.{value.name}")
    for index, node in enumerate(other.graph.all_nodes()):
        node.name = f"original.{index}"
        for value in node.outputs:
            if value.name:
                value.name = names.fresh(f"original.{value.name}")
    for name, value in list(other.graph.initializers.items()):
        del other.graph.initializers[name]
        if value.is_graph_input():
            continue
        value.name = names.fresh(f"original.{name}")
        graph.register_initializer(value)
    nodes = list(other.graph)
    other.graph.remove(nodes)
    graph.extend(nodes)
    graph.outputs.clear()
    return Merged(copy, mine, theirs)


def beside(merged: Merged, name: str, source: ir.Value, wanted: tuple[ir.Value, ...], made: ir.Value) -> ir.Value:
    """A new value ``[x, r]``, along the last axis: what a map reads, and ``wanted[0] - wanted[1] ... - made``.

    Args:
        merged: Gets the nodes.
        name: Of the value; must be fresh.
        source: x, ``[..., K]``.
        wanted: What the map should make, ``[..., N]``: the first less all others.
        made: What it makes.
    """
    rest = wanted[0]
    for index, value in enumerate((*wanted[1:], made)):
        rest = _add(merged.model.graph, "Sub", (rest, value), f"{name}.rest.{index}")
    return _add(merged.model.graph, "Concat", (source, rest), name, axis=-1)


def _add(graph: ir.Graph, op_type: str, inputs: tuple[ir.Value, ...], name: str, **attributes: int) -> ir.Value:
    output = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT))
    graph.append(ir.node(op_type, inputs, attributes, outputs=[output]))
    return output


def _by_name(graph: ir.Graph) -> dict[str, ir.Value]:
    return {str(value.name): value for value in _values(graph) if value.name}


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    for node in graph:
        yield from node.outputs


def _input(graph: ir.Graph, names: Names, value: ir.Value) -> ir.Value:
    """What stands for an input of the original: the graph's own, or zeros for a cache that it has no such input for."""
    own = next((item for item in graph.inputs if item.name == value.name), None)
    if own is not None and own.dtype == value.dtype and _extents(own) == _extents(value):
        return own
    caches = [item for item in graph.inputs if str(item.name).startswith(_CACHE)]
    if not caches or not str(value.name).startswith(_CACHE) or value.shape is None or value.dtype is None:
        raise DifferentInputsError(f"the original takes another {value.name}")
    return _zeros(graph, names, value, value.shape, own or caches[0])


def _zeros(graph: ir.Graph, names: Names, value: ir.Value, shape: ir.Shape, like: ir.Value) -> ir.Value:
    """Zeros of the shape of the cache ``value``, its batch and its capacity those of another cache."""
    whole = ir.Value(name=names.fresh(f"original.{value.name}.like"), type=ir.TensorType(ir.DataType.INT64))
    nodes = [ir.node("Shape", [like], outputs=[whole])]
    parts: list[ir.Value] = []
    for axis, extent in enumerate(shape):
        name = names.fresh(f"original.{value.name}.{axis}")
        if isinstance(extent, int):
            parts.append(add_constant(graph, name, np.array([extent])))
            continue
        place = add_constant(graph, names.fresh(f"{name}.axis"), np.array([axis]))
        parts.append(ir.Value(name=name, type=ir.TensorType(ir.DataType.INT64)))
        nodes.append(ir.node("Gather", [whole, place], outputs=[parts[-1]]))
    full = ir.Value(name=names.fresh(f"original.{value.name}.shape"), type=ir.TensorType(ir.DataType.INT64))
    nodes.append(ir.node("Concat", parts, {"axis": 0}, outputs=[full]))
    zeros = ir.Value(name=names.fresh(f"original.{value.name}"), type=value.type)
    kind = ir.DataType.FLOAT if value.dtype is None else value.dtype
    filling = ir.tensor(np.zeros(1, kind.numpy()), dtype=kind)
    nodes.append(ir.node("ConstantOfShape", [full], {"value": filling}, outputs=[zeros]))
    graph.extend(nodes)
    return zeros


def _extents(value: ir.Value) -> list[int | None] | None:
    return None if value.shape is None else [dim if isinstance(dim, int) else None for dim in value.shape]
