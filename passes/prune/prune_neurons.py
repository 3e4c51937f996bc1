"""prune-neurons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from passes.base import Context, Effect, Outcome, Purpose, Refusal
from passes.quantize.linear import Selection
from passes.second_order import Floats
from passes.sites import LinearSite, linear_sites
from passes.splice import Names, label

from .importance import Indices
from .structure import BlockedError, Lane, is_marked, shrink, unfit_weights
from .structure_prune import Amount, Structure, prune_structures
from .structure_trace import Tracer

WHAT = "neurons"
_STEPS = 16
"""Steps that the neurons of a product have at least."""


@dataclass(frozen=True)
class PruneNeurons:
    """Remove neurons of feed-forward blocks: columns of the products before the activation, rows of the one behind.

    | before                                        | after |
    |-----------------------------------------------|-------|
    | W2 act(W1 x + b1) + b2                        | fewer columns of W1, b1 and rows of W2; W2 and b2 fitted anew |
    | Wd (act(Wg x) * (Wu x))                       | the same neurons go of gate and up |

    Any spelling of the activation that works on each neuron alone, fused or not. Those neurons go whose loss costs the
    least error of the product behind them when the others make up for it, one after the other (Kurtic, Frantar &
    Alistarh, ZipLM, 2023); the rows that stay are then the least-squares fit of all, and a bias that is there takes
    the mean of what is left. How many of each block: so that the errors, each in parts of the sum that it is added to,
    are least together.

    Refused: no calibration data; a weight that others read too, or of another type than float32; blocks whose neurons
    run through what is not seen through, as where Slices cut gate and up off one product (a Split is). Told: fewer rows
    seen than neurons. Blocks that were pruned are marked in the metadata of the product behind them, and left.

    Attributes:
        ratio: Part of all neurons that goes; between 0 and 1.
        repair: Fit what stays; else it stays as it is, and those go whose own part of the product is least.
        uniform: Each block loses that part; else those lose more whose error is less.
        multiple: Neurons that go from a block are a multiple of it, for the sake of kernels; halved for narrow blocks.
        skip: Module paths of the product behind the neurons to leave alone; ``*`` and ``?`` are wildcards.
        only: Module paths to act on, as in ``skip``; empty for all.
    """

    name: ClassVar[str] = "prune-neurons"
    effect: ClassVar[Effect] = Effect.LOSSY
    purpose: ClassVar[Purpose] = Purpose.SPEED

    ratio: float = 0.2
    repair: bool = True
    uniform: bool = False
    multiple: int = 32
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._amount()
        if self.multiple < 1:
            raise ValueError(f"multiple is {self.multiple}, less than 1")

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Prune the blocks of ``model`` in place; counts them. A second run changes 0."""
        found, refused = neuron_lanes(model, Selection(self.skip, self.only))
        if not found and not refused:
            refused.append(Refusal("", "there is no product behind an activation of another product"))
        names = Names(model.graph)
        structures = [
            self._structure(model.graph, names, lane) for lane in found if not is_marked(lane.sinks[0].node, WHAT)
        ]
        outcome = prune_structures(model, context, structures, self._amount(), WHAT, names)
        return Outcome(outcome.changed, (*refused, *outcome.refused))

    def _structure(self, graph: ir.Graph, names: Names, lane: Lane) -> Structure:
        step = self.multiple
        while step > 1 and step * _STEPS > lane.count:
            step //= 2

        def take(kept: Indices, matrix: Floats | None) -> None:
            shrink(graph, names, lane, kept, matrix)

        return Structure(lane.sinks[0].node, lane, lane.count, 1, step, lane.weights / lane.count, take)

    def _amount(self) -> Amount:
        return Amount(self.ratio, self.repair, self.uniform)


def neuron_lanes(model: ir.Model, selection: Selection) -> tuple[list[Lane], list[Refusal]]:
    """The neurons of every feed-forward block, in graph order, and why not those of others."""
    sites = {site.node: site for site in linear_sites(model)}
    tracer = Tracer(sites)
    refused: list[Refusal] = []
    lanes: list[Lane] = []
    taken: set[ir.Node] = set()
    paths: list[str] = []
    for site in sites.values():
        if site.node in taken:
            continue
        seen, blocked = tracer.upstream(site.input, site.shape[0])
        made = seen.sources or seen.packed or (blocked is not None and blocked.refusal.remedy)
        if not seen.nonlinear or not made:
            continue
        paths.append(site.path)
        if not selection.candidate(site.path):
            continue
        refusal = selection.refusal(site.node, site.path)
        try:
            if refusal is None:
                lane = _whole(tracer, site, blocked)
                taken.update(sink.node for sink in lane.sinks)
                lanes.append(lane)
        except BlockedError as error:
            refusal = Refusal(label(site.node), f"{site.path}: {error.refusal.reason}", error.refusal.remedy)
        if refusal is not None:
            refused.append(refusal)
    refused += selection.idle(paths, "product behind an activation")
    return lanes, refused


def _whole(tracer: Tracer, site: LinearSite, blocked: BlockedError | None) -> Lane:
    """The lane of what a site reads.

    Raises:
        BlockedError: It runs into something.
    """
    if blocked is not None:
        raise blocked
    lane = tracer.trace(site.input, site.shape[0])
    if lane.read is not site.input:
        raise BlockedError(site.node, "products read its neurons differently")
    unfit_weights(lane.sites)
    return lane
