"""What a value of a graph depends on, as one digest: what is computed upstream of it, and nothing else.

Names of nodes and of inner values are no part of it, nor what lies beside or downstream: a value that a pass left alone
has the digest that it had before, wherever else the graph was rewritten.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import onnx_ir as ir

from ..graphs import EXTERNAL_FROM, GraphFolder
from .instrument import instrument, saved


def digests(model: ir.Model, values: Sequence[ir.Value], folder: GraphFolder) -> list[str]:
    """SHA-256 of each value, in hexadecimal: of the operators that it is made by with their versions and attributes, of
    the content of weights, and of the names of inputs.

    Args:
        model: Stays as it is.
        values: See `instrument`.
        folder: Where the weights lie, or are written: large ones are known there by their content.

    Raises:
        OutputError: A weight cannot be written.
        ValueError: As `instrument`.
    """
    copy = instrument(model, values)
    with saved(copy, folder) as path:
        graph = ir.load(path).graph  # where every large weight is a file that is named by its content
        graph.sort()
        reader = _Reader(graph.opset_imports)
        reader.read(graph, 0)
        return [reader.known[output] for output in graph.outputs]


class _Reader:
    """Digests of all values of a graph that was saved; those of its branches and bodies see the values around them."""

    def __init__(self, versions: dict[str, int]) -> None:
        self.known: dict[ir.Value, str] = {}
        self._versions = versions

    def read(self, graph: ir.Graph, depth: int) -> None:
        for value in graph.initializers.values():
            self.known[value] = _of("constant", "" if value.const_value is None else _content(value.const_value))
        for index, value in enumerate(graph.inputs):
            self.known[value] = _of("input", depth, index if depth else value.name, str(value.dtype))
        for node in graph:
            told = self._node(node, depth)
            for index, output in enumerate(node.outputs):
                self.known[output] = _of(told, index)

    def _node(self, node: ir.Node, depth: int) -> str:
        attributes = [(name, self._attribute(item, depth)) for name, item in sorted(node.attributes.items())]
        inputs = [None if value is None else self.known[value] for value in node.inputs]
        return _of(node.domain, node.op_type, self._versions.get(node.domain), attributes, inputs)

    def _attribute(self, attribute: ir.Attr, depth: int) -> object:
        if attribute.type == ir.AttributeType.GRAPH:
            return self._inner(attribute.as_graph(), depth)
        if attribute.type == ir.AttributeType.GRAPHS:
            return [self._inner(graph, depth) for graph in attribute.as_graphs()]
        if attribute.type == ir.AttributeType.TENSOR:
            return _content(attribute.as_tensor())
        return hashlib.sha256(ir.to_proto(attribute).SerializeToString(deterministic=True)).hexdigest()

    def _inner(self, graph: ir.Graph, depth: int) -> object:
        self.read(graph, depth + 1)
        return [self.known[output] for output in graph.outputs]


def _content(tensor: ir.TensorProtocol) -> str:
    form = [str(tensor.dtype), list(tensor.shape.numpy())]
    if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes >= EXTERNAL_FROM:
        return _of(form, str(tensor.location))  # named by its content
    return _of(form, hashlib.sha256(tensor.tobytes()).hexdigest())


def _of(*told: object) -> str:
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()
