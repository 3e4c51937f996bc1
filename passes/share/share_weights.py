"""share-weights."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from passes.affine import Floats, matrix_of, put_matrix
from passes.base import Context, Effect, Outcome, Purpose, Refusal
from passes.quantize.linear import Selection, choose_sites
from passes.sites import LinearSite
from passes.statistics import Moments
from passes.surgery import remove_dead

from .common import Doubles, damage, distance, shared

_NEAR = 4.0
"""How many tolerances two weights may be apart, channel by channel, to be looked at."""
_LAYER = re.compile(r"^.*?\.\d+(?=\.|$)")


@dataclass(frozen=True)
class ShareWeights:
    """Let linear operators whose weights are nearly the same, of one shape, share one weight.

    Sites are taken in graph order: each joins the cluster in which the worst damage is least, if that is no more than
    ``tolerance`` for all its members, or begins one. A cluster's weight is the one that moves the products of its
    members least: with ``H_i = E[x xᵀ]`` of their inputs ``(sum H_i)^-1 sum H_i W_i`` (RegMean: Jin et al., 2023,
    arXiv:2212.09849), without calibration data the mean. The damage of a site is the root mean square of what its
    products move by over that of the products; without data the relative Frobenius distance. Only clusters are tried
    whose weight is within four tolerances with each channel taken by itself. Models that were not trained to share
    seldom have any such weights; experts and repeated layers may.

    Costs, for each cluster tried, ``K² N`` operations a member. Equal weights are one always: see share-initializers.

    Left: weights that several operators read already, so that a second run changes nothing. Refused: what
    `choose_sites` refuses; nothing within the tolerance.

    Attributes:
        tolerance: The largest damage of a site; above 0 and below 1.
        across_layers: Share between layers too; else only within one, as between experts. The layer is the module path
            up to its first number.
        skip: Module paths to leave alone; ``*`` and ``?`` are wildcards, and ``*`` also spans dots.
        only: Module paths to act on, as in ``skip``; empty for all.
    """

    name: ClassVar[str] = "share-weights"
    effect: ClassVar[Effect] = Effect.LOSSY
    purpose: ClassVar[Purpose] = Purpose.SIZE

    tolerance: float = 0.02
    across_layers: bool = True
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 < self.tolerance < 1.0:
            raise ValueError(f"tolerance is {self.tolerance}, not between 0 and 1")

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Share; counts the weights that are gone."""
        chosen, refused = choose_sites(model, Selection(self.skip, self.only))
        groups: defaultdict[object, list[LinearSite]] = defaultdict(list)
        for site in chosen:
            if len(site.weight.uses()) == 1 and not site.weight.is_graph_output():
                groups[site.shape, site.transposed, self._layer(site)].append(site)
        candidates = [group for group in groups.values() if len(group) > 1]
        if not candidates:
            return Outcome(0, (*refused, Refusal("", "no two weights have the same shape")))
        inputs = dict.fromkeys(site.input for group in candidates for site in group)
        seen = context.moments(model, list(inputs)) if context.moments is not None else None
        changed = sum(_share(_clusters(group, seen, self.tolerance)) for group in candidates)
        if not changed:
            refused.append(Refusal("", f"no two weights are within {self.tolerance:.1%} of one", "raise tolerance"))
        return Outcome(changed, tuple(refused))

    def _layer(self, site: LinearSite) -> str:
        found = None if self.across_layers else _LAYER.match(site.path)
        return found.group() if found else ""


@dataclass
class _Cluster:
    """Sites that will share a weight.

    Attributes:
        members: The sites, in graph order.
        weight: What they will share, float32 [K, N].
        sizes: Diagonals of the second moments of their inputs, or None.
    """

    members: list[LinearSite]
    weight: Floats
    sizes: list[Doubles | None] = field(default_factory=list)


def _clusters(sites: Sequence[LinearSite], seen: Mapping[str, Moments] | None, tolerance: float) -> list[_Cluster]:
    clusters: list[_Cluster] = []
    for site in sites:
        weight = matrix_of(site)
        second = _second(site, seen)
        size = None if second is None else np.diagonal(second).copy()
        best: tuple[float, _Cluster, Floats] | None = None
        for cluster in clusters:
            if distance(weight, cluster.weight, (size, *cluster.sizes)) > _NEAR * tolerance:
                continue
            worst, joined = _joined((*cluster.members, site), seen)
            if worst <= tolerance and (best is None or worst < best[0]):
                best = (worst, cluster, joined)
        if best is None:
            clusters.append(_Cluster([site], weight, [size]))
        else:
            _, cluster, cluster.weight = best
            cluster.members.append(site)
            cluster.sizes.append(size)
    return clusters


def _joined(sites: Sequence[LinearSite], seen: Mapping[str, Moments] | None) -> tuple[float, Floats]:
    """The largest damage of sites that share a weight, and that weight."""
    weights = [matrix_of(site) for site in sites]
    seconds = [_second(site, seen) for site in sites]
    weight = shared(weights, seconds)
    return max(damage(own, weight, second) for own, second in zip(weights, seconds, strict=True)), weight


def _second(site: LinearSite, seen: Mapping[str, Moments] | None) -> Doubles | None:
    return None if seen is None else seen[str(site.input.name)].second


def _share(clusters: Sequence[_Cluster]) -> int:
    """Put the weights in; how many are gone."""
    gone = 0
    for cluster in clusters:
        first, *others = cluster.members
        if not others:
            continue
        put_matrix(first, cluster.weight)
        for site in others:
            old = site.weight
            site.node.replace_input_with(1, first.weight)
            remove_dead([old])
            gone += 1
    return gone
