"""The few graph operations that every pass needs: look upstream, look downstream, put new nodes in, take dead ones out.

Shared with no state: everything here is a function of the graph it is given.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import ArrayLike, NDArray

from .sites import NAME_SCOPES, ORIGINS, STANDARD_DOMAINS, constant_of

MICROSOFT = "com.microsoft"


def is_operator(node: ir.Node | None, *types: str, domain: str = "") -> bool:
    """Whether the node is one of these operators of the domain ("" is the standard one, in either spelling)."""
    if node is None or node.op_type not in types:
        return False
    return node.domain in STANDARD_DOMAINS if domain == "" else node.domain == domain


def producer(value: ir.Value | None, *types: str) -> ir.Node | None:
    """The node that makes the value, if it is one of these standard operators."""
    node = None if value is None else value.producer()
    return node if is_operator(node, *types) else None


def only_user(value: ir.Value) -> ir.Node | None:
    """The one node that reads the value; None if several do, none does, or it is an output of the graph."""
    uses = tuple(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def needed(value: ir.Value | None) -> ir.Value:
    """An input of a node that the operator's schema makes mandatory.

    Raises:
        ValueError: The graph leaves it out.
    """
    if value is None:
        raise ValueError("a node lacks an input that its operator needs")
    return value


def scalar(value: ir.Value | None) -> float | None:
    """The number held by a constant of one element, else None."""
    tensor = constant_of(value)
    if tensor is None or tensor.size != 1 or tensor.dtype.is_string():
        return None
    return float(tensor.numpy().reshape(()))


def integers(value: ir.Value | None) -> tuple[int, ...] | None:
    """The numbers held by a small integer constant, else None."""
    tensor = constant_of(value)
    if tensor is None or tensor.size > 64 or not tensor.dtype.is_integer():
        return None
    return tuple(int(item) for item in tensor.numpy().reshape(-1))


def is_vector(value: ir.Value | None) -> bool:
    """Whether the value is a constant of rank 1."""
    tensor = constant_of(value)
    return tensor is not None and len(tensor.shape) == 1


def opset(model: ir.Model) -> int:
    """Version of the standard operators that the main graph imports; 0 if it imports none."""
    imports = model.graph.opset_imports
    return imports.get("", imports.get("ai.onnx", 0))


def require_microsoft(model: ir.Model) -> None:
    """Make the graph import the operators of com.microsoft."""
    model.graph.opset_imports.setdefault(MICROSOFT, 1)


def initializer(graph: ir.Graph, name: str, data: ArrayLike, dtype: ir.DataType) -> ir.Value:
    """The initializer that holds ``data`` under that name, made if need be; numbered if something else has the name."""
    array: NDArray[np.generic] = np.asarray(data).astype(dtype.numpy())
    candidate, number = name, 1
    while candidate in graph.initializers or _taken(graph, candidate):
        tensor = constant_of(graph.initializers.get(candidate))
        if tensor is not None and _holds(tensor, array, dtype):
            return graph.initializers[candidate]
        number += 1
        candidate = f"{name}.{number}"
    tensor = ir.Tensor(array, dtype=dtype, name=candidate)
    value = ir.Value(name=candidate, type=ir.TensorType(dtype), shape=tensor.shape, const_value=tensor)
    graph.register_initializer(value)
    return value


def build(
    op_type: str,
    inputs: Sequence[ir.Value | None],
    *,
    like: ir.Node,
    name: str,
    domain: str = "",
    attributes: Mapping[str, int | float | str | Sequence[int]] | None = None,
    dtype: ir.DataType | None = None,
    shape: ir.Shape | None = None,
    outputs: int = 1,
) -> ir.Node:
    """A node that is in no graph yet. Its first output is called ``name``; it takes the module path of ``like``."""
    values = [ir.Value(name=name if i == 0 else f"{name}.{i}") for i in range(outputs)]
    if dtype is not None:
        values[0].dtype = dtype
    values[0].shape = shape
    converted = ir.convenience.convert_attributes(attributes or {})
    node = ir.Node(domain, op_type, inputs, converted, outputs=values, name=f"{name}.{op_type}")
    copy_path(like, node)
    return node


def copy_path(old: ir.Node, new: ir.Node) -> None:
    """Let a node that replaces another keep its module path, and what is known of its columns."""
    for key in (NAME_SCOPES, ORIGINS):
        if key in old.metadata_props:
            new.metadata_props[key] = old.metadata_props[key]


def replace(old: ir.Node, new_nodes: Sequence[ir.Node], new_value: ir.Value, at: ir.Node | None = None) -> None:
    """Put new nodes in the place of ``old``, or behind ``at``; ``new_value`` takes over its first output.

    Nodes that only served ``old`` are removed too.
    """
    graph = old.graph
    if graph is None:
        raise ValueError(f"node {old.name} is in no graph")
    upstream = [value for value in old.inputs if value is not None]
    ir.convenience.replace_nodes_and_values(graph, at or old, [old], new_nodes, [old.outputs[0]], [new_value])
    remove_dead(upstream)


def bypass(node: ir.Node, source: ir.Value) -> bool:
    """Let every reader of a one-output node read ``source`` instead and remove the node.

    Returns:
        False, with nothing changed, if the node makes an output of its graph: those keep their names and their makers.
    """
    output = node.outputs[0]
    if node.graph is None or any(value.is_graph_output() for value in node.outputs):
        return False
    output.replace_all_uses_with(source)
    upstream = [value for value in node.inputs if value is not None]
    node.graph.remove(node, safe=True)
    remove_dead(upstream)
    return True


def remove_dead(values: Iterable[ir.Value]) -> None:
    """Remove the makers of those of the values that nobody reads, and so on upstream; initializers too."""
    pending = list(values)
    while pending:
        value = pending.pop()
        if value.uses() or value.is_graph_output() or value.is_graph_input():
            continue
        node = value.producer()
        if node is None:
            if value.is_initializer() and value.graph is not None:
                value.graph.initializers.pop(str(value.name), None)
        elif node.graph is not None and not any(out.uses() or out.is_graph_output() for out in node.outputs):
            pending.extend(item for item in node.inputs if item is not None)
            node.graph.remove(node, safe=True)


def _taken(graph: ir.Graph, name: str) -> bool:
    """Whether an input of the graph or the output of a node has that name already."""
    if any(value.name == name for value in graph.inputs):
        return True
    return any(value.name == name for node in graph for value in node.outputs)


def _holds(tensor: ir.TensorProtocol, array: NDArray[np.generic], dtype: ir.DataType) -> bool:
    same_form = tensor.dtype == dtype and tuple(tensor.shape.numpy()) == array.shape
    return same_form and tensor.numpy().tobytes() == array.tobytes()
