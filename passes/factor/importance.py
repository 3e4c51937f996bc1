"""How much an error of each output of a linear site matters, from second moments and the weights that follow.

The unit is the energy of the residual stream: an error e of a value that is added to make z does ``E||e||² / E||z||²``.
An error of what reaches the next site channel by channel, through activations, gates and the averages of attention, is
taken to grow as the value's own variation does from here to there, and goes through that site's weight: with h what
arrives of y and W2 the next weight, ``s_n = var h_n / var y_n · sum_m W2_nm² s2_m``. Where channels are mixed on the
way, as in the scores of attention, the next site's outputs are taken to be off by the part of their variance that y is;
so are results of the graph.

Weights of the outputs of a singular value decomposition are those of Fisher-weighted SVD (Hsu et al., "Language model
compression with weighted low-rank factorization", 2022, arXiv:2207.00112), there from gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from passes.affine import affine_of, matrix_of
from passes.sites import LinearSite
from passes.statistics import Moments

from .flow import Arrival
from .lowrank import Doubles

_TINY = float(np.finfo(np.float32).tiny)
_FLOOR = 1e-4
"""Least weight of an output, in parts of the mean of all of a site."""
_LEAST_VARIANCE = 0.01
"""Of an output, in parts of its mean square."""

Closure = Mapping[LinearSite, tuple[Arrival, ...]]
"""Sites in graph order, with all that they get to; see `Flow.closure`."""


def asked(closure: Closure) -> list[ir.Value]:
    """The values whose moments `importances` reads."""
    values = [site.input for site in closure]
    for site, arrivals in closure.items():
        values += [one.total for one in arrivals if one.total is not None]
        values += [one.part for one in arrivals if one.total is not None and not _is_output(one, site)]
    return list(dict.fromkeys(values))


def importances(closure: Closure, seen: Mapping[str, Moments], *, each: bool) -> dict[ir.Node, Doubles]:
    """What an error of energy 1 of each output does, in parts of the stream's energy, float64 [N], by the site's node.

    Matrices of the closure are read one at a time, the last first.

    Args:
        closure: The sites.
        seen: Moments of the values that `asked` names, by name.
        each: Of each output by itself; else all of a site have their mean, weighted by their variances.
    """
    known: dict[ir.Node, _Known] = {}
    for site in reversed(list(closure)):
        weight, found = matrix_of(site).astype(np.float64), seen[str(site.input.name)]
        energy = _output_variances(weight, found)
        scores = np.zeros(len(energy))
        for arrival in closure[site]:
            effect, whole = _effect(arrival, site, energy, known, seen)
            if arrival.channels is None or effect is None:
                scores += whole / energy.sum()
            else:
                scores += np.bincount(arrival.channels, effect, len(energy)) / energy
        scores = np.maximum(scores, max(_FLOOR * float(scores.mean()), _TINY))
        rows = _variances(found) * (np.square(weight) @ scores)
        known[site.node] = _Known(scores, rows, float(energy @ scores), float(energy @ scores / energy.sum()))
    return {node: one.scores if each else np.full(len(one.scores), one.mean) for node, one in known.items()}


def own_energy(site: LinearSite) -> Doubles:
    """The same where nothing is known of the inputs: an error does damage in parts of the energy of W itself, [N]."""
    squares = float(np.square(matrix_of(site), dtype=np.float64).sum())
    return np.full(site.shape[1], 1.0 / max(squares, _TINY))


@dataclass(frozen=True, eq=False)
class _Known:
    """A site that is done.

    Attributes:
        scores: What an error of energy 1 of each output does, [N].
        rows: What an error as large as what varies of the input does, of each of its channels alone, [K].
        whole: What an error as large as what varies of the output does.
        mean: What an error of energy 1 does that is spread over the outputs as they are.
    """

    scores: Doubles
    rows: Doubles
    whole: float
    mean: float


def _effect(
    arrival: Arrival, site: LinearSite, energy: Doubles, known: Mapping[ir.Node, _Known], seen: Mapping[str, Moments]
) -> tuple[Doubles | None, float]:
    """What an error as large as what varies there does: of each of its channels, where that is known, and of all."""
    if arrival.site is not None:
        done = known[arrival.site.node]
        return done.rows, done.whole
    if arrival.total is None:
        return None, 1.0
    total = float(np.trace(seen[str(arrival.total.name)].second))
    part = energy if _is_output(arrival, site) else _variances(seen[str(arrival.part.name)])
    effect = part / max(total, _TINY)
    return effect, float(effect.sum())


def _output_variances(weight: Doubles, found: Moments) -> Doubles:
    """Of each output, [N]; of one that hardly varies a part of its mean square."""
    squares = np.einsum("kn,kn->n", weight, found.second @ weight)
    variances: Doubles = np.maximum(squares - np.square(found.mean @ weight), _LEAST_VARIANCE * squares)
    return np.maximum(variances, _TINY)


def _variances(found: Moments) -> Doubles:
    """Of each channel, [K]."""
    return np.maximum(np.diagonal(found.second) - np.square(found.mean), 0.0)


def _is_output(arrival: Arrival, site: LinearSite) -> bool:
    """Whether nothing but the bias came between the site and where it is added."""
    affine = affine_of(site)
    return arrival.part is site.output or (affine is not None and arrival.part is affine.output)
