"""Removing channels that products read: how many of each is decided over all of them, then they are refitted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from passes.affine import affine_of, constant_floats, revise
from passes.base import Context, Outcome, Refusal
from passes.second_order import Doubles, Floats, damped
from passes.splice import Names, label
from passes.statistics import Moments
from passes.surgery import is_operator, only_user

from .importance import Indices, Removal, allocated, plain_removal, repaired, repaired_removal
from .structure import Lane, mark

DAMPING = 1e-3
"""Part of the mean of H's diagonal that is added to it: how far weights are held to what they were."""
_REACH = 2.0
"""How many times its share one product may lose, where the shares follow the damage: what is predicted of one product
alone says less and less of the whole model the more of it goes."""


Shrink = Callable[[Indices, Floats | None], None]


@dataclass(frozen=True, eq=False)
class Structure:
    """Channels of one product that may be removed in parts.

    Attributes:
        node: The node that is named in messages, and marked.
        lane: The channels, as the product reads them.
        parts: How many parts they have; a multiple of ``clusters``.
        clusters: Runs of neighbouring parts that lose equally many.
        step: Rounds that are taken at once: each takes one part of each cluster.
        size: Weights that a round frees.
        shrink: Rewrites the graph, given the parts that stay, ascending, and the new rows of the products that read
            them; None where these stay as they are.
    """

    node: ir.Node
    lane: Lane
    parts: int
    clusters: int
    step: int
    size: float
    shrink: Shrink

    @property
    def rounds(self) -> int:
        """How many rounds there are, the last of which would leave nothing."""
        return self.parts // self.clusters


@dataclass(frozen=True)
class Amount:
    """How much is removed.

    Attributes:
        ratio: Part of all channels.
        repair: The rows that stay are fitted anew.
        uniform: Each product loses its share; else those lose more whose error is less.
    """

    ratio: float
    repair: bool
    uniform: bool

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio is {self.ratio}, not between 0 and 1")


def prune_structures(
    model: ir.Model, context: Context, structures: Sequence[Structure], amount: Amount, what: str, names: Names
) -> Outcome:
    """Remove the channels whose loss costs least, those that stay making up for them.

    Args:
        model: Changed in place.
        context: Lends second moments: of what the products read, and of the sums that they are added to.
        structures: Not pruned yet.
        amount: How much of them.
        what: Of the marks that the nodes get.
        names: Of the graph.

    Returns:
        How many structures lost channels; refused where there are no moments. Told: fewer rows seen than channels.
    """
    if not structures:
        return Outcome(0)
    if context.moments is None:
        return Outcome(0, (Refusal("", f"pruning {what} needs calibration data", "Compile with data"),))
    streams = {structure: _stream(structure.lane) for structure in structures}
    asked = [structure.lane.read for structure in structures] + [
        value for value in streams.values() if value is not None
    ]
    seen = context.moments(model, list(dict.fromkeys(asked)))
    reads = {structure: str(structure.lane.read.name) for structure in structures}
    energies = {
        name: _energy(seen, name) for name in {str(value.name) for value in streams.values() if value is not None}
    }
    refused: list[Refusal] = []
    removals: list[Removal] = []
    for structure in structures:
        stream = streams[structure]
        moments = seen[reads[structure]]
        removals.append(_removal(structure, moments, amount, None if stream is None else energies[str(stream.name)]))
        if moments.rows < len(moments.second):
            reason = f"calibration saw {moments.rows} rows for {len(moments.second)} channels: the fit leans on damping"
            refused.append(Refusal(label(structure.node), reason, "Give more calibration data"))
    counts = _counts(structures, removals, amount)
    if not any(counts):
        reason = f"{amount.ratio:g} of what is there is less than a step"
        return Outcome(0, (*refused, Refusal("", reason, "Raise the ratio")))
    for structure, removal, count in zip(structures, removals, counts, strict=True):
        mark(structure.node, what, structure.parts)
        if count:
            kept = removal.kept(count, structure.parts)
            matrix = _refit(model.graph, names, structure, seen[reads[structure]], kept) if amount.repair else None
            structure.shrink(kept, matrix)
    return Outcome(sum(count > 0 for count in counts), tuple(refused))


