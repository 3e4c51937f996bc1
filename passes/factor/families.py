"""Products of the same inputs on their way to factors: what their ranks would do, and the rewriting."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from passes.base import Refusal
from passes.second_order import damped
from passes.splice import Names, label
from passes.statistics import Moments

from .allocation import WHOLE, Division, Group, curve
from .lowrank import DAMPING, Doubles, Factors, energies, factorize
from .products import Family, put_factors, shift_bias


class FamilyFactors:
    """One family of a graph. What is known of its inputs is read when it is needed, twice, and not held."""

    def __init__(
        self, family: Family, seen: Mapping[str, Moments] | None, importances: Mapping[ir.Node, Doubles]
    ) -> None:
        """Nothing is read yet.

        Args:
            family: The products.
            seen: Second moments of their inputs, by name; None: the inputs count as white.
            importances: The damage that an error of energy 1 of each output does, float64 [N], by the sites' nodes.
        """
        self.family = family
        self._seen = seen
        self._names = [str(value.name) for value in family[0].inputs]
        self._centred = seen is not None and all(product.biased for product in family)
        # H is a mean over the rows of all sites, and the damage of a weight what it does at all of them.
        self._scales = [
            np.sqrt(np.sum([importances[site.node] for site in product.sites], axis=0)) for product in family
        ]

    def group(self, multiple: int, *, joint: bool) -> Group:
        """The ranks there are, with the damage that each does.

        Args:
            multiple: Of which ranks are taken.
            joint: Whether one first factor for all products is an alternative.
        """
        second, _ = self._inputs()
        scaled = self._scaled()
        curves = [curve(energies(one, second), len(one), one.shape[1], multiple, whole=True) for one in scaled]
        if not joint or len(scaled) < 2:
            return [curves]
        together = np.concatenate(scaled, axis=1)
        return [curves, [curve(energies(together, second), len(together), together.shape[1], multiple, whole=False)]]

    def rewrite(self, graph: ir.Graph, names: Names, division: Division) -> int:
        """Put factors in the place of the products that were given a rank; how many sites."""
        if all(rank == WHOLE for rank in division.ranks):
            return 0
        second, means = self._inputs()
        scaled = self._scaled()
        if division.alternative:
            (rank,) = division.ranks
            made = factorize(np.concatenate(scaled, axis=1), second, rank)
            ends = np.cumsum([product.shape[1] for product in self.family])[:-1]
            parts = [Factors(made.first, part) for part in np.split(made.second, ends, axis=1)]
            self._put(graph, names, dict(zip(range(len(parts)), parts, strict=True)), means)
            return sum(len(product.sites) for product in self.family)
        changed = 0
        for number, rank in enumerate(division.ranks):
            if rank != WHOLE:
                self._put(graph, names, {number: factorize(scaled[number], second, rank)}, means)
                changed += len(self.family[number].sites)
        return changed

    def few_rows(self) -> Refusal | None:
        """What to tell where the data has fewer rows than the inputs have channels."""
        if self._seen is None:
            return None
        rows, channels = sum(self._seen[name].rows for name in self._names), self.family[0].shape[0]
        if rows >= channels:
            return None
        reason = f"{rows} rows of calibration data for {channels} channels: what they do not show is kept by chance"
        return Refusal(label(self.family[0].sites[0].node), reason, "compile with more data")

    def _inputs(self) -> tuple[Doubles | None, list[Doubles]]:
        """H over the rows of all sites, damped; about the mean where all have a bias, and then the mean of each."""
        if self._seen is None:
            return None, []
        rows, total, means = 0, np.zeros((self.family[0].shape[0],) * 2), []
        for name in self._names:
            found = self._seen[name]
            rows += found.rows
            total += found.rows * found.second
            if self._centred:
                total -= found.rows * np.outer(found.mean, found.mean)
                means.append(found.mean)
        return damped(total / rows, DAMPING), means

    def _scaled(self) -> list[Doubles]:
        """The weights, each output in units of damage."""
        return [product.matrix() * scale for product, scale in zip(self.family, self._scales, strict=True)]

    def _put(self, graph: ir.Graph, names: Names, made: Mapping[int, Factors], means: list[Doubles]) -> None:
        """Put factors of scaled weights, with one first factor, in the place of the products of these numbers."""
        products = [self.family[number] for number in made]
        first = next(iter(made.values())).first
        seconds = [(one.second / self._scales[number]).astype(np.float32) for number, one in made.items()]
        lost = [product.matrix() - first @ one for product, one in zip(products, seconds, strict=True) if means]
        put_factors(graph, names, products, first, seconds)
        for product, error in zip(products, lost, strict=bool(means)):
            for site, mean in zip(product.sites, means, strict=True):
                shift_bias(graph, names, site, mean @ error)
