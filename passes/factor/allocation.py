"""Which rank each product gets when parameters are given to all of them together. Plain arrays.

A product of rank r costs ``r (K + N)`` parameters and does the damage of the singular values that it leaves out; left
whole it costs ``K N`` and does none. Because of that jump damage is not convex in cost, and a Lagrangian finds only
some of the best divisions. The least sum of damages under a budget is a multiple-choice knapsack (Kellerer, Pferschy &
Pisinger, "Knapsack Problems", 2004, chapter 11), solved exactly by dynamic programming over the budget.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Doubles = NDArray[np.float64]
Ints = NDArray[np.int64]

WHOLE = 0
"""The rank of a product that is left as it is."""
STEPS = 8192
"""Steps that what all cost is divided into, at least."""
_STEPS_EACH = 64


@dataclass(frozen=True, eq=False)
class Curve:
    """The choices that there are for one product, or for several with a common first factor.

    Attributes:
        size: Parameters where it is left as it is: ``K N``.
        ranks: int64 [C], rising; `WHOLE`, where that may be chosen, last.
        costs: Parameters of each, int64 [C].
        damages: What each does, float64 [C]; of one unit for all that are compared.
    """

    size: int
    ranks: Ints
    costs: Ints
    damages: Doubles

    def steps(self, step: int) -> Ints:
        """Costs in steps, rounded up."""
        return -(-self.costs // step)

    def within(self, budget: float) -> int:
        """Place of the highest rank that costs no more; the lowest rank where none does."""
        return max(int(np.count_nonzero((self.costs <= budget) & (self.ranks != WHOLE))) - 1, 0)


@dataclass(frozen=True)
class Division:
    """What one group was given.

    Attributes:
        alternative: Which of its alternatives.
        ranks: Of the curves of that, in their order.
    """

    alternative: int
    ranks: tuple[int, ...]


Group = Sequence[Sequence[Curve]]
"""Alternatives of which one is taken; each is some curves, of all of which a rank is taken."""


def curve(energies: Doubles, rows: int, columns: int, multiple: int, *, whole: bool) -> Curve:
    """The ranks that save parameters, multiples of ``multiple``, with the energy that they leave out.

    Args:
        energies: What each rank takes, largest first, float64 [min(K, N)], in units of damage.
        rows: K.
        columns: N, of all products that have the first factor together.
        multiple: Of which ranks are taken.
        whole: Whether the product may also be left as it is, for no damage.
    """
    most = highest_rank(rows, columns)
    ranks = np.arange(multiple, most + 1, multiple)
    left = np.append(np.cumsum(energies[::-1])[::-1], 0.0)
    costs, damages = ranks * (rows + columns), left[ranks]
    if whole:
        ranks, costs, damages = np.append(ranks, WHOLE), np.append(costs, rows * columns), np.append(damages, 0.0)
    return Curve(rows * columns, ranks, costs, damages)


def highest_rank(rows: int, columns: int) -> int:
    """The largest r for which ``r (K + N) < K N``."""
    return (rows * columns - 1) // (rows + columns)


def proportional(group: Group, ratio: float) -> Division:
    """The alternative of least damage where every curve keeps that share of its own parameters, or its lowest rank.

    Curves without ranks stay whole; an alternative with such is the last to be taken.
    """
    found: list[tuple[bool, float, int, tuple[int, ...]]] = []
    for number, way in enumerate(group):
        if _open(way):
            places = [one.within(ratio * one.size) for one in way]
            ranks = tuple(int(one.ranks[place]) for one, place in zip(way, places, strict=True))
            damage = sum(float(one.damages[place]) for one, place in zip(way, places, strict=True))
            found.append((WHOLE in ranks, damage, number, ranks))
    _, _, number, ranks = min(found)
    return Division(number, ranks)


def allocate(groups: Sequence[Group], budget: int) -> tuple[Division, ...]:
    """The division of least damage that costs no more than the budget; the cheapest there is where none does.

    Costs are counted in steps of their greatest common divisor, or of a part in `STEPS` and more of what all cost
    whole, rounded up, where that is larger.
    """
    step = _step(groups)
    cheapest = sum(
        min(sum(int(one.steps(step).min()) for one in way) for way in group if _open(way)) for group in groups
    )
    table = np.zeros(max(budget // step, cheapest) + 1)
    trace: list[_Trace] = []
    for group in groups:
        tables, picks = [], []
        for way in group:
            here, taken = table, []
            for one in way:
                here, pick = _extended(here, one, step)
                taken.append(pick)
            tables.append(here)
            picks.append(taken)
        table = np.min(tables, axis=0)
        trace.append(_Trace(np.argmin(tables, axis=0), picks))
    place = len(table) - 1
    divisions: list[Division] = []
    for group, behind in zip(reversed(groups), reversed(trace), strict=True):
        division, place = behind.read(group, place, step)
        divisions.append(division)
    return tuple(reversed(divisions))


@dataclass(frozen=True, eq=False)
class _Trace:
    """The choices of one group at each cost: of its alternatives, and of the ranks of each curve of each of them."""

    ways: Ints
    picks: Sequence[Sequence[Ints]]

    def read(self, group: Group, place: int, step: int) -> tuple[Division, int]:
        """What the group was given at a cost, and the cost of the groups before it."""
        way = int(self.ways[place])
        ranks: list[int] = []
        for one, pick in zip(reversed(group[way]), reversed(self.picks[way]), strict=True):
            choice = int(pick[place])
            ranks.append(int(one.ranks[choice]))
            place -= int(one.steps(step)[choice])
        return Division(way, tuple(reversed(ranks))), place


def _extended(table: Doubles, one: Curve, step: int) -> tuple[Doubles, Ints]:
    """The least damage at each cost once one more curve is there, and its choice at each."""
    best, pick = np.full_like(table, np.inf), np.zeros(len(table), np.int64)
    for choice, (cost, damage) in enumerate(zip(one.steps(step), one.damages, strict=True)):
        if cost >= len(table):
            continue
        found = table[: len(table) - cost] + damage
        better = found < best[cost:]
        best[cost:][better] = found[better]
        pick[cost:][better] = choice
    return best, pick


def _step(groups: Sequence[Group]) -> int:
    curves = [one for group in groups for way in group for one in way]
    divisor = math.gcd(*(int(cost) for one in curves for cost in one.costs))
    largest = sum(max(sum(one.size for one in way) for way in group) for group in groups)
    steps = max(STEPS, _STEPS_EACH * len(curves))
    return max(divisor, -(-largest // steps))


def _open(way: Sequence[Curve]) -> bool:
    return all(len(one.costs) for one in way)
