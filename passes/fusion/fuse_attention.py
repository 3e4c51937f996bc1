"""fuse-attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from passes.base import Context, Effect, Outcome, Purpose, Refusal
from passes.shapes import dims_of, permuted_from, reshaped, same_dims
from passes.sites import integer_attribute
from passes.surgery import (
    MICROSOFT,
    build,
    initializer,
    is_operator,
    needed,
    only_user,
    producer,
    replace,
    require_microsoft,
    scalar,
)

from .masks import lowest_bias

_SPLIT = (0, 2, 1, 3)
"""[B, S, H, D] <-> [B, H, S, D]."""
_SWAPPED = (0, 1, 3, 2)
_SPLIT_SWAPPED = (0, 2, 3, 1)
"""[B, S, H, D] -> [B, H, D, S]."""


@dataclass(frozen=True)
class _Match:
    """One attention of ``[B, S, H*D]`` tensors; the mask is ``[B or 1, H or 1, S or 1, T]``, ``last`` the end."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    mask: ir.Value | None
    guarded: bool
    scale: float
    heads: int
    softmax: ir.Node
    last: ir.Node


class _MismatchError(Exception):
    """Raised inside the matcher with the reason why a Softmax is no attention that we can fuse."""


@dataclass(frozen=True)
class FuseAttention:
    """Turn ``softmax(scale q k^T + mask) v`` between [B, S, H*D] tensors into com.microsoft MultiHeadAttention.

    The scale may stand on the query, the key, the scores or several of them, as Mul or Div; the key may be transposed
    in one step, in two or through three dimensions; a Where that turns NaN weights into 0 (the exporters' guard against
    fully masked rows) goes away: the mask is bounded from below instead, so that such rows, whose outputs mean nothing,
    stay finite. All is proven from shapes. Refused: a Softmax between two MatMul that is not of this form.
    """

    name: ClassVar[str] = "fuse-attention"
    effect: ClassVar[Effect] = Effect.EXACT
    purpose: ClassVar[Purpose] = Purpose.SPEED

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Fuse; counts the attentions."""
        changed = 0
        refused: list[Refusal] = []
        masks: dict[tuple[int, bool, int | str], ir.Value] = {}
        for node in [node for node in model.graph if is_operator(node, "Softmax")]:
            product = _weighted_sum(node)
            if product is None:
                continue
            try:
                match = _match(node, product)
            except _MismatchError as reason:
                refused.append(Refusal(str(node.name), str(reason)))
                continue
            if MICROSOFT not in context.target.domains:
                refused.append(Refusal(str(node.name), f"target {context.target.name} has no com.microsoft operators"))
                continue
            _fuse(model.graph, match, masks)
            changed += 1
        if changed:
            require_microsoft(model)
        return Outcome(changed, tuple(refused))


def _weighted_sum(softmax: ir.Node) -> ir.Node | None:
    """The MatMul that weighs the values with what the Softmax makes of a MatMul's scores; None if this is none."""
    node, weights = softmax, softmax.outputs[0]
    guard = _guard(weights)
    if guard is not None:
        weights = guard.outputs[0]
    product = only_user(weights)
    scores = _peel(softmax.inputs[0], "Add", "Mul", "Div", "Where")
    if product is None or not is_operator(product, "MatMul") or product.inputs[0] is not weights:
        return None
    return product if scores is not None and node.graph is product.graph else None


def _guard(weights: ir.Value) -> ir.Node | None:
    """The Where of ``Where(IsNaN(w), 0, w)``, if nothing else reads the weights."""
    users = weights.consumers()
    checks = [user for user in users if is_operator(user, "IsNaN")]
    if len(users) != 2 or len(checks) != 1:
        return None
    where = only_user(checks[0].outputs[0])
    if where is None or not is_operator(where, "Where") or where.inputs[2] is not weights:
        return None
    return where if scalar(where.inputs[1]) == 0.0 else None


def _peel(value: ir.Value | None, *types: str, depth: int = 4) -> ir.Node | None:
    """The MatMul found upstream through the given operators, whichever operand it is on."""
    product = producer(value, "MatMul")
    node = producer(value, *types)
    if product is not None or node is None or depth == 0:
        return product
    found = (_peel(item, *types, depth=depth - 1) for item in node.inputs)
    return next((item for item in found if item is not None), None)


