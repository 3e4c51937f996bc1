"""Which linear operator takes which form: the fastest by measured cost; where quality misses, the worst give back."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import groupby
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


@dataclass(frozen=True)
class Assignment:
    """A form for each linear operator.

    Attributes:
        forms: Module path -> form; None: as it is.
    """

    forms: Mapping[str, Pass | None]

    def without(self, paths: Sequence[str]) -> Assignment:
        """The same with these operators left as they are."""
        return Assignment({path: None if path in paths else form for path, form in self.forms.items()})

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

    def ranked(self, model: ir.Model, assignment: Assignment) -> tuple[str, ...]:
        """Paths of the operators that were given a form, those first whose outputs it damages most."""
        sites = {site.path: site for site in _sites(model) if assignment.forms.get(site.path) is not None}
        observe = self.context.observe
        if observe is None:
            return tuple(sites)
        values = list(dict.fromkeys(needed(site.node.inputs[0]) for site in sites.values()))
        seen = observe(model, values)
        damages: dict[str, float] = {}
        for path, site in sites.items():
            form = assignment.forms[path]
            sample = seen[str(needed(site.node.inputs[0]).name)].sample
            damages[path] = self._damage_of(site, form, sample) if form is not None else 0.0
        return tuple(sorted(damages, key=lambda path: -damages[path]))

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

    def _damage_of(self, site: LinearSite, form: Pass, sample: Floats) -> float:
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