def _stream(lane: Lane) -> ir.Value | None:
    """The sum that the product is added to; None where it is none."""
    affine = affine_of(lane.sinks[0])
    user = None if affine is None else only_user(affine.output)
    return user.outputs[0] if user is not None and is_operator(user, "Add") else None


def _energy(seen: Mapping[str, Moments], name: str) -> float:
    return float(np.trace(seen[name].second))


def _biases(lane: Lane) -> list[Floats] | None:
    """The constant biases of all sinks; None where one has none."""
    found = []
    for site in lane.sinks:
        affine = affine_of(site)
        bias = None if affine is None else constant_floats(affine.bias, site.shape[1])
        if bias is None:
            return None
        found.append(bias)
    return found


def _matrix(lane: Lane, moments: Moments) -> Doubles:
    """What errors are measured with: the second moment, about the mean where biases make up for that; damped."""
    second = moments.second
    if _biases(lane) is not None:
        second = second - np.outer(moments.mean, moments.mean)
    return damped(second, DAMPING)


def _removal(structure: Structure, moments: Moments, amount: Amount, energy: float | None) -> Removal:
    """The order in which the parts go; the damage in parts of the energy of what the product is added to."""
    reach = amount.ratio if amount.uniform else min(1.0, _REACH * amount.ratio)
    steps = max(1, int(reach * structure.rounds / structure.step + (0.5 if amount.uniform else 0)))
    rounds = min(steps, (structure.rounds - 1) // structure.step) * structure.step
    weight = structure.lane.matrix()
    if amount.repair:
        second = _matrix(structure.lane, moments)
        removal = repaired_removal(second, weight, structure.parts, rounds, structure.clusters)
    else:
        removal = plain_removal(moments.second, weight, structure.parts, rounds, structure.clusters)
    if energy is None:
        energy = float(np.einsum("kn,kn->", moments.second @ weight, weight))
    return Removal(removal.order, removal.damage / max(energy, np.finfo(float).tiny))


def _counts(structures: Sequence[Structure], removals: Sequence[Removal], amount: Amount) -> list[int]:
    """Rounds of each structure."""
    if amount.uniform:
        return [
            min(len(removal.order), round(amount.ratio * structure.rounds / structure.step) * structure.step)
            for structure, removal in zip(structures, removals, strict=True)
        ]
    damages = [one.damage[:: structure.step] for structure, one in zip(structures, removals, strict=True)]
    sizes = [structure.size * structure.step for structure in structures]
    wanted = amount.ratio * sum(structure.size * structure.rounds for structure in structures)
    steps = allocated(damages, sizes, wanted)
    return [count * structure.step for count, structure in zip(steps, structures, strict=True)]


def _refit(graph: ir.Graph, names: Names, structure: Structure, moments: Moments, kept: Indices) -> Floats:
    """The rows that stay, fitted anew, and the biases with them."""
    lane = structure.lane
    weight = lane.matrix()
    width = len(weight) // structure.parts
    rows: Indices = (kept[:, None] * width + np.arange(width)).reshape(-1)
    matrix = repaired(_matrix(lane, moments), weight, rows)
    biases = _biases(lane)
    if biases is not None:
        shift = moments.mean @ weight - moments.mean[rows] @ matrix
        shifts = np.split(shift, np.cumsum([len(bias) for bias in biases])[:-1])
        for site, bias, part in zip(lane.sinks, biases, shifts, strict=True):
            affine = affine_of(site)
            use = None if affine is None else affine.bias_use
            if use is not None:
                revise(graph, names, use, np.asarray(bias + part, np.float32))
    return matrix
