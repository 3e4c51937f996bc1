"""prune-channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from passes.affine import Floats
from passes.base import Context, Effect, ObserveMoments, Outcome, Purpose, Refusal
from passes.factor.patches import Site, seen_and_wanted, seen_by
from passes.factor.regression import Doubles, Regression, of_another, of_itself
from passes.quantize.linear import Selection
from passes.sites import convolution_sites, linear_sites
from passes.splice import Names, label
from passes.statistics import Moments

from .channel_cuts import PRUNED, bias_of, cut, has_bias, refill, weight_of
from .channel_groups import ChannelGroup, by_node, channel_groups
from .channel_scores import Indices, Reading, keep


@dataclass(frozen=True)
class PruneChannels:
    """Remove output channels of convolutions, and all that belongs to them: shapes really shrink.

    Channels that are added, multiplied or compared with those of another convolution go together with them, through any
    number of residual blocks; normalizations, depthwise convolutions and constants with a number for each channel are
    cut too, and so is what reads them: convolutions, and linear operators behind a flattened map.

    With calibration data the channels go one after the other, always the one that the convolutions and linear operators
    that read it miss least once their other inputs make up for it (optimal brain surgeon for blocks). With ``repair``
    all these are then fitted again by least squares, in the order of the graph, to what they gave in the original, from
    the inputs that are there now: one pass over the data for each. Without repair channels go by what they give to
    the outputs, and only biases make up for them. Without calibration data a channel counts as the
    weights of its makers and readers do.

    Refused: groups of channels that the graph gives to its caller, or that an operator reads which is not followed
    (Concat among them); groups of which no ``multiple`` can go; groups with a convolution that ``skip`` names.

    Attributes:
        ratio: Part of the channels of each group to remove, above 0 and below 1.
        repair: See above.
        multiple: So many channels stay, or a multiple: kernels of CPUs compute 16 together, 8 without AVX-512.
        skip: Module paths to leave alone; ``*`` and ``?`` are wildcards, and ``*`` also spans dots.
        only: Module paths to act on, as in ``skip``; empty for all. One convolution of a group is enough.
    """

    name: ClassVar[str] = "prune-channels"
    effect: ClassVar[Effect] = Effect.LOSSY
    purpose: ClassVar[Purpose] = Purpose.SPEED

    ratio: float = 0.25
    repair: bool = True
    multiple: int = 16
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0.0 < self.ratio < 1.0:
            raise ValueError(f"ratio is {self.ratio}, not above 0 and below 1")
        if self.multiple < 1:
            raise ValueError(f"multiple is {self.multiple}, not 1 or more")

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Rewrite in place; counts the convolutions that lost outputs."""
        groups = channel_groups(model)
        chosen, refused = self._chosen(groups)
        if not chosen:
            return Outcome(0, tuple(refused))
        kept = self._kept(model, chosen, context.moments)
        before, names = model.clone(), Names(model.graph)
        for group, indices in zip(chosen, kept, strict=True):
            cut(model, names, group, indices)
        makers = by_node(chosen)
        rows = dict(zip(map(id, chosen), kept, strict=True))
        readers = {reader.site.node for group in chosen for reader in group.readers}
        observe = context.moments
        if observe is None:
            refused.append(Refusal("", "without calibration data channels went by their weights", "compile with data"))
        else:
            for node in [node for node in model.graph if node in readers]:
                own = makers.get(node)
                outputs = None if own is None else rows[id(own)]
                self._refit(before, model, names, _site(model, node), outputs, observe)
        return Outcome(sum(len(group.makers) for group in chosen), tuple(refused))

    def _chosen(self, groups: Sequence[ChannelGroup]) -> tuple[list[ChannelGroup], list[Refusal]]:
        """The groups that lose channels, and why not the others."""
        selection = Selection(self.skip, self.only)
        refused = selection.idle([site.path for group in groups for site in group.makers], "convolution")
        chosen = []
        for group in groups:
            if not any(selection.candidate(site.path) for site in group.makers):
                continue
            skipped = (selection.refusal(site.node, site.path) for site in group.makers)
            refusal = next((item for item in skipped if item is not None), None) or group.blocked
            if refusal is None and not group.readers:
                refusal = Refusal(label(group.makers[0].node), "no product reads these channels")
            count = self._count(group)
            if refusal is None and count >= _original(group):
                remedy = f"set a multiple below {self.multiple}, or a larger ratio"
                reason = f"of {group.width} channels no {self.multiple} can go"
                refusal = Refusal(label(group.makers[0].node), reason, remedy)
            if refusal is not None:
                refused.append(refusal)
            elif count < group.width:
                chosen.append(group)
        return chosen, refused

    def _count(self, group: ChannelGroup) -> int:
        """Channels that stay."""
        return max(1, round((1.0 - self.ratio) * _original(group) / self.multiple)) * self.multiple

    def _kept(self, model: ir.Model, chosen: Sequence[ChannelGroup], observe: ObserveMoments | None) -> list[Indices]:
        """Which channels of each group stay."""
        sites = {reader.site.node: reader.site for group in chosen for reader in group.readers}
        names: dict[ir.Node, str] = {}
        moments: Mapping[str, Moments] = {}
        if observe is not None:
            copy, values = seen_by(model, tuple(sites.values()))
            names = {node: str(value.name) for node, value in zip(sites, values, strict=True)}
            moments = observe(copy, values)
        kept = []
        for group in chosen:
            readings = []
            for reader in group.readers:
                found = moments[names[reader.site.node]] if moments else None
                regression = of_itself(weight_of(reader.site), bias_of(reader.site), found)
                if found is None:
                    regression = replace(regression, moment=np.diag(np.repeat(_sizes(group), reader.taps)))
                readings.append(Reading(regression, reader.taps))
            compensated = self.repair and observe is not None
            kept.append(keep(readings, group.width, self._count(group), compensated=compensated))
        return kept

    def _refit(
        self,
        before: ir.Model,
        model: ir.Model,
        names: Names,
        site: Site,
        outputs: Indices | None,
        observe: ObserveMoments,
    ) -> None:
        """Fit a site that reads fewer channels to what it gave; without repair its bias only."""
        weight = weight_of(site)
        if not self.repair and not has_bias(site):
            return
        graph, value = seen_and_wanted(before, model, site, str(site.output.name))
        moments = observe(graph, [value])[str(value.name)]
        regression = _restricted(moments, weight, outputs, centred=has_bias(site))
        best = regression.best if self.repair else weight.astype(np.float64)
        refill(model, names, site, best.astype(np.float32), regression.bias(best))


def _restricted(moments: Moments, weight: Floats, outputs: Indices | None, *, centred: bool) -> Regression:
    """The regression on some of the wanted outputs; without a bias one through zero."""
    size = weight.shape[1]
    if outputs is not None:
        places = np.concatenate([np.arange(size), size + outputs])
        second = moments.second[np.ix_(places, places)]
        moments = replace(moments, second=second, absmax=moments.absmax[places], mean=moments.mean[places])
    if not centred:
        moments = replace(moments, mean=np.zeros_like(moments.mean))
    return of_another(weight, moments)


def _sizes(group: ChannelGroup) -> Doubles:
    """About the variance of each channel, as far as the weights of its makers tell, float64 [C]; all above 0."""
    squares = sum((np.square(weight_of(site).astype(np.float64)).sum(1) for site in group.makers), np.zeros(1))
    return squares + np.finfo(np.float64).tiny


def _original(group: ChannelGroup) -> int:
    """Channels there were before any of them went."""
    return max(int(site.node.metadata_props.get(PRUNED, group.width)) for site in group.makers)


def _site(model: ir.Model, node: ir.Node) -> Site:
    sites: tuple[Site, ...] = (*convolution_sites(model), *linear_sites(model))
    return next(site for site in sites if site.node is node)
