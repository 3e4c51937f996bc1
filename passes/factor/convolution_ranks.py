"""Which of several costs each convolution is given, so that all together do the least harm. Plain arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .regression import Doubles

STEPS = 4096
"""Steps of the budget that costs are counted in."""


@dataclass(frozen=True, eq=False)
class Choices:
    """What one convolution may become.

    Attributes:
        costs: Multiply-adds of each choice, float64 [C].
        damages: What each does, float64 [C], in a unit that all convolutions share.
    """

    costs: Doubles
    damages: Doubles


def divide(items: Sequence[Choices], budget: float) -> list[int]:
    """The choice for each of least summed damage within the budget; the cheapest of each where none is within.

    A knapsack with several choices of which one is taken (Kellerer, Pferschy & Pisinger, "Knapsack Problems", 2004,
    chapter 11), solved by dynamic programming over costs in steps, rounded up.
    """
    cheapest = [int(np.argmin(item.costs)) for item in items]
    if sum(float(item.costs.min()) for item in items) > budget or budget <= 0:
        return cheapest
    step = budget / (STEPS * max(1, len(items)))
    table = np.zeros(int(budget / step) + 1)
    picks = []
    for item in items:
        best, pick = np.full_like(table, np.inf), np.full(len(table), -1)
        for choice, (cost, damage) in enumerate(zip(item.costs, item.damages, strict=True)):
            steps = int(np.ceil(cost / step))
            if steps >= len(table):
                continue
            found = table[: len(table) - steps] + damage
            better = found < best[steps:]
            best[steps:][better] = found[better]
            pick[steps:][better] = choice
        table = best
        picks.append((pick, np.ceil(item.costs / step).astype(np.int64)))
    place, chosen = len(table) - 1, []
    if not np.isfinite(table[place]):  # what fits does so by less than the steps
        return cheapest
    for pick, steps_of in reversed(picks):
        choice = int(pick[place])
        chosen.append(choice)
        place -= int(steps_of[choice])
    return chosen[::-1]