def _match(softmax: ir.Node, product: ir.Node) -> _Match:
    rank = len(dims_of(softmax.inputs[0]) or (0, 0, 0, 0))
    if rank != 4 or integer_attribute(softmax, "axis", -1) not in (-1, 3):
        raise _MismatchError("the softmax is not over the last of four axes")
    value, heads = _split_heads(product.inputs[1], "value")
    back = only_user(product.outputs[0])
    if back is None or permuted_from(back.outputs[0], _SPLIT) is None:
        raise _MismatchError("its result is not transposed back to [B, S, H, D]")
    last = only_user(back.outputs[0])
    if last is None or not is_operator(last, "Reshape") or not same_dims((reshaped(last) or ())[:-1], _outer(last)):
        raise _MismatchError("its result is not reshaped to [B, S, H*D]")
    scores, mask = _unmask(needed(softmax.inputs[0]))
    scores, scale = _unscale(scores)
    multiply = producer(scores, "MatMul")
    if multiply is None:
        raise _MismatchError("its scores are not a product of query and key")
    queries, query_scale = _unscale(needed(multiply.inputs[0]))
    keys, key_scale = _unscale(needed(multiply.inputs[1]))
    query, query_heads = _split_heads(queries, "query")
    swapped = _swapped(keys)
    key, key_heads = _split_heads(keys if swapped is None else swapped, "key", _SPLIT if swapped else _SPLIT_SWAPPED)
    if not heads == query_heads == key_heads:
        raise _MismatchError(f"query, key and value have {query_heads}, {key_heads} and {heads} heads")
    _check_mask(mask, query)
    guarded = producer(product.inputs[0], "Where") is not None
    return _Match(query, key, value, mask, guarded, scale * query_scale * key_scale, heads, softmax, last)


def _outer(last: ir.Node) -> tuple[int | str, ...]:
    """The first two of the four dimensions that the last Reshape reads."""
    return (dims_of(last.inputs[0]) or ())[:2]


