"""smooth."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from passes.affine import Floats, affine_of, is_float32, matrix_of, put_matrix, read_only_by
from passes.base import Context, Effect, Outcome, Purpose, Refusal
from passes.sites import LinearSite, linear_sites
from passes.splice import Names, label

from .channels import Source, divide, restore, source_of
from .linear import Selection
from .smoothing import GAIN, best_factors


@dataclass(frozen=True, eq=False)
class _Group:
    """The linear sites that read one value, and how its channels can be scaled."""

    sites: tuple[LinearSite, ...]
    source: Source


@dataclass(frozen=True)
class Smooth:
    """Move outlying channels of activations into the weights that they meet, where 8 bits for both then lose less.

    SmoothQuant (Xiao et al., 2023, arXiv:2211.10438): all linear sites that read a value ``x [..., K]`` get
    ``diag(s) W`` and what makes x makes ``x / s``:

    | x is                                  | takes 1 / s                                | other readers of x |
    |---------------------------------------|--------------------------------------------|--------------------|
    | LayerNormalization, RMSNormalization  | gamma and beta                             | read ``x * s``     |
    | ``n * gamma`` or ``n * gamma + beta`` | gamma and beta                             | none allowed       |
    | heads that an attention mixed         | columns and bias of the value's projection | none allowed       |

    ``s_k = max|x_k|^a / max_n|W_kn|^(1 - a)`` on calibration data, and a is the one of ``strengths`` with which the
    products in 8 bits (uint8 activations, int8 columns) come closest to those in float. A value is left where their
    error does not shrink by a tenth. So is one that was smoothed before: any strength leads from there to the very
    products that it leads to from the start, and the best of them is what is there; running again changes nothing.

    Run it before what quantizes, after ``absorb-norm`` and before ``pack-products``. Refused: no calibration data;
    weights and constants that are read elsewhere too or not finite float32; values of which a site is skipped; those
    without gain; patterns that fit no site. Values made otherwise (by an activation function) are no candidates.

    Attributes:
        strengths: Exponents a to try, each between 0 and 1.
        skip: Module paths of sites to leave alone, with all that read the same value; ``*`` and ``?`` are wildcards.
        only: Module paths to act on, as in ``skip``; empty for all.
    """

    name: ClassVar[str] = "smooth"
    effect: ClassVar[Effect] = Effect.EXACT
    purpose: ClassVar[Purpose] = Purpose.FORM

    strengths: tuple[float, ...] = (0.25, 0.5, 0.65, 0.8)
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not all(0.0 < strength < 1.0 for strength in self.strengths):
            raise ValueError(f"strengths lie between 0 and 1, not {list(self.strengths)}")

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Smooth; counts the values."""
        groups, refused = self._groups(model)
        if not groups:
            return Outcome(0, tuple(refused))
        if context.observe is None:
            remedy = "Compile with data, or leave smooth out"
            return Outcome(0, (*refused, Refusal("", "calibration data is needed", remedy)))
        seen = context.observe(model, [group.source.value for group in groups])
        observed = [(group, seen[str(group.source.value.name)]) for group in groups]
        changed = 0
        names = Names(model.graph)
        # From the end, so that the columns of a projection are scaled before its rows are looked at.
        for group, activation in reversed(observed):
            weights = [matrix_of(site) for site in group.sites]
            choice = best_factors(activation, weights, self.strengths)
            if choice.strength == 0.0:
                reason = f"no strength takes {GAIN:.0%} of the error of its products in 8 bits away"
                refused.append(Refusal(label(group.sites[0].node), reason))
            else:
                _smooth(model.graph, names, group, choice.factors)
                changed += 1
        return Outcome(changed, tuple(refused))

    def _groups(self, model: ir.Model) -> tuple[list[_Group], list[Refusal]]:
        """The values that can be smoothed, in graph order, and why not the others."""
        selection = Selection(self.skip, self.only)
        sites = linear_sites(model)
        refused = selection.idle([site.path for site in sites], "linear operator")
        readers: defaultdict[ir.Value, list[LinearSite]] = defaultdict(list)
        for site in sites:
            readers[site.input].append(site)
        affines = {affine.output: affine for site in sites if (affine := affine_of(site)) is not None}
        groups: list[_Group] = []
        for value, group in readers.items():
            if not all(selection.candidate(site.path) for site in group):
                continue
            source = source_of(value, group[0].shape[0], affines)
            if source is None:
                continue
            skipped = [refusal for site in group if (refusal := selection.refusal(site.node, site.path)) is not None]
            fit = source if isinstance(source, str) else _fit(group, source)
            if skipped:
                refused += skipped
            elif isinstance(fit, str):
                refused.append(Refusal(label(group[0].node), fit))
            else:
                groups.append(fit)
        return groups, refused


def _fit(group: Sequence[LinearSite], source: Source) -> _Group | str:
    """The group, or the reason why it cannot be smoothed."""
    for site in group:
        uses = [(other.node, 1) for other in group if other.transposed == site.transposed]
        if not is_float32(site.weight) or not np.isfinite(matrix_of(site)).all():
            return f"the weight of {site.path} is not of finite float32"
        if not read_only_by(site.weight, uses):
            return f"the weight of {site.path} is read elsewhere too"
    if not source.restorable and not read_only_by(source.value, [(site.node, 0) for site in group]):
        return "its input is read by others than linear operators"
    return _Group(tuple(group), source)


def _smooth(graph: ir.Graph, names: Names, group: _Group, factors: Floats) -> None:
    for site in {site.weight: site for site in group.sites}.values():
        put_matrix(site, matrix_of(site) * factors[:, None])
    divide(graph, names, group.source, factors)
    restore(graph, names, group.source.value, factors, [(site.node, 0) for site in group.sites])
