"""The division of a budget against all divisions there are."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from passes.factor.convolution_ranks import STEPS, Choices, divide


def items(seed: int, count: int = 4, choices: int = 4) -> list[Choices]:
    """Each whole at no damage, and cheaper at more of it."""
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        costs = np.sort(generator.integers(1, 1000, choices))[::-1].astype(float)
        damages = np.concatenate([[0.0], np.sort(generator.random(choices - 1))])
        found.append(Choices(costs, damages))
    return found


def total(chosen: list[Choices], picks: tuple[int, ...]) -> tuple[float, float]:
    pairs = list(zip(chosen, picks, strict=True))
    return sum(one.costs[pick] for one, pick in pairs), sum(one.damages[pick] for one, pick in pairs)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("share", [0.4, 0.6, 0.9])
def test_it_is_the_best_division(seed, share):
    chosen = items(seed)
    budget = share * sum(one.costs[0] for one in chosen)
    picks = divide(chosen, budget)
    cost, damage = total(chosen, tuple(picks))
    every = [total(chosen, ways) for ways in product(range(4), repeat=4)]
    least = sum(one.costs.min() for one in chosen)
    if least > budget:
        assert picks == [int(np.argmin(one.costs)) for one in chosen]
        return
    assert cost <= budget
    # Costs are rounded up to steps, each of a 4096th of the budget over the number of items.
    tight = budget * (1 - 1 / STEPS)
    assert damage <= min(lost for spent, lost in every if spent <= tight) + 1e-12


def test_a_budget_for_all_leaves_all_whole():
    chosen = items(20)
    assert divide(chosen, 1.001 * sum(one.costs[0] for one in chosen)) == [0, 0, 0, 0]


@pytest.mark.parametrize("budget", [0.0, -5.0, 1.0])
def test_no_budget_makes_all_as_cheap_as_can_be(budget):
    chosen = items(21)
    assert divide(chosen, budget) == [int(np.argmin(one.costs)) for one in chosen]


def test_nothing_to_divide():
    assert divide([], 10.0) == []
