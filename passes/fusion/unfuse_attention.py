"""unfuse-attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from passes.base import Context, Effect, Outcome, Purpose, Refusal
from passes.shapes import last_dim
from passes.sites import float_attribute, integer_attribute
from passes.surgery import MICROSOFT, build, initializer, is_operator, needed, replace

from .masks import lowest_bias

_QUERY, _KEY, _VALUE, _BIAS, _PADDING, _ADDED, _FIRST_UNKNOWN = range(7)
"""Indices of the inputs of MultiHeadAttention; from the last one on we support none."""
_MASKED = -10000.0
"""What ONNX Runtime adds to the scores of masked keys unless ``mask_filter_value`` says otherwise."""

_MaskKey = tuple[int, int, ir.DataType, float]


@dataclass(frozen=True)
class UnfuseAttention:
    """Turn com.microsoft MultiHeadAttention into standard operators, where they are faster or the only ones there are.

    Query, key and value are ``[B, S, H*D]``. The scale goes into the query. A ``key_padding_mask`` (``[B, T]`` or
    ``[B, S, T]``, positive = attend) and an ``attention_bias`` become one additive bias, computed once for all nodes
    that share them and bounded from below, so that the softmax of a fully masked row stays finite. Refused: biases of
    the projections, packed or 4-D key and value, past and present, causal attention, a mask of another or of unknown
    rank, a query of unknown type or width.
    """

    name: ClassVar[str] = "unfuse-attention"
    effect: ClassVar[Effect] = Effect.EXACT
    purpose: ClassVar[Purpose] = Purpose.SPEED

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Unfuse; counts the attentions."""
        changed = 0
        refused: list[Refusal] = []
        masks: dict[_MaskKey, ir.Value] = {}
        for node in [node for node in model.graph if is_operator(node, "MultiHeadAttention", domain=MICROSOFT)]:
            reason = _reason_against(node)
            if reason:
                refused.append(Refusal(str(node.name), reason, "Choose a target that has com.microsoft operators"))
            else:
                _unfuse(model.graph, node, _mask(model.graph, node, masks))
                changed += 1
        return Outcome(changed, tuple(refused))


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def _reason_against(node: ir.Node) -> str:
    query, padding, added = (_input(node, index) for index in (_QUERY, _PADDING, _ADDED))
    past = any(value is not None for value in node.inputs[_FIRST_UNKNOWN:]) or len(node.outputs) > 1
    wide = any(_rank(_input(node, index)) != 3 for index in (_QUERY, _KEY, _VALUE))
    unknown = query is None or query.dtype is None or last_dim(query) is None
    reasons = (
        (_input(node, _BIAS) is not None, "its projections have biases inside"),
        (past, "it keeps past keys and values"),
        (wide, "query, key and value are not all of rank 3"),
        (unknown, "type or width of the query are unknown"),
        (integer_attribute(node, "unidirectional", 0) != 0, "it is causal"),
        (padding is not None and _rank(padding) not in (2, 3), "its key_padding_mask is neither [B, T] nor [B, S, T]"),
        (added is not None and _rank(added) != 4, "its attention_bias is not of rank 4"),
    )
    return next((reason for applies, reason in reasons if applies), "")


def _mask(graph: ir.Graph, node: ir.Node, masks: dict[_MaskKey, ir.Value]) -> ir.Value | None:
    """The additive bias ``[B, 1 or H, 1 or S, T]`` of an attention; None if it has none."""
    padding, added = _input(node, _PADDING), _input(node, _ADDED)
    dtype = needed(node.inputs[_QUERY]).dtype or ir.DataType.FLOAT
    filtered = float_attribute(node, "mask_filter_value", _MASKED)
    key = (id(padding), id(added), dtype, filtered)
    if (padding is None and added is None) or key in masks:
        return masks.get(key)
    name = str(node.outputs[0].name)
    nodes: list[ir.Node] = []
    bias = added
    if padding is not None:
        nodes = _padding_bias(graph, node, padding, dtype, filtered)
        bias = nodes[-1].outputs[0]
        if added is not None:
            nodes.append(build("Add", [bias, added], like=node, name=f"{name}.mask", dtype=dtype))
            bias = nodes[-1].outputs[0]
    if added is not None:
        lowest = initializer(graph, f"attention.lowest.{dtype.name.lower()}", lowest_bias(dtype), dtype)
        nodes.append(build("Max", [bias, lowest], like=node, name=f"{name}.finite_mask", dtype=dtype))
        bias = nodes[-1].outputs[0]
    graph.insert_before(node, nodes)
    masks[key] = needed(bias)
    return masks[key]


