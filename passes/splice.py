"""Names, values and nodes for passes that put chains of several nodes into a graph; the rest is in `surgery`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .surgery import copy_path


class Names:
    """Names that no value of a graph, its subgraphs included, has yet."""

    def __init__(self, graph: ir.Graph) -> None:
        self._taken = {value.name for value in graph.inputs} | set(graph.initializers)
        for node in graph.all_nodes():
            self._taken.update(output.name for output in node.outputs)
        for subgraph in graph.subgraphs():
            self._taken.update(value.name for value in subgraph.inputs)
            self._taken.update(subgraph.initializers)

    def fresh(self, wanted: str) -> str:
        """``wanted``, or that with a number behind it; taken from now on."""
        name = wanted
        number = 1
        while name in self._taken:
            number += 1
            name = f"{wanted}_{number}"
        self._taken.add(name)
        return name


def label(node: ir.Node) -> str:
    """What to call a node in a message: its name, or its first output's where the exporter left none."""
    return node.name or node.outputs[0].name or node.op_type


def new_value(name: str, dtype: ir.DataType, shape: ir.Shape | None = None) -> ir.Value:
    """A tensor value that no node produces yet."""
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=None if shape is None else shape.copy())


def new_node(
    op_type: str,
    inputs: Sequence[ir.Value],
    outputs: Sequence[ir.Value],
    like: ir.Node | None,
    attributes: Mapping[str, int] | None = None,
) -> ir.Node:
    """A standard operator, named after its first output, with the module path of the node that it comes from."""
    node = ir.node(op_type, inputs, attributes, outputs=outputs, name=f"{outputs[0].name}_{op_type}")
    if like is not None:
        copy_path(like, node)
    return node


def add_constant(graph: ir.Graph, name: str, array: NDArray[np.generic]) -> ir.Value:
    """A new initializer of ``graph`` that holds ``array``; ``name`` must be fresh."""
    value = new_value(name, ir.DataType.from_numpy(array.dtype), ir.Shape(array.shape))
    value.const_value = ir.tensor(array, name=name)
    graph.register_initializer(value)
    return value


def take_place(new: ir.Value, old: ir.Value) -> None:
    """Let ``new`` take the name, shape and all uses of ``old``, graph outputs included.

    ``old`` is left nameless and unused, to be removed with its node.
    """
    new.shape = None if old.shape is None else old.shape.copy()
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    new.name, old.name = old.name, None
