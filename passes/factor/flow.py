"""Where the outputs of linear sites get to: the sums that they are added to, and the next sites that read them."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from passes.shapes import dims_of, last_dim
from passes.sites import LinearSite, constant_of, integer_attribute, linear_sites
from passes.surgery import MICROSOFT, is_operator

Channels = NDArray[np.intp]
_BY_ELEMENT = (
    *("Add", "Sub", "Mul", "Div", "Neg", "Sigmoid", "Tanh", "Relu", "Gelu", "Erf", "Swish", "Mish", "Elu", "Selu"),
    *(
        "LeakyRelu",
        "HardSwish",
        "HardSigmoid",
        "Softplus",
        "Clip",
        "Cast",
        "Identity",
        "QuickGelu",
        "FastGelu",
        "BiasGelu",
    ),
)
_SKIPS = ("SkipLayerNormalization", "SkipSimplifiedLayerNormalization")
_VALUES = 2
"""Which input of an attention operator holds the values that it averages."""


@dataclass(frozen=True, eq=False)
class Arrival:
    """One place that the output ``y [..., N]`` of a site gets to, with no other such place before it.

    Attributes:
        site: A linear site that reads what became of y; None where it is added to something or leaves the graph.
        total: The sum of what became of y with a value of its shape that does not depend on y: a residual stream.
        part: What became of y there.
        channels: The channel of y that each channel of the part stems from, int [K]; None where they are mixed.
    """

    site: LinearSite | None
    total: ir.Value | None
    part: ir.Value
    channels: Channels | None


class Flow:
    """Follows values through a graph as it is now."""

    def __init__(self, model: ir.Model) -> None:
        self._places = {node: place for place, node in enumerate(model.graph)}
        self._nodes = list(model.graph)
        self._sites = {site.node: site for site in linear_sites(model)}

    def arrivals(self, site: LinearSite) -> tuple[Arrival, ...]:
        """Where the output of a site gets to, in graph order."""
        found: list[Arrival] = []
        reached: dict[ir.Value, Channels | None] = {}
        pending: list[int] = []

        def reach(value: ir.Value, channels: Channels | None) -> None:
            reached[value] = channels
            if value.is_graph_output():
                found.append(Arrival(None, None, value, channels))
            for node in {use.node for use in value.uses()}:
                if node in self._places:
                    heapq.heappush(pending, self._places[node])

        reach(site.output, np.arange(site.shape[1]))
        last = -1
        while pending:
            place = heapq.heappop(pending)
            if place == last:
                continue
            last, node = place, self._nodes[place]
            part = next(value for value in node.inputs if value is not None and value in reached)
            if node in self._sites and part is self._sites[node].input:
                found.append(Arrival(self._sites[node], None, part, reached[part]))
            elif (total := _joined(node, reached)) is not None:
                found.append(Arrival(None, total, part, reached[part]))
            else:
                for output in node.outputs if is_operator(node, "Split") else node.outputs[:1]:
                    reach(output, _channels(node, reached))
        return tuple(found)

    def closure(self, sites: Sequence[LinearSite]) -> dict[LinearSite, tuple[Arrival, ...]]:
        """These sites and all that their outputs get to one after the other, in graph order, with their arrivals."""
        found: dict[ir.Node, tuple[Arrival, ...]] = {}
        pending = [self._sites[site.node] for site in sites]
        while pending:
            site = pending.pop()
            if site.node not in found:
                found[site.node] = self.arrivals(site)
                pending += [one.site for one in found[site.node] if one.site is not None]
        return {self._sites[node]: found[node] for node in sorted(found, key=self._places.__getitem__)}


def _joined(node: ir.Node, reached: dict[ir.Value, Channels | None]) -> ir.Value | None:
    """The sum of what was reached with a value that was not and is no constant, and neither is repeated for it.

    Of a norm that adds its inputs and keeps the sum for itself, the other value in place of the sum. Lengths that are
    not known may be the same; the last one has to be.
    """
    skips = is_operator(node, *_SKIPS, domain=MICROSOFT)
    if not skips and not is_operator(node, "Add"):
        return None
    left, right = node.inputs[:2]
    if left is None or right is None or (left in reached) == (right in reached):
        return None
    other = right if left in reached else left
    if skips:
        return other
    dims = list(zip(dims_of(left) or (), dims_of(right) or (), strict=False))
    known = [(one, two) for one, two in dims if isinstance(one, int) and isinstance(two, int)]
    wide = bool(dims) and dims[-1] in known and len(dims_of(left) or ()) == len(dims_of(right) or ())
    alike = constant_of(other) is None and wide and all(one == two for one, two in known)
    return node.outputs[0] if alike else None


def _channels(node: ir.Node, reached: dict[ir.Value, Channels | None]) -> Channels | None:
    """From which channels those of the first output stem; None where they are mixed."""
    sources = {
        place: reached[value] for place, value in enumerate(node.inputs) if value is not None and value in reached
    }
    first = next(iter(sources.values()))
    if first is None or any(one is None or not np.array_equal(one, first) for one in sources.values()):
        return None
    if node.op_type in _BY_ELEMENT and last_dim(node.outputs[0]) in (None, len(first)):
        return first
    heads = integer_attribute(node, "num_heads", 0)
    if is_operator(node, "GroupQueryAttention", "MultiHeadAttention", domain=MICROSOFT) and set(sources) == {_VALUES}:
        groups = integer_attribute(node, "kv_num_heads", heads)
        if heads and groups and not heads % groups and not len(first) % groups:
            return np.repeat(first.reshape(groups, -1), heads // groups, axis=0).reshape(-1)
    return None