def _padding_bias(
    graph: ir.Graph, node: ir.Node, padding: ir.Value, dtype: ir.DataType, filtered: float
) -> list[ir.Node]:
    """Nodes whose last makes 0 where the mask is positive, else ``filtered``, as ``[B, 1, 1 or S, T]``."""
    name = str(node.outputs[0].name)
    kind = padding.dtype or ir.DataType.INT32
    axes = [1, 2] if _rank(padding) == 2 else [1]
    suffix = dtype.name.lower()
    zero = initializer(graph, f"attention.zero.{kind.name.lower()}", 0, kind)
    attend = build("Greater", [padding, zero], like=node, name=f"{name}.attend", dtype=ir.DataType.BOOL)
    places = initializer(graph, f"attention.axes.{len(axes)}", axes, ir.DataType.INT64)
    wide = build("Unsqueeze", [attend.outputs[0], places], like=node, name=f"{name}.attend4", dtype=ir.DataType.BOOL)
    on = initializer(graph, f"attention.attended.{suffix}", 0.0, dtype)
    off = initializer(graph, f"attention.masked.{suffix}", max(filtered, lowest_bias(dtype)), dtype)
    where = build("Where", [wide.outputs[0], on, off], like=node, name=f"{name}.padding", dtype=dtype)
    return [attend, wide, where]


def _unfuse(graph: ir.Graph, node: ir.Node, mask: ir.Value | None) -> None:
    name = str(node.outputs[0].name)
    query, key, value = (needed(item) for item in node.inputs[:3])
    dtype = query.dtype or ir.DataType.FLOAT
    heads = node.attributes["num_heads"].as_int()
    width = (last_dim(query) or heads) // heads
    nodes: list[ir.Node] = []

    def add(op_type: str, inputs: list[ir.Value], suffix: str, **attributes: int | list[int]) -> ir.Value:
        nodes.append(build(op_type, inputs, like=node, name=f"{name}.{suffix}", attributes=attributes, dtype=dtype))
        return nodes[-1].outputs[0]

    scale = float_attribute(node, "scale", 0.0) or 1.0 / math.sqrt(width)
    factor = initializer(graph, f"attention.scale.{scale:.8g}.{dtype.name.lower()}", scale, dtype)
    split = initializer(graph, f"attention.split.{heads}", [0, 0, heads, -1], ir.DataType.INT64)
    join = initializer(graph, "attention.join", [0, 0, -1], ir.DataType.INT64)
    scaled = add("Mul", [query, factor], "scaled")
    queries = add("Transpose", [add("Reshape", [scaled, split], "q4")], "q", perm=[0, 2, 1, 3])
    keys = add("Transpose", [add("Reshape", [key, split], "k4")], "k", perm=[0, 2, 3, 1])
    values = add("Transpose", [add("Reshape", [value, split], "v4")], "v", perm=[0, 2, 1, 3])
    scores = add("MatMul", [queries, keys], "scores")
    if mask is not None:
        scores = add("Add", [scores, mask], "masked")
    weights = add("Softmax", [scores], "weights", axis=-1)
    mixed = add("Transpose", [add("MatMul", [weights, values], "heads")], "mixed", perm=[0, 2, 1, 3])
    result = add("Reshape", [mixed, join], "joined")
    replace(node, nodes, result)
