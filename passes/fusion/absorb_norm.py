"""absorb-norm."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from passes.affine import (
    Affine,
    Floats,
    Use,
    affine_of,
    constant_floats,
    is_float32,
    keeps_precision,
    matrix_of,
    put_behind,
    put_matrix,
    read_only_by,
    refill,
)
from passes.base import Context, Effect, Outcome, Purpose, Refusal
from passes.shapes import dims_of
from passes.sites import LinearSite, integer_attribute, linear_sites
from passes.splice import Names, add_constant, label
from passes.surgery import build, initializer, is_operator, needed, remove_dead

NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
"""Operators that normalize and then multiply by their second input and add their third, if they have one."""


@dataclass(frozen=True)
class AbsorbNorm:
    """Move the scale and shift of a normalization into the linear sites that read it.

    ``LayerNormalization(x, gamma, beta)`` over the last axis becomes ``n = LayerNormalization(x, 1)``. A site that
    reads it gets ``W' = diag(gamma) W`` and ``bias' = bias + beta W`` (an Add where it had no bias). All other readers,
    those of a residual connection, read ``n * gamma + beta``, which is one operation with the sum behind it. Likewise
    RMSNormalization and SimplifiedLayerNormalization, which have no beta. A normalization that no site reads is left.
    Run it before ``smooth``, whose factors it would take back.

    Refused: normalizations whose moments are read, over other axes, or whose gamma and beta are no finite constant
    vectors of float32; sites, which then count among the other readers, whose weight or bias is read elsewhere too, is
    not of float32, or would leave its range.
    """

    name: ClassVar[str] = "absorb-norm"
    effect: ClassVar[Effect] = Effect.EXACT
    purpose: ClassVar[Purpose] = Purpose.SPEED

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Move them; counts the normalizations."""
        changed = 0
        refused: list[Refusal] = []
        readers: defaultdict[ir.Value, list[LinearSite]] = defaultdict(list)
        for site in linear_sites(model):
            readers[site.input].append(site)
        names = Names(model.graph)
        for node in [node for node in model.graph if is_operator(node, *NORMS)]:
            sites = readers.get(node.outputs[0])
            if not sites:
                continue
            norm = _norm(node, sites[0].shape[0])
            if isinstance(norm, str):
                refused.append(Refusal(label(node), norm))
                continue
            if not (norm.has_scale or norm.has_shift):
                continue
            absorbing, left = _absorptions(sites, norm)
            refused += left
            if absorbing:
                _absorb(model.graph, names, norm, absorbing)
                changed += 1
        return Outcome(changed, tuple(refused))


@dataclass(frozen=True, eq=False)
class _Norm:
    """A normalization that may be split; gamma and beta are ``[K]``, beta of zeros where it has none."""

    node: ir.Node
    gamma: Floats
    beta: Floats

    @property
    def has_scale(self) -> bool:
        return bool((self.gamma != 1).any())

    @property
    def has_shift(self) -> bool:
        return bool((self.beta != 0).any())


@dataclass(frozen=True, eq=False)
class _Absorption:
    """A site with what its weight ``[K, N]`` and bias ``[N]`` are to hold; no bias where nothing is added."""

    affine: Affine
    weight: Floats
    bias: Floats | None


def _norm(node: ir.Node, width: int) -> _Norm | str:
    """The normalization, or the reason why it cannot be split."""
    axis, rank = integer_attribute(node, "axis", -1), len(dims_of(node.inputs[0]) or ())
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        return "its mean or deviation is used"
    if axis not in (-1, rank - 1):
        return "it does not normalize the last axis alone"
    shift = node.inputs[2] if len(node.inputs) > 2 else None
    gamma = constant_floats(node.inputs[1], width)
    beta = np.zeros(width, np.float32) if shift is None else constant_floats(shift, width)
    if gamma is None or beta is None or not (np.isfinite(gamma).all() and np.isfinite(beta).all()):
        return f"its scale or shift is no finite constant vector of {width} float32"
    return _Norm(node, gamma, beta)


def _absorptions(sites: Sequence[LinearSite], norm: _Norm) -> tuple[list[_Absorption], list[Refusal]]:
    """What the sites become; those that cannot take the scale and shift, and those that share their weights, do not."""
    results = [(site, _absorption(site, sites, norm)) for site in sites]
    kept = {id(site.weight) for site, result in results if isinstance(result, str)}
    absorbing: list[_Absorption] = []
    refused: list[Refusal] = []
    for site, result in results:
        if isinstance(result, str):
            refused.append(Refusal(label(site.node), result))
        elif id(site.weight) in kept:
            refused.append(Refusal(label(site.node), "it shares its weight with a site that is left as it is"))
        else:
            absorbing.append(result)
    return absorbing, refused


