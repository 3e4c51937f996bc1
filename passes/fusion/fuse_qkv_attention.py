"""fuse-qkv-attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from passes.affine import Affine, affine_of, matrix_of, read_only_by
from passes.base import Context, Effect, Outcome, Purpose, Refusal
from passes.sites import constant_of, integer_attribute, linear_sites
from passes.splice import Names, add_constant, label
from passes.surgery import MICROSOFT, build, integers, is_operator, only_user, producer, replace

_BIAS, _PADDING, _ADDED, _FIRST_UNKNOWN = range(3, 7)
"""Indices of the inputs of MultiHeadAttention behind query, key and value."""
_KEPT = ("num_heads", "scale", "mask_filter_value", "unidirectional")
"""Attributes that mean the same to both operators."""


@dataclass(frozen=True, eq=False)
class _Projection:
    """``[q k v] = source @ W + b``, with ``W [K, 3N]`` and ``b [3N]``."""

    source: ir.Value
    parts: tuple[Affine, ...]

    @property
    def weight(self) -> NDArray[np.generic]:
        return np.ascontiguousarray(np.concatenate([matrix_of(part.site) for part in self.parts], axis=1))

    @property
    def bias(self) -> NDArray[np.generic]:
        """Zeros where there is none: ONNX Runtime 1.31 crashes on an Attention without."""
        kind = self.weight.dtype
        pairs = [(constant_of(part.bias), part.site.shape[1]) for part in self.parts]
        return np.concatenate([np.zeros(n, kind) if held is None else held.numpy() for held, n in pairs])


@dataclass(frozen=True)
class FuseQkvAttention:
    """Turn com.microsoft MultiHeadAttention into Attention, which multiplies by the weights of q, k and v itself.

    ``MultiHeadAttention(x Wq + bq, x Wk + bk, x Wv + bv, mask)`` -> ``Attention(x, [Wq Wk Wv], [bq bk bv], mask)``; the
    one product and the Split that pack-products leaves are taken too. Masks, biases of scores, scale and causality mean
    the same to both operators. The products are no linear sites any more: what quantizes them runs before.

    Refused: query, key and value that are not products of one ``[B, S, K]``, or that others read too; weights of
    different types or that others read too; a v that is wider than q or narrower; biases that MultiHeadAttention adds;
    past keys; a mask whose rank is neither 2 nor 3.
    """

    name: ClassVar[str] = "fuse-qkv-attention"
    effect: ClassVar[Effect] = Effect.EXACT
    purpose: ClassVar[Purpose] = Purpose.SPEED

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Fuse; counts the attentions."""
        changed = 0
        refused: list[Refusal] = []
        affines = {affine.output: affine for site in linear_sites(model) if (affine := affine_of(site)) is not None}
        names = Names(model.graph)
        for node in [node for node in model.graph if is_operator(node, "MultiHeadAttention", domain=MICROSOFT)]:
            projection = _projection(node, affines)
            reason = _reason_against(node, projection)
            if reason or projection is None:
                refused.append(Refusal(label(node), reason))
            else:
                _fuse(model.graph, names, node, projection)
                changed += 1
        return Outcome(changed, tuple(refused))


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _projection(node: ir.Node, affines: Mapping[ir.Value, Affine]) -> _Projection | None:
    """What makes query, key and value of one value, for this node alone; None if that is not so."""
    values = [value for value in node.inputs[:3] if value is not None]
    if len(values) < 3 or any(only_user(value) is not node for value in values):
        return None
    split = producer(values[0], "Split")
    if split is not None:
        packed = split.inputs[0]
        whole = affines.get(packed) if packed is not None and only_user(packed) is split else None
        return None if whole is None or not _in_thirds(split, values) else _Projection(whole.site.input, (whole,))
    parts = [affines[value] for value in values if value in affines]
    if len(parts) < 3 or len({id(part.site.input) for part in parts}) > 1:
        return None
    return _Projection(parts[0].site.input, tuple(parts))


def _in_thirds(split: ir.Node, values: list[ir.Value]) -> bool:
    """Whether a Split of the last of three axes makes exactly these, and all equally wide."""
    sizes = integers(split.inputs[1]) if len(split.inputs) > 1 else None
    equal = len(set(sizes)) == 1 if sizes else len(split.inputs) == 1
    return equal and list(split.outputs) == values and integer_attribute(split, "axis", 0) in (-1, 2)


def _reason_against(node: ir.Node, projection: _Projection | None) -> str:
    if projection is None:
        return "its query, key and value are not three products of one value, for it alone"
    sites = [part.site for part in projection.parts]
    past = any(value is not None for value in node.inputs[_FIRST_UNKNOWN:]) or len(node.outputs) > 1
    alone = all(read_only_by(site.weight, [(site.node, 1)]) for site in sites)
    kinds = {tensor.dtype for site in sites if (tensor := constant_of(site.weight)) is not None}
    mask = _input(node, _PADDING)
    rank = None if mask is None or mask.shape is None else len(mask.shape)
    rank3 = projection.source.shape is not None and len(projection.source.shape) == 3
    reasons = (
        (not rank3, "what it projects is not known to be [B, S, K]"),
        (past, "it keeps past keys and values"),
        (_input(node, _BIAS) is not None, "it adds biases of the projections itself"),
        (not alone, "a weight is used elsewhere too"),
        (len(kinds) > 1, "the weights are not of one type"),
        (len({site.shape[1] for site in sites}) > 1, "query, key and value are not equally wide"),
        (mask is not None and rank not in (2, 3), f"its key_padding_mask has rank {rank}, not 2 or 3"),
    )
    return next((reason for applies, reason in reasons if applies), "")


def _fuse(graph: ir.Graph, names: Names, node: ir.Node, projection: _Projection) -> None:
    base, source = str(projection.parts[0].site.weight.name), projection.source
    weight = add_constant(graph, names.fresh(f"{base}.qkv"), projection.weight)
    bias = add_constant(graph, names.fresh(f"{base}.qkv.bias"), projection.bias)
    inputs: list[ir.Value | None] = [source, weight, bias, _input(node, _PADDING), None, _input(node, _ADDED)]
    while inputs[-1] is None:
        inputs.pop()
    output = node.outputs[0]
    fused = build(
        "Attention", inputs, like=node, name=str(output.name), domain=MICROSOFT, dtype=output.dtype, shape=output.shape
    )
    for name in _KEPT:
        if name in node.attributes:
            fused.attributes.add(node.attributes[name])
    replace(node, [fused], fused.outputs[0])
