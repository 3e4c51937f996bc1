"""Values whose channels can be scaled where they are made: what `Smooth` moves its factors into."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from passes.affine import (
    Affine,
    Floats,
    Use,
    constant_floats,
    is_float32,
    matrix_of,
    put_behind,
    put_matrix,
    read_only_by,
    revise,
)
from passes.shapes import dims_of, permuted_from, reshaped
from passes.sites import LinearSite, integer_attribute
from passes.splice import Names, add_constant
from passes.surgery import MICROSOFT, build, is_operator, needed, only_user, producer

_NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
_HEADS_APART = (0, 2, 1, 3)
"""[B, S, H, D] <-> [B, H, S, D]."""


@dataclass(frozen=True, eq=False)
class Source:
    """A value ``[..., K]`` each channel of which is proportional to constants: dividing all of these divides it.

    Attributes:
        value: The value.
        vectors: Inputs of nodes that hold constants ``[K]``.
        columns: The linear site of K columns that it is made from; None where there is none.
        restorable: Whether readers that are no linear sites may get a multiplication that takes the division back.
    """

    value: ir.Value
    vectors: tuple[Use, ...]
    columns: LinearSite | None = None
    restorable: bool = False


def source_of(value: ir.Value, width: int, affines: Mapping[ir.Value, Affine]) -> Source | str | None:
    """How the channels of a value can be scaled; the reason where its constants do not allow it; None if not at all.

    Found are normalizations, ``x * gamma (+ beta)`` with constants ``[K]``, and the heads that an attention mixes from
    what a linear site makes, apart (Transpose and Reshape behind a MatMul) or inside com.microsoft MultiHeadAttention.

    Args:
        value: Float, ``[..., K]``.
        width: K.
        affines: The linear sites of the graph, by what they make.
    """
    node = value.producer()
    if node is not None and is_operator(node, *_NORMS) and value is node.outputs[0]:
        return _normalized(node, width)
    mixed = _mixed_from(value)
    if mixed is not None:
        return _projected(value, width, affines.get(mixed))
    return _scaled(value, width)


def divide(graph: ir.Graph, names: Names, source: Source, factors: Floats) -> None:
    """Divide the channels of the value by ``factors``, float32 [K], upstream. What reads it is not looked at."""
    for node, index in source.vectors:
        held = constant_floats(node.inputs[index], len(factors))
        if held is None:
            raise ValueError(f"input {index} of {node.name} is no constant vector any more")
        revise(graph, names, (node, index), held / factors)
    if source.columns is not None:
        put_matrix(source.columns, matrix_of(source.columns) / factors)


def restore(graph: ir.Graph, names: Names, value: ir.Value, factors: Floats, stay: Collection[Use]) -> None:
    """Let all readers but those in ``stay`` read the value times ``factors``, float32 [K].

    Where the reader multiplies by a constant vector that vector takes the factors, else a Mul does.
    """
    stay = list(stay)
    for use in value.uses():
        other: Use = (use.node, 1 - use.idx)
        if (use.node, use.idx) in stay or not is_operator(use.node, "Mul") or use.node.graph is not graph:
            continue
        held = constant_floats(use.node.inputs[other[1]], len(factors))
        if held is not None:
            revise(graph, names, other, held * factors)
            stay.append((use.node, use.idx))
    if read_only_by(value, stay):
        return
    node, name = value.producer(), str(value.name)
    if node is None:
        raise ValueError(f"{name} is made by no node")
    constant = add_constant(graph, names.fresh(f"{name}.factors"), factors)
    mul = build("Mul", [value, constant], like=node, name=names.fresh(f"{name}.restored"))
    put_behind(value, [mul], names.fresh(f"{name}.smooth"), stay)


def _normalized(node: ir.Node, width: int) -> Source | str:
    axis, rank = integer_attribute(node, "axis", -1), len(dims_of(node.inputs[0]) or ())
    uses = tuple((node, index) for index in (1, 2) if index < len(node.inputs) and node.inputs[index] is not None)
    if axis not in (-1, rank - 1) or not all(_is_finite(use, width) for use in uses):
        return f"its input is normalized, but not with finite constant vectors of {width} float32 over the last axis"
    return Source(node.outputs[0], uses, restorable=True)


def _scaled(value: ir.Value, width: int) -> Source | None:
    """``n * gamma`` or ``n * gamma + beta``."""
    shift = _vector_of(producer(value, "Add"), width)
    scaled = value if shift is None else needed(shift[0].inputs[1 - shift[1]])
    scale = _vector_of(producer(scaled, "Mul"), width)
    if scale is None:
        return None
    if shift is None:
        return Source(value, (scale,))
    return Source(value, (scale, shift)) if only_user(scaled) is shift[0] else None


def _projected(value: ir.Value, width: int, affine: Affine | None) -> Source | str | None:
    if affine is None or affine.site.shape[1] != width:
        return None
    site, bias = affine.site, affine.bias_use
    if not is_float32(site.weight) or not read_only_by(site.weight, [(site.node, 1)]):
        return f"the weight of {site.path}, which its input is mixed from, is read elsewhere too or not of float32"
    if bias is not None and not _is_finite(bias, width):
        return f"the bias of {site.path}, which its input is mixed from, is no finite vector of float32"
    return Source(value, () if bias is None else (bias,), columns=site)


def _mixed_from(value: ir.Value) -> ir.Value | None:
    """``v [B, T, H * D]`` where the value is the heads of an attention over v, side by side as in v."""
    node = value.producer()
    if node is not None and is_operator(node, "MultiHeadAttention", domain=MICROSOFT):
        return _attended(node)
    join = producer(value, "Reshape")
    apart = permuted_from(join.inputs[0], _HEADS_APART) if join is not None else None
    product = producer(apart, "MatMul")
    values = product.inputs[1] if product is not None else None
    split = producer(permuted_from(values, _HEADS_APART), "Reshape")
    if join is None or apart is None or values is None or split is None:
        return None
    source = needed(split.inputs[0])
    chain = (source, split.outputs[0], values, apart, needed(join.inputs[0]))
    if any(only_user(item) is None for item in chain):
        return None
    return source if _heads_stay(source, split, join) else None


def _heads_stay(source: ir.Value, split: ir.Node, join: ir.Node) -> bool:
    """Whether ``[B, T, H D]`` is split to ``[B, T, H, D]`` and ``[B, S, H, D]`` joined to ``[B, S, H D]``, provably."""
    whole, heads = dims_of(source), reshaped(split)
    parts, joined = dims_of(join.inputs[0]), reshaped(join)
    if whole is None or heads is None or parts is None or joined is None:
        return False
    ranks = (len(whole), len(heads), len(parts), len(joined))
    return ranks == (3, 4, 4, 3) and whole[:2] == heads[:2] and parts[:2] == joined[:2] and heads[2:] == parts[2:]


def _attended(node: ir.Node) -> ir.Value | None:
    """The value that a MultiHeadAttention mixes, if it does nothing else with it."""
    value = node.inputs[2] if len(node.inputs) > 2 else None
    biased = len(node.inputs) > 3 and node.inputs[3] is not None
    past = any(item is not None for item in node.inputs[6:]) or any(item.name for item in node.outputs[1:])
    if value is None or biased or past or only_user(value) is not node or len(dims_of(value) or ()) != 3:
        return None
    return value


def _is_finite(use: Use, width: int) -> bool:
    """Whether an input of a node is a finite constant vector of float32."""
    node, index = use
    held = constant_floats(node.inputs[index], width)
    return held is not None and bool(np.isfinite(held).all())


def _vector_of(node: ir.Node | None, width: int) -> Use | None:
    """The input of a node of two inputs that is a finite constant vector of float32."""
    uses = [] if node is None else [(node, index) for index in (0, 1) if _is_finite((node, index), width)]
    return uses[0] if uses else None