def _absorption(site: LinearSite, sites: Sequence[LinearSite], norm: _Norm) -> _Absorption | str:
    """What the site becomes, or the reason why it cannot take the scale and shift."""
    weight = _scaled_weight(site, sites, norm)
    if isinstance(weight, str):
        return weight
    if not norm.has_shift:
        return _Absorption(Affine(site, None, None), weight, None)
    affine = affine_of(site)
    if affine is None:
        return "its bias is no constant vector"
    bias = _shifted_bias(affine, norm)
    return bias if isinstance(bias, str) else _Absorption(affine, weight, bias)


def _scaled_weight(site: LinearSite, sites: Sequence[LinearSite], norm: _Norm) -> Floats | str:
    """``diag(gamma) W``, or the reason why the site cannot have it."""
    uses = [(other.node, 1) for other in sites if other.transposed == site.transposed]
    if not is_float32(site.weight):
        return "its weight is not of float32"
    if not read_only_by(site.weight, uses):
        return "its weight is read elsewhere too"
    matrix = matrix_of(site)
    with np.errstate(over="ignore", under="ignore"):
        weight = matrix * norm.gamma[:, None]
    # A gamma of 0 takes the row away on purpose; only what it leaves can lose precision.
    kept = norm.gamma != 0
    return weight if keeps_precision(matrix[kept], weight[kept]) else "its weight would leave the range of float32"


def _shifted_bias(affine: Affine, norm: _Norm) -> Floats | str:
    """``bias + beta W``, or the reason why the site cannot have it."""
    width = affine.site.shape[1]
    bias = np.zeros(width, np.float32) if affine.bias is None else constant_floats(affine.bias, width)
    if bias is None:
        return "its bias is not of float32"
    if affine.bias is not None and affine.bias_use is not None and not read_only_by(affine.bias, [affine.bias_use]):
        return "its bias is read elsewhere too"
    shifted = bias + norm.beta.astype(np.float64) @ matrix_of(affine.site)
    limit = np.finfo(np.float32).max
    return (
        shifted.astype(np.float32) if np.all(np.abs(shifted) < limit) else "its bias would leave the range of float32"
    )


def _absorb(graph: ir.Graph, names: Names, norm: _Norm, absorbing: Sequence[_Absorption]) -> None:
    for item in absorbing:
        if item.bias is not None:
            _shift(graph, names, item.affine, item.bias)
    for item in {item.affine.site.weight: item for item in absorbing}.values():
        put_matrix(item.affine.site, item.weight)
    node, normalized = norm.node, norm.node.outputs[0]
    old = [needed(value) for value in node.inputs[1:] if value is not None]
    stay = [(item.affine.site.node, 0) for item in absorbing]
    if not read_only_by(normalized, stay):
        _restore(norm, names, stay)
    width = norm.gamma.size
    node.resize_inputs(2)
    node.replace_input_with(1, initializer(graph, f"norm.ones.{width}", np.ones(width), ir.DataType.FLOAT))
    remove_dead(old)


def _shift(graph: ir.Graph, names: Names, affine: Affine, bias: Floats) -> None:
    """Let the site add ``bias``."""
    node, output = affine.site.node, affine.site.output
    if affine.bias is not None:
        refill(affine.bias, bias)
        return
    constant = add_constant(graph, names.fresh(f"{output.name}.bias"), bias)
    if node.op_type == "Gemm":
        node.resize_inputs(3)
        node.replace_input_with(2, constant)
        return
    add = build("Add", [output, constant], like=node, name=names.fresh(f"{output.name}.shifted"))
    put_behind(output, [add], names.fresh(f"{output.name}.product"))


def _restore(norm: _Norm, names: Names, stay: Sequence[Use]) -> None:
    """Let all readers but the sites read the normalized values with the scale and shift."""
    node, value = norm.node, norm.node.outputs[0]
    name, dtype, shape = str(value.name), value.dtype, value.shape
    nodes: list[ir.Node] = []
    for applies, op_type, index in ((norm.has_scale, "Mul", 1), (norm.has_shift, "Add", 2)):
        if applies:
            source = nodes[-1].outputs[0] if nodes else value
            fresh = names.fresh(f"{name}.{'scaled' if op_type == 'Mul' else 'shifted'}")
            nodes.append(build(op_type, [source, node.inputs[index]], like=node, name=fresh, dtype=dtype, shape=shape))
    put_behind(value, nodes, names.fresh(f"{name}.normalized"), stay)