def _unmask(scores: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """``(scores, mask)`` of ``scores + mask``."""
    node = producer(scores, "Add")
    if node is None:
        return scores, None
    left, right = needed(node.inputs[0]), needed(node.inputs[1])
    if only_user(left) is not None and _peel(left, "Mul", "Div") is not None:
        return left, right
    return right, left


def _unscale(value: ir.Value) -> tuple[ir.Value, float]:
    """``(x, factor)`` of ``x * factor`` or ``x / divisor``."""
    node = producer(value, "Mul", "Div")
    if node is None:
        return value, 1.0
    left, right = needed(node.inputs[0]), needed(node.inputs[1])
    number = scalar(right)
    if number is not None:
        if node.op_type == "Div" and number == 0.0:
            raise _MismatchError("it divides by zero")
        return left, 1.0 / number if node.op_type == "Div" else number
    number = scalar(left) if node.op_type == "Mul" else None
    return (value, 1.0) if number is None else (right, number)


def _swapped(value: ir.Value) -> ir.Value | None:
    """``[B, H, S, D]`` of a key ``[B, H, D, S]`` whose last axes are swapped in a step of their own; None if not."""
    plain = permuted_from(value, _SWAPPED)
    if plain is not None:
        return plain
    outer = producer(value, "Reshape")
    flat = permuted_from(outer.inputs[0], (0, 2, 1)) if outer is not None else None
    inner = producer(flat, "Reshape")
    if outer is None or inner is None:
        return None
    source, three, four = dims_of(inner.inputs[0]), reshaped(inner), reshaped(outer)
    if source is None or three is None or four is None or len(source) != 4 or len(three) != 3:
        return None
    batch, heads, length, width = source
    proven = three[1:] == (length, width) and four == (batch, heads, width, length)
    return inner.inputs[0] if proven else None


def _split_heads(value: ir.Value | None, what: str, order: tuple[int, ...] = _SPLIT) -> tuple[ir.Value, int]:
    """``(x [B, S, H*D], H)`` of a value made from it by Reshape to ``[B, S, H, D]`` and a Transpose of that order."""
    reshape = producer(permuted_from(value, order), "Reshape")
    if reshape is None:
        raise _MismatchError(f"its {what} is not split into heads by Reshape and Transpose")
    source, dims = dims_of(reshape.inputs[0]), reshaped(reshape)
    if source is None or dims is None or len(source) != 3 or len(dims) != 4 or source[:2] != dims[:2]:
        raise _MismatchError(f"its {what} is not provably split from [B, S, H*D]: {source} to {dims}")
    if not isinstance(dims[2], int):
        raise _MismatchError(f"the number of heads of its {what} is unknown")
    return needed(reshape.inputs[0]), dims[2]


def _check_mask(mask: ir.Value | None, query: ir.Value) -> None:
    if mask is None:
        return
    dims, length = dims_of(mask) or (), (dims_of(query) or ())[1]
    if len(dims) != 4 or dims[2] not in (1, length) or dims[3] == 1:
        raise _MismatchError(f"its mask is not provably [B or 1, H or 1, S or 1, T]: {dims}")


def _fuse(graph: ir.Graph, match: _Match, masks: dict[tuple[int, bool, int | str], ir.Value]) -> None:
    last, name = match.last, str(match.last.outputs[0].name)
    bias = None if match.mask is None else _prepared_mask(graph, match, masks)
    inputs: list[ir.Value | None] = [match.query, match.key, match.value]
    if bias is not None:
        inputs += [None, None, bias]
    attributes = {"num_heads": match.heads, "scale": match.scale}
    fused = build("MultiHeadAttention", inputs, like=last, name=name, domain=MICROSOFT, attributes=attributes)
    replace(last, [fused], fused.outputs[0])


def _prepared_mask(graph: ir.Graph, match: _Match, masks: dict[tuple[int, bool, int | str], ir.Value]) -> ir.Value:
    """The mask as MultiHeadAttention wants it: with the query's rows, and finite; made once for all that share it."""
    mask = needed(match.mask)
    rows, length = (dims_of(mask) or ())[2], (dims_of(match.query) or ())[1]
    key = (id(mask), match.guarded, length)
    if key in masks:
        return masks[key]
    name, dtype = str(mask.name), mask.dtype or ir.DataType.FLOAT
    nodes: list[ir.Node] = []
    result = mask
    if match.guarded:
        lowest = initializer(graph, f"attention.lowest.{dtype.name.lower()}", lowest_bias(dtype), dtype)
        finite = build("Max", [mask, lowest], like=match.last, name=f"{name}.finite", dtype=dtype, shape=mask.shape)
        nodes.append(finite)
        result = nodes[-1].outputs[0]
    if rows != length:
        result = _expanded(graph, match, result, nodes)
    graph.insert_before(match.softmax, nodes)
    masks[key] = result
    return result


def _expanded(graph: ir.Graph, match: _Match, mask: ir.Value, nodes: list[ir.Node]) -> ir.Value:
    """The mask with its rows broadcast to the query's length."""
    name, like = str(needed(match.mask).name), match.last
    one = initializer(graph, "attention.one", [1], ir.DataType.INT64)
    attributes = {"start": 1, "end": 2}
    kind = ir.DataType.INT64
    rows = build(
        "Shape", [match.query], like=like, name=f"{name}.rows", attributes=attributes, dtype=kind, shape=ir.Shape([1])
    )
    shape = build(
        "Concat",
        [one, one, rows.outputs[0], one],
        like=like,
        name=f"{name}.shape",
        attributes={"axis": 0},
        dtype=kind,
        shape=ir.Shape([4]),
    )
    dims = None
    if mask.shape is not None and match.query.shape is not None:
        dims = mask.shape.copy()
        dims[2] = match.query.shape[1]
    expanded = f"{name}.expanded"
    wide = build("Expand", [mask, shape.outputs[0]], like=like, name=expanded, dtype=mask.dtype, shape=dims)
    nodes.extend([rows, shape, wide])
    return wide.outputs[0]
