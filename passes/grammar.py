"""What a graph must satisfy between passes: the promise that every pass keeps and every pass may rely on."""

from __future__ import annotations

from collections.abc import Iterator

import onnx
import onnx_ir as ir

from artifacts.errors import PassError, UnsupportedError
from artifacts.target import Target

from .sites import STANDARD_DOMAINS

IR_VERSION = 10
"""ir_version of every shipped graph: what the oldest supported ONNX Runtime (1.24) and its peers load."""
MAXIMUM_OPSET = 24
"""Highest standard opset of a shipped graph."""

Signature = tuple[tuple[str, str, str, str], ...]
"""``("input"|"output", name, type, shape)`` of every graph input and output, in order."""


def signature(model: ir.Model) -> Signature:
    """What the callers of a graph rely on: names, types, shapes and order of its inputs and outputs."""
    inputs = [("input", str(value.name), str(value.dtype), str(value.shape)) for value in model.graph.inputs]
    outputs = [("output", str(value.name), str(value.dtype), str(value.shape)) for value in model.graph.outputs]
    return (*inputs, *outputs)


def check(model: ir.Model, target: Target, *, finished: bool = False) -> None:
    """Check a graph.

    Every value and every named node has a name of its own; every value is made before it is read; initializers hold
    data of the type and shape they state; every operator exists in the opset imported and is in a domain of the target.

    Args:
        model: The graph.
        target: What it is compiled for.
        finished: It is about to be shipped: also ir_version and opset are pinned, all nodes named, no functions left.

    Raises:
        PassError: The graph is malformed.
        UnsupportedError: It is well formed, and the target cannot run an operator; names the node.
    """
    names: set[str] = set()
    _check_graph(model.graph, frozenset(), names)
    labels: set[str] = set()
    for node in model.graph.all_nodes():
        if node.name and node.name in labels:
            raise PassError(f"two nodes are called {node.name!r}", "Run the pass finish first")
        labels.add(node.name or "")
        _check_operator(model, node, target)
    if finished:
        _check_finished(model)


def _check_graph(graph: ir.Graph, outer: frozenset[ir.Value], names: set[str]) -> None:
    inputs = set(graph.inputs)
    defined = set(outer) | inputs
    for value in graph.inputs:
        _claim(value, names, "input")
    for key, value in graph.initializers.items():
        if value not in inputs:
            _claim(value, names, "initializer")
        _check_initializer(key, value)
        defined.add(value)
    for node in graph:
        for source in node.inputs:
            if source is not None and source not in defined:
                raise PassError(f"node {_label(node)} reads {source.name!r}, which nothing before it makes")
        for inner in _subgraphs(node):
            _check_graph(inner, frozenset(defined), set(names))
        for output in node.outputs:
            if output.name:
                _claim(output, names, f"output of {_label(node)}")
            elif output.uses() or output.is_graph_output():
                raise PassError(f"an output of node {_label(node)} is used and has no name")
            defined.add(output)
    for value in graph.outputs:
        if value not in defined:
            raise PassError(f"nothing makes the graph output {value.name!r}")


def _claim(value: ir.Value, names: set[str], what: str) -> None:
    if not value.name:
        raise PassError(f"an {what} of the graph has no name")
    if value.name in names:
        raise PassError(f"the name {value.name!r} is used twice (the second time for the {what})")
    names.add(value.name)


def _check_initializer(key: str, value: ir.Value) -> None:
    tensor = value.const_value
    if key != value.name:
        raise PassError(f"initializer {value.name!r} is registered as {key!r}")
    if tensor is None:
        raise PassError(f"initializer {key!r} has no data")
    if value.dtype is not None and value.dtype != tensor.dtype:
        raise PassError(f"initializer {key!r} states {value.dtype} and holds {tensor.dtype}")
    if value.shape is not None and value.shape.is_static() and tuple(value.shape) != tuple(tensor.shape):
        raise PassError(f"initializer {key!r} states shape {value.shape} and holds {tensor.shape}")


def _check_operator(model: ir.Model, node: ir.Node, target: Target) -> None:
    if node.op_identifier() in model.functions:
        return
    domain = "" if node.domain in STANDARD_DOMAINS else node.domain
    if domain not in target.domains:
        raise UnsupportedError(
            f"node {_label(node)} is {node.domain}.{node.op_type}, which target {target.name!r} cannot run",
            f"Domains of this target: {', '.join(name or 'ai.onnx' for name in target.domains)}",
        )
    imports = model.graph.opset_imports
    version = imports.get(node.domain, imports.get(domain))
    if version is None:
        raise PassError(f"node {_label(node)} is of domain {node.domain!r}, which the graph does not import")
    if domain == "" and schema_of(node.op_type, version) is None:
        raise UnsupportedError(f"node {_label(node)}: there is no operator {node.op_type} in opset {version}")


def schema_of(op_type: str, version: int) -> onnx.defs.OpSchema | None:
    """Schema of a standard operator in an opset; None if it is not there, or deprecated."""
    try:
        schema = onnx.defs.get_schema(op_type, version, "")
    except onnx.defs.SchemaError:
        return None
    return None if schema.deprecated else schema


def _check_finished(model: ir.Model) -> None:
    version = model.graph.opset_imports.get("", 0)
    if model.ir_version != IR_VERSION or version > MAXIMUM_OPSET:
        raise PassError(f"the graph has ir_version {model.ir_version} and opset {version}", "Run the pass finish last")
    if model.functions:
        raise PassError("the graph still calls functions of its own", "Run the pass inline-functions")
    for node in model.graph.all_nodes():
        if not node.name:
            raise PassError(f"node {_label(node)} has no name", "Run the pass finish last")


def _subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _label(node: ir.Node) -> str:
    name = node.name or (node.outputs[0].name if node.outputs else "")
    return f"{name!r} ({node.op_type})"
