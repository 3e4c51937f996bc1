"""Ranks under a common budget against exhaustive search."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from passes.factor.allocation import WHOLE, Curve, Division, Group, allocate, curve, proportional

RNG = np.random.default_rng(7)


def random_curve(rows: int, columns: int, multiple: int = 4, *, whole: bool = True) -> Curve:
    energies = np.sort(RNG.exponential(size=min(rows, columns)))[::-1] * RNG.uniform(0.1, 3)
    return curve(energies, rows, columns, multiple, whole=whole)


def every(groups: list[Group]) -> list[tuple[int, float]]:
    """Cost and damage of every division there is."""
    found = [(0, 0.0)]
    for group in groups:
        choices = [
            (
                sum(int(one.costs[i]) for one, i in zip(way, chosen, strict=True)),
                sum(float(one.damages[i]) for one, i in zip(way, chosen, strict=True)),
            )
            for way in group
            for chosen in product(*(range(len(one.costs)) for one in way))
        ]
        found = [(cost + more, damage + worse) for cost, damage in found for more, worse in choices]
    return found


def told(groups: list[Group], divisions: tuple[Division, ...]) -> tuple[int, float]:
    """Cost and damage of what was allocated."""
    cost, damage = 0, 0.0
    for group, division in zip(groups, divisions, strict=True):
        for one, rank in zip(group[division.alternative], division.ranks, strict=True):
            (place,) = np.flatnonzero(one.ranks == rank)
            cost, damage = cost + int(one.costs[place]), damage + float(one.damages[place])
    return cost, damage


def test_a_curve_holds_ranks_that_save_and_the_energy_left_out():
    found = curve(np.array([8.0, 4.0, 2.0, 1.0, 0.5, 0.25]), 6, 12, 1, whole=True)
    # 4 * 18 = 72 saves nothing of 6 * 12.
    assert found.ranks.tolist() == [1, 2, 3, WHOLE]
    assert found.costs.tolist() == [18, 36, 54, 72]
    assert found.damages.tolist() == [7.75, 3.75, 1.75, 0.0]
    assert curve(np.ones(6), 6, 12, 2, whole=False).ranks.tolist() == [2]
    assert curve(np.ones(6), 6, 12, 4, whole=True).ranks.tolist() == [WHOLE]


@pytest.mark.parametrize("share", [0.35, 0.6, 0.8, 0.95])
def test_nothing_within_the_budget_does_less_damage(share):
    for _ in range(5):
        groups: list[Group] = [
            [[random_curve(24, 24)]],
            [[random_curve(24, 40)]],
            [[random_curve(16, 24), random_curve(16, 24)], [random_curve(16, 48, whole=False)]],
        ]
        budget = int(share * (24 * 24 + 24 * 40 + 2 * 16 * 24))
        cost, damage = told(groups, allocate(groups, budget))
        assert cost <= budget
        assert damage == pytest.approx(min(worse for spent, worse in every(groups) if spent <= budget))


def test_one_way_for_many():
    """Where a common first factor does less damage it is taken, and else not."""
    apart = [curve(np.pad([5.0, 1.0, 1.0, 1.0], (0, 12)), 16, 32, 1, whole=True) for _ in range(2)]
    good, bad = (curve(np.pad([9.0, 6.0, 1.0, left], (0, 12)), 16, 64, 1, whole=False) for left in (0.01, 5.0))
    # Of 300 parameters 3 directions for all at 80 each, or 3 for each at 48, which leave 2.
    assert allocate([[apart, [good]]], 300) == (Division(1, (3,)),)
    assert allocate([[apart, [bad]]], 300)[0].alternative == 0


def test_a_budget_that_nothing_keeps_gets_the_cheapest():
    groups: list[Group] = [[[random_curve(24, 24)]], [[random_curve(3, 3)]]]
    assert groups[1][0][0].ranks.tolist() == [WHOLE]
    assert allocate(groups, 10) == (Division(0, (4,)), Division(0, (WHOLE,)))


def test_a_budget_for_all_leaves_all_whole():
    groups: list[Group] = [[[random_curve(24, 24)]], [[random_curve(24, 40)]]]
    assert [division.ranks for division in allocate(groups, 24 * 24 + 24 * 40)] == [(WHOLE,), (WHOLE,)]


def test_costs_without_a_common_divisor_keep_the_budget():
    groups: list[Group] = [[[random_curve(977, 211 + 2 * index, 5)]] for index in range(40)]
    total = sum(977 * (211 + 2 * index) for index in range(40))
    for share in (0.5, 0.8):
        cost, _ = told(groups, allocate(groups, int(share * total)))
        # Each of the 40 costs is rounded up to a step, of which there are more than 8192.
        assert share * total * (1 - 0.01) - 40 * total / 8192 <= cost <= share * total


def test_proportional_ranks():
    groups: Group = [[curve(np.ones(24), 24, 24, 1, whole=True), curve(np.ones(24), 24, 48, 1, whole=True)]]
    assert proportional(groups, 0.8) == Division(0, (9, 12))
    assert proportional(groups, 0.001) == Division(0, (1, 1))
    together: Group = [*groups, [curve(np.append(np.ones(20), np.zeros(4)), 24, 72, 1, whole=False)]]
    # 0.8 * 24 * 72 // 96 = 14: of 20 it leaves 6, the two above 15 and 12.
    assert proportional(together, 0.8) == Division(1, (14,))
