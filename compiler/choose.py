"""Which linear operator takes which form: the fastest by measured cost; where quality misses, the worst step back."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import groupby, pairwise
from pathlib import Path
from statistics import geometric_mean

import numpy as np
import onnx_ir as ir

from artifacts.manifest import SessionOptions
from artifacts.target import CPU_PROVIDER
from passes.base import Context, Pass
from passes.pipeline import Pipeline
from passes.quantize.linear import weight_of
from passes.sites import LinearSite, linear_sites
from passes.surgery import needed
from runtimes.session import Session

from .costs import CostBase
from .lone import Floats, lone_model, rewritten

SMALLEST_SIDE = 16
"""Sites with a shorter side stay as they are: no form gains there."""
_LEAD = 1.1
"""How much faster a form must be than one listed before it: on a busy machine, figures of one operator vary as much."""
_ALONE = 1.5
"""How much faster float32 must be than the best form. Alone, an operator pays for quantizing its input and for floats
coming out; in a graph, neighbours share the one and spare the other. The graph as a whole is timed later."""


StepBack = tuple[str, Pass | None]
"""Module path of an operator, and the gentler form it takes from then on; None: float32."""


@dataclass(frozen=True)
class Assignment:
    """A form for each linear operator.

    Attributes:
        forms: Module path -> form; None: as it is.
    """

    forms: Mapping[str, Pass | None]

    def after(self, steps: Sequence[StepBack]) -> Assignment:
        """The same once these steps back were taken, in this order."""
        return Assignment({**self.forms, **dict(steps)})

    def pipeline(self, before: Pipeline = Pipeline()) -> Pipeline:  # noqa: B008  # frozen
        """The passes that bring it about, each told the sites it is for; ``before`` runs first."""
        used = dict.fromkeys(form for form in self.forms.values() if form is not None)
        passes = []
        for form in used:
            mine = [path for path, chosen in self.forms.items() if chosen == form]
            rest = [path for path in self.forms if path not in mine]
            if not rest:
                passes.append(form)
            elif len(rest) < len(mine) and len(used) == 1:
                passes.append(_told(form, "skip", patterns(rest, self.forms)))
            else:
                passes.append(_told(form, "only", patterns(mine, self.forms)))
        return Pipeline((*before.passes, *passes)) if passes else Pipeline()


def patterns(paths: Sequence[str], among: Mapping[str, object]) -> tuple[str, ...]:
    """The shortest way to name exactly these of the paths: ``layer.*.dense`` where all that fits it is meant."""
    found: dict[str, None] = {}
    for path in paths:
        pattern = re.sub(r"\d+", "*", path)
        exact = all(other in paths for other in among if fnmatchcase(other, pattern))
        found[pattern if exact else path] = None
    return tuple(found)


@dataclass(frozen=True)
class Chooser:
    """Chooses for one target.

    Attributes:
        context: What passes may know.
        costs: Measured costs; None where they are not known: then the first form is taken everywhere.
    """

    context: Context
    costs: CostBase | None

    def assign(self, model: ir.Model, forms: Sequence[Pass], precision: str) -> Assignment:
        """The fastest form of each linear operator, the earlier one where two are within 10 %; none where all are slow.

        ``precision`` is what the provider may compute float32 in, as in `SessionOptions`.

        Raises:
            ProviderError: The provider does not run a float32 product.
        """
        chosen = {site.path: self._fastest(site.shape, forms, precision) for site in _sites(model)}
        return Assignment(chosen)

    def steps_back(
        self, model: ir.Model, assignment: Assignment, forms: Sequence[Pass], precision: str
    ) -> tuple[StepBack, ...]:
        """How the operators fall back to float32: those steps first that leave the most damage behind.

        An operator falls to the form that damages its outputs next less, and at last to float32. Of ``forms`` only
        those count that cost less than float32, and less than what is gentler.

        Raises:
            ProviderError: The provider does not run a float32 product.
        """
        sites = {site.path: site for site in _sites(model) if assignment.forms.get(site.path) is not None}
        observe = self.context.observe
        if observe is None:
            return tuple((path, None) for path in sites)
        seen = observe(model, list(dict.fromkeys(needed(site.node.inputs[0]) for site in sites.values())))
        steps: list[tuple[float, StepBack]] = []
        for path, site in sites.items():
            sample = seen[str(needed(site.node.inputs[0]).name)].sample
            ladder = self._ladder(site, assignment.forms[path], self._gains(site.shape, forms, precision), sample)
            steps += [(damage, (path, gentler)) for (damage, _), (_, gentler) in pairwise(ladder)]
        return tuple(step for _, step in sorted(steps, key=lambda item: -item[0]))

    def _ladder(
        self, site: LinearSite, form: Pass | None, gains: Mapping[Pass, float], sample: Floats
    ) -> list[tuple[float, Pass | None]]:
        """Damage and form, from the form that a site has to float32."""
        ladder: list[tuple[float, Pass | None]] = [(0.0, None)]
        first, least = self._damage_of(site, form, sample), np.inf
        damages = {other: self._damage_of(site, other, sample) for other in gains if other != form}
        for other, damage in sorted(damages.items(), key=lambda item: item[1]):
            if damage < first and gains[other] < least:
                ladder.insert(0, (damage, other))
                least = gains[other]
        return [(first, form), *ladder]

    def _gains(self, shape: tuple[int, int], forms: Sequence[Pass], precision: str) -> dict[Pass, float]:
        """Mean cost of the forms that cost less than float32; empty where costs are not known."""
        if self.costs is None:
            return {}
        costs = self.costs.milliseconds((*forms, None), shape, precision)
        means = {form: geometric_mean(costs[form]) for form in forms if form in costs}
        return {form: mean for form, mean in means.items() if mean < geometric_mean(costs[None])}

    def _fastest(self, shape: tuple[int, int], forms: Sequence[Pass], precision: str) -> Pass | None:
        if self.costs is None:
            return forms[0]
        costs = self.costs.milliseconds((*forms, None), shape, precision)
        best: Pass | None = None
        least = np.inf
        for form in forms:
            mean = geometric_mean(costs[form]) if form in costs else np.inf
            if mean * _LEAD < least:
                best, least = form, mean
        return best if least < _ALONE * geometric_mean(costs[None]) else None

    def _damage_of(self, site: LinearSite, form: Pass | None, sample: Floats) -> float:
        """Relative squared error of the operator's outputs on a sample of its inputs ``[rows, K]``."""
        weight = weight_of(site)
        exact = sample @ weight
        lone = lone_model(weight, np.zeros(weight.shape[1], np.float32))
        model = rewritten(lone, form, self.context.target, sample)
        got = exact if model is None else _run(model, sample)
        return float(np.square(got - exact).sum() / max(float(np.square(exact).sum()), 1e-30))


def _sites(model: ir.Model) -> list[LinearSite]:
    sites = [site for site in linear_sites(model) if min(site.shape) >= SMALLEST_SIDE]
    by_path = groupby(sorted(sites, key=lambda site: site.path), key=lambda site: site.path)
    return [next(group) for _, group in by_path]


def _told(form: Pass, option: str, paths: tuple[str, ...]) -> Pass:
    return replace(form, **{option: paths})  # type: ignore[type-var]  # every form is a dataclass with skip and only


def _run(model: ir.Model, sample: Floats) -> Floats:
    with tempfile.TemporaryDirectory(prefix="hasten-damage-") as folder:
        path = Path(folder) / "lone.onnx"
        ir.save(model, path)
        session = Session(path, CPU_PROVIDER, options=SessionOptions())
        try:
            result: Floats = session.run({"x0": sample})["y0"]
        finally:
            session.close()
    return result
