"""Which channels of the input of a product to remove, what that costs, and how the others make up for them.

Plain arrays, no graph. For inputs a of second moment ``H = E[a a^T]`` and weights W, removing the rows S and adding
``H_KK^-1 H_KS W_S`` to the rows K that stay leaves the least mean squared error there is, the Schur complement
``tr(W_S^T ([H^-1]_SS)^-1 W_S)``. Removing one part after the other, each time the cheapest given those that are gone
(optimal brain surgeon, Hassibi & Stork, 1993; of structures: Kurtic, Frantar & Alistarh, ZipLM, 2023,
arXiv:2302.04089) gives an order whose every beginning is a good set of its size, and whose costs add up to its error.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from passes.second_order import Doubles, Floats

Indices = NDArray[np.intp]

_AT_ONCE = 512
"""Of so many parts one is removed at a time, of twice as many two, and so on."""


@dataclass(frozen=True, eq=False)
class Removal:
    """Parts of the channels in the order in which they go.

    Attributes:
        order: Indices of the parts, [rounds, parts that go together].
        damage: Mean squared error of the product after 0, 1, … rounds, float64 [rounds + 1].
    """

    order: Indices
    damage: Doubles

    def kept(self, rounds: int, count: int) -> Indices:
        """The parts that stay of ``count`` after so many rounds, ascending."""
        return np.setdiff1d(np.arange(count), self.order[:rounds])


def repaired_removal(second: Doubles, weight: Floats, count: int, rounds: int, clusters: int = 1) -> Removal:
    """The order in which parts go where those that stay make up for them.

    Args:
        second: H, float64 [K, K], positive definite.
        weight: W, float32 [K, N].
        count: Parts; part i is the channels from ``i K / count`` on, K being a multiple.
        rounds: How many to order: in each goes one part of each cluster. Fewer than ``count / clusters``.
        clusters: Runs of neighbouring parts, equally long.

    Raises:
        numpy.linalg.LinAlgError: H is not positive definite.
    """
    surgeon = _Surgeon(second, weight, count)
    each, step = count // clusters, max(1, count // _AT_ONCE) if clusters == 1 else 1
    order: list[Indices] = []
    damage = [0.0]
    while len(order) < rounds:
        size = min(step, rounds - len(order))
        costs = surgeon.costs()
        chosen = np.argpartition(costs[:each], size - 1)[:size]
        chosen = chosen[np.argsort(costs[chosen], kind="stable")]
        shares = costs[chosen] / max(float(costs[chosen].sum()), np.finfo(float).tiny)
        total = surgeon.remove(chosen)
        together = [chosen]
        for cluster in range(1, clusters):
            within = surgeon.costs()[cluster * each : (cluster + 1) * each]
            together.append(np.array([cluster * each + int(within.argmin())]))
            total += surgeon.remove(together[-1])
        order.extend(np.stack(together, axis=1))
        damage.extend(damage[-1] + total * np.cumsum(shares if clusters == 1 else np.ones(1)))
    return Removal(np.array(order, np.intp).reshape(-1, clusters), np.array(damage))


def plain_removal(second: Doubles, weight: Floats, count: int, rounds: int, clusters: int = 1) -> Removal:
    """The order in which parts go where those that stay are left as they are: greedy for ``tr(W_S^T H_SS W_S)``.

    Args: As for `repaired_removal`; H need not be definite.
    """
    wide = weight.astype(np.float64)
    width, each = len(wide) // count, count // clusters
    met = (second * (wide @ wide.T)).reshape(count, width, count, width).sum(axis=(1, 3))
    costs = np.diagonal(met).copy()
    order = np.empty((rounds, clusters), np.intp)
    damage = np.zeros(rounds + 1)
    for turn in range(rounds):
        damage[turn + 1] = damage[turn]
        for cluster in range(clusters):
            part = cluster * each + int(costs[cluster * each : (cluster + 1) * each].argmin())
            damage[turn + 1] += costs[part]
            costs += 2 * met[part]
            costs[part] = np.inf
            order[turn, cluster] = part
    return Removal(order, damage)


def repaired(second: Doubles, weight: Floats, kept: Indices) -> Floats:
    """The rows that stay, so that ``E|a W - a_K V|^2`` is least: ``W_K + H_KK^-1 H_KS W_S``, float32 [len(kept), N].

    Args:
        second: H, float64 [K, K], positive definite.
        weight: W, float32 [K, N].
        kept: Rows that stay, ascending.

    Raises:
        numpy.linalg.LinAlgError: H is not positive definite.
    """
    gone = np.setdiff1d(np.arange(len(weight)), kept)
    lower = np.linalg.cholesky(second[np.ix_(kept, kept)])
    right = second[np.ix_(kept, gone)] @ weight[gone].astype(np.float64)
    return np.asarray(weight[kept] + np.linalg.solve(lower.T, np.linalg.solve(lower, right)), np.float32)


def allocated(damages: Sequence[Doubles], sizes: Sequence[float], wanted: float) -> list[int]:
    """How many steps to take of each curve so that the damage is least and the sizes freed add up to ``wanted``.

    Takes the step that damages least for what it frees, again and again: exact where the curves are convex, which the
    costs of a greedy order nearly are. Ends as near to ``wanted`` as a step comes.

    Args:
        damages: Of each curve: after 0, 1, … steps, float64; comparable with each other.
        sizes: What a step of each frees.
        wanted: What is to be freed.
    """
    counts = [0] * len(damages)
    heap = [(_slope(damages[index], 0, sizes[index]), index) for index in range(len(damages))]
    heap = [item for item in heap if item[0] < np.inf]
    heapq.heapify(heap)
    freed = 0.0
    while heap:
        slope, index = heapq.heappop(heap)
        if freed + sizes[index] / 2 > wanted:
            continue
        counts[index] += 1
        freed += sizes[index]
        following = max(slope, _slope(damages[index], counts[index], sizes[index]))
        if following < np.inf:
            heapq.heappush(heap, (following, index))
    return counts


def _slope(damage: Doubles, step: int, size: float) -> float:
    """Damage of the next step for each unit that it frees; infinite where there is none."""
    return float(damage[step + 1] - damage[step]) / size if step + 1 < len(damage) else np.inf


class _Surgeon:
    """The inverse of what is left of H, and the weights as they have made up for what is gone."""

    def __init__(self, second: Doubles, weight: Floats, count: int) -> None:
        lower = np.linalg.cholesky(second)
        half = np.linalg.solve(lower, np.eye(len(second)))
        self._inverse: Doubles = half.T @ half
        self._rows: Doubles = weight.astype(np.float64)
        self._count, self._width = count, len(second) // count
        self._there = np.ones(count, bool)

    def costs(self) -> Doubles:
        """Squared error that each part would add now, float64 [count]; infinite for those that are gone."""
        count, width = self._count, self._width
        rows = self._rows.reshape(count, width, -1)
        if width == 1:
            costs = np.square(rows[:, 0]).sum(axis=1) / np.diagonal(self._inverse)
        else:
            blocks = np.einsum("iaib->iab", self._inverse.reshape(count, width, count, width))
            costs = (rows * np.linalg.solve(blocks, rows)).sum(axis=(1, 2))
        found: Doubles = np.where(self._there, costs, np.inf)
        return found

    def remove(self, parts: Indices) -> float:
        """Take parts out; the squared error that this adds."""
        channels = (parts[:, None] * self._width + np.arange(self._width)).reshape(-1)
        block = self._inverse[np.ix_(channels, channels)]
        columns = self._inverse[:, channels].copy()
        gone = self._rows[channels]
        solved = np.linalg.solve(block, np.concatenate([gone, columns.T], axis=1))
        outputs = gone.shape[1]
        cost = float((gone * solved[:, :outputs]).sum())
        self._rows -= columns @ solved[:, :outputs]
        self._inverse -= columns @ solved[:, outputs:]
        self._rows[channels] = 0
        self._inverse[channels], self._inverse[:, channels] = 0, 0
        self._inverse[channels, channels] = 1
        self._there[parts] = False
        return cost
