"""Which linear maps are fitted again, to what, and in which order."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from passes.affine import Affine, affine_of, is_float32, matrix_of, read_only_by
from passes.base import Refusal
from passes.quantize.linear import Selection
from passes.sites import LinearSite, constant_of, linear_sites
from passes.splice import label
from passes.surgery import is_operator, only_user


@dataclass(frozen=True, eq=False)
class Target:
    """A linear map and what it should make.

    Attributes:
        affine: The map.
        wanted: Name of the value of the original graph that it should make.
        less: Name of a value of this graph to take away from that first; empty for none. Where the output is added to a
            residual stream, ``wanted`` is the original's sum and this the stream, so that the map makes up for what is
            wrong with the stream too.
        weight: Whether its weight may change: no other operator reads it.
        bias: Whether it has a bias, and no other operator reads that.
    """

    affine: Affine
    wanted: str
    less: str
    weight: bool
    bias: bool

    @property
    def site(self) -> LinearSite:
        """The product."""
        return self.affine.site


def find_targets(model: ir.Model, original: ir.Model, selection: Selection) -> tuple[list[Target], list[Refusal]]:
    """The maps to fit, in graph order, and why not others.

    Without ``only`` those whose output goes to a residual stream; of two factors, the second.
    """
    sites = linear_sites(model)
    refused = selection.idle([site.path for site in sites], "linear operator")
    last = {site.path: site for site in sites}
    known = _Counterparts(original)
    targets: list[Target] = []
    for site in sites:
        affine = affine_of(site)
        if affine is None or last[site.path] is not site:
            continue
        add = _residual(affine)
        if (add is None and not selection.only) or not selection.candidate(site.path):
            continue
        refusal = selection.refusal(site.node, site.path) or _unfit(site)
        if refusal is not None:
            refused.append(refusal)
            continue
        theirs = known.of(site)
        if theirs is None:
            remedy = "repair before its module path and its name change"
            refused.append(Refusal(label(site.node), "the graph before compression has no such operator", remedy))
            continue
        wanted, less = _wanted(affine, add, theirs)
        target = Target(affine, wanted, less, _own_weight(site), _own_bias(affine))
        if target.weight or target.bias:
            targets.append(target)
        else:
            refused.append(Refusal(label(site.node), "other operators share its weight, and it has no bias of its own"))
    return targets, refused


def levels(model: ir.Model, targets: Sequence[Target]) -> list[list[Target]]:
    """The targets in groups: none of a group feeds another of it, and each comes after those that feed it."""
    # One that makes up for its stream comes after all that write to it: it counts where it is added.
    places = [only_user(target.affine.output) if target.less else target.site.node for target in targets]
    by_node = dict(zip(places, targets, strict=True))
    depth: dict[ir.Value, int] = {}
    groups: defaultdict[int, list[Target]] = defaultdict(list)
    for node in model.graph:
        read = [value for value in node.inputs if value is not None]
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH:
                read += [
                    value for inner in attribute.as_graph().all_nodes() for value in inner.inputs if value is not None
                ]
        level = max((depth.get(value, 0) for value in read), default=0)
        if node in by_node:
            groups[level].append(by_node[node])
            level += 1
        for output in node.outputs:
            depth[output] = level
    return [groups[level] for level in sorted(groups)]


class _Counterparts:
    """The linear maps of the original graph, by the name of their output and by module path."""

    def __init__(self, original: ir.Model) -> None:
        sites = linear_sites(original)
        paths = Counter(site.path for site in sites)
        self._by_name: Mapping[str, LinearSite] = {str(site.output.name): site for site in sites}
        self._by_path: Mapping[str, LinearSite] = {site.path: site for site in sites if paths[site.path] == 1}

    def of(self, site: LinearSite) -> Affine | None:
        """The one that made what this one makes: of as many columns, and with a bias where this has one."""
        for found in (self._by_name.get(str(site.output.name)), self._by_path.get(site.path)):
            if found is not None and found.shape[1] == site.shape[1] and found.node.op_type == site.node.op_type:
                return affine_of(found)
        return None


def _unfit(site: LinearSite) -> Refusal | None:
    if not is_float32(site.weight):
        return Refusal(label(site.node), "the weight is not float32", "repair before the precision is changed")
    if not np.isfinite(matrix_of(site)).all():
        return Refusal(label(site.node), "the weight has values that are not finite", "repair the checkpoint")
    return None


def _residual(affine: Affine) -> ir.Node | None:
    """The Add of the output to a stream: to what is neither a constant nor another linear map's output."""
    add = only_user(affine.output)
    if add is None or not is_operator(add, "Add"):
        return None
    stream = _other(add, affine.output)
    if stream is None or stream is affine.output or constant_of(stream) is not None or stream.is_initializer():
        return None
    return add


def _wanted(affine: Affine, add: ir.Node | None, theirs: Affine) -> tuple[str, str]:
    """The original's value to make, and this graph's to take away from it."""
    their_add = _residual(theirs)
    stream = None if add is None else _other(add, affine.output)
    if stream is None or their_add is None or _is_linear(stream):
        return str(theirs.output.name), ""
    return str(their_add.outputs[0].name), str(stream.name)


def _other(add: ir.Node, value: ir.Value) -> ir.Value | None:
    return add.inputs[1] if add.inputs[0] is value else add.inputs[0]


def _is_linear(value: ir.Value) -> bool:
    """Whether the value is another linear map's, as where attention and feed-forward are added side by side."""
    node = value.producer()
    while is_operator(node, "Add") and node is not None:
        made = [item for item in node.inputs if item is not None and constant_of(item) is None]
        if len(made) != 1:
            return False
        node = made[0].producer()
    return is_operator(node, "MatMul", "Gemm")


def _own_weight(site: LinearSite) -> bool:
    return read_only_by(site.weight, [(site.node, 1)])


def _own_bias(affine: Affine) -> bool:
    return affine.bias is not None and affine.bias_use is not None and read_only_by(affine.bias, [affine.bias_use])
