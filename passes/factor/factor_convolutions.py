"""factor-convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from passes.base import Context, Effect, ObserveMoments, Outcome, Purpose, Refusal
from passes.quantize.linear import Selection
from passes.sites import ConvSite, convolution_sites, module_path
from passes.splice import Names, label
from passes.surgery import is_operator

from .convolution_forms import MEMORY, METHODS, Form, Geometry, Ranks, form_of
from .convolution_ranks import Choices, divide
from .convolution_sites import FACTORED, arrays_of, cost, geometry, planes, replace_by_chain, site_of, unfit
from .patches import seen_and_wanted, seen_by
from .regression import Regression, of_another, of_itself

_MOST_CHOICES = 24

Problem = Callable[[ir.Node], Regression]


@dataclass(frozen=True, eq=False)
class _Candidate:
    """A convolution that may become a chain.

    Attributes:
        node: The Conv.
        walk: How it walks.
        choices: Ranks at which it is cheaper, cheapest first; at least one.
        costs: Of each.
    """

    node: ir.Node
    walk: Geometry
    choices: tuple[Ranks, ...]
    costs: tuple[int, ...]


@dataclass(frozen=True)
class FactorConvolutions:
    """Put chains of smaller convolutions in the place of k x k ones.

    | method    | after |
    |-----------|-------|
    | spatial   | k x 1 to R channels, 1 x k (Jaderberg, Vedaldi & Zisserman, 2014) |
    | tucker    | 1 x 1 to R channels, k x k to M, 1 x 1 (Kim et al., 2016) |
    | separable | the sum of M branches: depthwise k x k, 1 x 1 |

    Strides, pads and dilations are kept, and a bias is added by the last of the chain. With calibration data a chain
    has the least error of the outputs on them, ``tr((W - V) Cov(x) (W - V)^T)`` with ``x`` the inputs under the kernel,
    by singular values and alternating least squares. With ``repair`` the graph is gone through in its order, and each
    chain is fitted to what the original convolution gave, from the inputs that the chains before it leave: one pass
    over the data for each. Without calibration data the kernels themselves are approximated, which loses far more.

    With ``allocate`` the work of all convolutions together is brought to ``flops``, where it does the least harm: the
    sum of the errors, each in parts of the variance of its outputs. Else the work of each is. Work is multiply-adds,
    and ``memory`` more for each element of a map that is read or written, so that it is in proportion to time; of
    multiply-adds alone more are saved.

    Refused: groups; kernels and biases that are no finite float32 constants; auto_pad that depends on an unknown size;
    with ``allocate``, planes of unknown size; convolutions that no chain makes cheaper; those that ``skip`` names.
    Chains are marked by metadata, and are not taken apart again.

    Attributes:
        method: See above.
        flops: Part of the work that may stay, above 0 and below 1.
        allocate: See above.
        repair: See above.
        sweeps: Of alternating least squares.
        multiple: Ranks are multiples of it: kernels of CPUs compute 16 channels together, 8 without AVX-512.
        memory: See above; 0 to count multiply-adds alone.
        skip: Module paths to leave alone; ``*`` and ``?`` are wildcards, and ``*`` also spans dots.
        only: Module paths to act on, as in ``skip``; empty for all.
    """

    name: ClassVar[str] = "factor-convolutions"
    effect: ClassVar[Effect] = Effect.LOSSY
    purpose: ClassVar[Purpose] = Purpose.SPEED

    method: str = "separable"
    flops: float = 0.5
    allocate: bool = True
    repair: bool = True
    sweeps: int = 3
    multiple: int = 16
    memory: int = MEMORY
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}, not one of {', '.join(METHODS)}")
        if not 0.0 < self.flops < 1.0:
            raise ValueError(f"flops is {self.flops}, not above 0 and below 1")
        if self.sweeps < 0:
            raise ValueError(f"sweeps is {self.sweeps}, not 0 or more")
        if self.multiple < 1:
            raise ValueError(f"multiple is {self.multiple}, not 1 or more")
        if self.memory < 0:
            raise ValueError(f"memory is {self.memory}, not 0 or more")

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Rewrite in place; counts the convolutions that became chains."""
        form = form_of(self.method, self.multiple)
        candidates, refused = self._candidates(model, form)
        costs = {site.node: cost(site, self.memory) for site in convolution_sites(model)}
        wanted = self.flops * sum(int(node.metadata_props.get(FACTORED, spent)) for node, spent in costs.items())
        if not candidates or (self.allocate and sum(costs.values()) <= wanted):
            return Outcome(0, tuple(refused))
        before = model.clone()
        problem = _problems(model, context.moments if self.allocate or not self.repair else None, candidates)
        others = sum(costs.values()) - sum(costs[candidate.node] for candidate in candidates)
        chosen = self._chosen(candidates, form, wanted - others, problem)
        names = Names(model.graph)
        for candidate, ranks in chosen:
            site = site_of(model, candidate.node)
            if self.repair and context.moments is not None:
                regression = _as_before(before, model, site, context.moments)
            else:
                regression = problem(candidate.node)
            if 0 < regression.rows < len(regression.moment):
                reason = f"its {len(regression.moment)} inputs were seen {regression.rows} times only"
                refused.append(Refusal(label(candidate.node), reason, "give more calibration data"))
            chain = form.chain(regression, candidate.walk, ranks, self.sweeps)
            replace_by_chain(model, names, site, chain, regression.bias(chain.weight), spent=costs[candidate.node])
        if context.moments is None:
            reason = "without calibration data kernels were approximated, not outputs"
            refused.append(Refusal("", reason, "compile with data"))
        if self.allocate and sum(cost(site, self.memory) for site in convolution_sites(model)) > wanted:
            reason = f"the convolutions cannot be brought to {self.flops:.0%} of their work"
            refused.append(Refusal("", reason, "set a larger flops, a smaller multiple or another method"))
        return Outcome(len(chosen), tuple(refused))

    def _candidates(self, model: ir.Model, form: Form) -> tuple[list[_Candidate], list[Refusal]]:
        """Convolutions with cheaper chains, and why not the others."""
        sites = {site.node: site for site in convolution_sites(model)}
        selection = Selection(self.skip, self.only)
        if not any(is_operator(node, "Conv") for node in model.graph):
            return [], [Refusal("", "there is no convolution")]
        refused = selection.idle([site.path for site in sites.values()], "convolution")
        found: list[_Candidate] = []
        for node in model.graph:
            if not is_operator(node, "Conv") or FACTORED in node.metadata_props:
                continue
            if not selection.candidate(module_path(node)):
                continue
            site = sites.get(node)
            refusal = selection.refusal(node, module_path(node))
            if refusal is None and site is None:
                reason = "no convolution with a constant kernel over two axes of known pads"
                refusal = Refusal(label(node), reason)
            answer = refusal if site is None or refusal is not None else self._candidate(site, form)
            if isinstance(answer, _Candidate):
                found.append(answer)
            elif answer is not None:
                refused.append(answer)
        return found, refused

    def _candidate(self, site: ConvSite, form: Form) -> _Candidate | Refusal:
        reason = unfit(site)
        walk = geometry(site, self.memory)
        reason = reason or form.unfit(walk)
        if reason:
            return Refusal(label(site.node), reason)
        if self.allocate and planes(site) is None:
            reason = "height and width are not known, nor what it costs"
            return Refusal(label(site.node), reason, "run infer-shapes before, or set allocate=false")
        most = walk.dense - 1 if self.allocate else int(self.flops * walk.dense)
        choices = [(ranks, form.cost(walk, ranks)) for ranks in form.ranks(walk)]
        choices = [(ranks, spent) for ranks, spent in choices if spent <= most]
        if not choices:
            return Refusal(label(site.node), "no chain of these ranks is cheap enough", "set a smaller multiple")
        kept = choices[:: -(-len(choices) // _MOST_CHOICES)] if self.allocate else choices[-1:]
        return _Candidate(site.node, walk, tuple(ranks for ranks, _ in kept), tuple(spent for _, spent in kept))

    def _chosen(
        self, candidates: Sequence[_Candidate], form: Form, budget: float, problem: Problem
    ) -> list[tuple[_Candidate, Ranks]]:
        """Which become chains, and of which ranks, so that they cost no more than the budget together."""
        if not self.allocate:
            return [(candidate, candidate.choices[0]) for candidate in candidates]
        items = []
        for candidate in candidates:
            damages = form.damages(problem(candidate.node), candidate.walk, candidate.choices)
            costs = np.array([candidate.walk.dense, *candidate.costs], np.float64)
            items.append(Choices(costs, np.array([0.0, *damages])))
        pairs = zip(candidates, divide(items, budget), strict=True)
        return [(candidate, candidate.choices[pick - 1]) for candidate, pick in pairs if pick > 0]


def _problems(model: ir.Model, observe: ObserveMoments | None, candidates: Sequence[_Candidate]) -> Problem:
    """What to fit where each convolution keeps its inputs; all moments are those of the graph as it is now."""
    arrays = {candidate.node: arrays_of(site_of(model, candidate.node)) for candidate in candidates}
    if observe is None:
        return lambda node: of_itself(*arrays[node], None)
    copy, values = seen_by(model, [site_of(model, candidate.node) for candidate in candidates])
    names = {candidate.node: str(value.name) for candidate, value in zip(candidates, values, strict=True)}
    moments = observe(copy, values)
    return lambda node: of_itself(*arrays[node], moments[names[node]])


def _as_before(before: ir.Model, model: ir.Model, site: ConvSite, observe: ObserveMoments) -> Regression:
    """What to fit where the outputs of the original graph are wanted from the inputs of this one."""
    graph, value = seen_and_wanted(before, model, site, str(site.output.name))
    return of_another(arrays_of(site)[0], observe(graph, [value])[str(value.name)])
