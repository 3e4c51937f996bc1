"""Which nodes of a graph stay float32 when the rest becomes float16, and why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from passes.sites import constant_of
from passes.surgery import is_operator

from .rounding import overflows, underflows
from .types import Signatures

SENSITIVE = frozenset(
    {"CumSum", "Cos", "Exp", "Log", "LpNormalization", "Pow", "Reciprocal", "Sin", "Sqrt", "Tan"}
    | {"ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMean", "ReduceProd", "ReduceSum"}
    | {"ReduceSumSquare"}
)
"""Sums, squares and steep functions: their range or their rounding goes beyond float16. LayerNormalization, Softmax
and the attention operators are not among them: their kernels take float16 and accumulate in float32."""

LIMITS = frozenset({"Clip", "Max", "Min"})
"""Operators in which a constant beyond the range of float16 means no limit."""

ELEMENTWISE = frozenset(
    {"Abs", "Add", "Clip", "Concat", "Div", "Equal", "Expand", "Flatten", "Greater", "GreaterOrEqual", "Identity"}
    | {"Less", "LessOrEqual", "Max", "Min", "Mul", "Neg", "Reshape", "Slice", "Squeeze", "Sub", "Tile", "Transpose"}
    | {"Unsqueeze", "Where"}
)
"""Cheap operators that stay float32 when all that they read does: a cast there and back would cost more."""

_POSITIONAL = ELEMENTWISE | SENSITIVE | {"Cast", "ConstantOfShape", "Einsum", "MatMul", "Mod", "Range"}

_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)

AGNOSTIC = frozenset({"Shape", "Size"})
"""Operators that never look at the numbers."""


@dataclass(frozen=True)
class Policy:
    """The division of a graph.

    Attributes:
        half: Nodes to compute in float16.
        reasons: Nodes that stay float32 for a reason of their own, with that reason. The others that stay float32 do so
            because everything they read is float32, or because a cast would be needed on either side.
    """

    half: frozenset[ir.Node]
    reasons: dict[ir.Node, str] = field(default_factory=dict)


def divide(graph: ir.Graph, signatures: Signatures) -> Policy:
    """Decide for every node of the main graph that touches float32. Nodes inside of If, Loop and Scan stay float32.

    Deterministic, and stable: dividing the converted graph again finds nothing left to convert.
    """
    reasons: dict[ir.Node, str] = {}
    for node in graph:
        reason = _reason(node, signatures) if _touches_float(node) else ""
        if reason:
            reasons[node] = reason
    kept = set(reasons) | {node for node in graph if _fixed(node)}
    kept |= _positional_sources(graph)
    _grow(graph, kept)
    return Policy(frozenset(node for node in graph if node not in kept and _touches_float(node)), reasons)


def _reason(node: ir.Node, signatures: Signatures) -> str:
    """Why a node must stay float32; empty if nothing speaks against float16."""
    if node.op_type in ("Cast", "Constant", *AGNOSTIC):
        return ""
    values = [value for value in (*node.inputs, *node.outputs) if value is not None]
    reason = ""
    if not signatures.known(node):
        reason = f"hasten does not know the types of {node.domain}.{node.op_type}"
    elif any(attribute.type in _GRAPHS for attribute in node.attributes.values()):
        reason = "it has a graph of its own"
    elif any(value.dtype is None and (value.uses() or value.is_graph_output()) for value in values):
        reason = "the element type of one of its values is unknown"
    elif not _has_half_form(node, signatures):
        reason = f"{node.op_type} has no float16 form"
    elif node.op_type in SENSITIVE:
        reason = f"{node.op_type} needs the range or the precision of float32"
    return reason or _constant_reason(node)


def _has_half_form(node: ir.Node, signatures: Signatures) -> bool:
    first = next((i for i, value in enumerate(node.inputs) if _is_float(value)), None)
    if first is not None:
        return signatures.input_may_be_half(node, first)
    # Without a float input the type of the output is an attribute; only ConstantOfShape's is one that we rewrite.
    return node.op_type == "ConstantOfShape"


def _constant_reason(node: ir.Node) -> str:
    tensors = [constant_of(value) for value in node.inputs if _is_float(value)]
    if node.op_type == "ConstantOfShape" and "value" in node.attributes:
        tensors.append(node.attributes["value"].as_tensor())
    for tensor in tensors:
        if tensor is None:
            continue
        array = tensor.numpy()
        number = f" {float(array.reshape(-1)[0]):g}" if tensor.size == 1 else ""
        if underflows(array):
            return f"its constant{number} is too small for float16"
        if node.op_type not in LIMITS and overflows(array):
            return f"its constant{number} is too large for float16"
    return ""


def _fixed(node: ir.Node) -> bool:
    """Whether no float16 form is ever wanted.

    Casts between floats are somebody's intention (ours on a rerun), and casts to integers want all digits.
    """
    if node.op_type in ("Constant", *AGNOSTIC):
        return True
    if not is_operator(node, "Cast"):
        return False
    source = node.inputs[0]
    if source is None or source.dtype is None or not _is_float(node.outputs[0]):
        return True
    # The sums of integer products go far beyond float16 before they are scaled.
    integer_product = is_operator(source.producer(), "MatMulInteger", "ConvInteger")
    return source.dtype.is_floating_point() or integer_product


def _positional_sources(graph: ir.Graph) -> set[ir.Node]:
    """What computes the angles of Sin and Cos out of integer positions: float16 would round positions beyond 2048."""
    positional: set[ir.Value] = set()
    for node in graph:
        variable = [value for value in node.inputs if _is_float(value) and constant_of(value) is None]
        if node.op_type in _POSITIONAL and all(value in positional for value in variable):
            positional.update(node.outputs)
    sources: set[ir.Node] = set()
    pending = [node for node in graph if is_operator(node, "Sin", "Cos")]
    while pending:
        for value in pending.pop().inputs:
            maker = value.producer() if value is not None and value in positional else None
            if maker is not None and maker not in sources and _touches_float(maker):
                sources.add(maker)
                pending.append(maker)
    return sources


def _grow(graph: ir.Graph, kept: set[ir.Node]) -> None:
    for node in graph:
        variable = list(_variable_floats(node))
        if node.op_type in ELEMENTWISE and variable and all(value.producer() in kept for value in variable):
            kept.add(node)
    for node in graph:
        if is_operator(node, "Cast") and any(reader in kept for reader in node.outputs[0].consumers()):
            kept.add(node)


def _variable_floats(node: ir.Node) -> Iterator[ir.Value]:
    return (value for value in node.inputs if value is not None and _is_float(value) and constant_of(value) is None)


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.FLOAT


def _touches_float(node: ir.Node) -> bool:
    return any(_is_float(value) for value in (*node.inputs, *node.outputs))
