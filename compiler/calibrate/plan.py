"""Which values are observed in one pass over the data, and in batches of what size, so that memory suffices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from artifacts.errors import UsageError

from .batches import Survey
from .footprint import Footprint
from .segments import WEIGHT_SHARE, weights_at_once
from .statistic import Statistic

_AROUND = 40 * 10**6
"""Bytes for what has no size of its own: ONNX Runtime's code and threads, one chunk of the statistics."""
_MARGIN = 2.0
"""How much more a run may take than its tensors: what the C library keeps between them. At most 1.6 was seen."""
_MB = 10**6


@dataclass(frozen=True)
class Group:
    """Values observed in the same pass.

    Attributes:
        values: Their indices.
        elements: Elements of the feeds of a batch, at most; a single example may have more.
        spare: Bytes of the cap that such a batch leaves at its height.
    """

    values: tuple[int, ...]
    elements: int
    spare: int = 0


def plan(
    footprint: Footprint, found: Survey, memory: int, statistic: Statistic[Any], held: int = 0, workers: int = 1
) -> tuple[Group, ...]:
    """Groups that fit: as few as can be, and then with batches as large as can be.

    Batches are halved before values are divided; only where a single example of the largest kind leaves no room for all
    values, or where their statistics leave none, are there several groups, and so several passes over the data.

    Args:
        footprint: Of the graph with all values.
        found: The sizes of the examples.
        memory: Bytes that may be taken.
        statistic: What is gathered.
        held: Bytes of statistics that are there already.
        workers: Values that are seen at a time, where there are as many.

    Raises:
        UsageError: One value and one example do not fit; says what would.
    """
    budget = _Budget(footprint, found, memory, statistic, held, workers)
    every = range(len(footprint.values))
    least = max(budget.least(value) for value in every)
    if least > memory:
        enough = -(-int(least) // _MB)
        raise UsageError(
            f"calibration needs at least {enough} MB, and may take {memory / _MB:.0f} MB",
            f"Pass --calibration-memory {enough}MB or more",
        )
    groups: list[tuple[int, ...]] = []
    for value in every:
        if groups and budget.need((*groups[-1], value), 1) <= memory:
            groups[-1] = (*groups[-1], value)
        else:
            groups.append((value,))
    return tuple(budget.group(values) for values in groups)


@dataclass(frozen=True)
class _Budget:
    footprint: Footprint
    found: Survey
    memory: int
    statistic: Statistic[Any]
    held: int
    workers: int

    def group(self, values: tuple[int, ...]) -> Group:
        limit = max(examples * elements for examples, elements in self.found.shapes)
        while limit > 1 and self.need(values, limit) > self.memory:
            limit //= 2
        return Group(values, limit, max(0, self.memory - int(self.need(values, limit))))

    def least(self, value: int) -> float:
        """The smallest cap under which one value and one example fit."""
        rest = self._besides_weights((value,), 1)
        # Weights take a part of the cap, more than what one operator has, or all that there are.
        return rest + self._weights(int(rest * WEIGHT_SHARE / (1.0 - WEIGHT_SHARE)) + 1)

    def need(self, values: Sequence[int], limit: int) -> float:
        """Bytes at the height of any batch that is cut to so many elements; ``limit`` 1: to single examples."""
        return self._weights(weights_at_once(self.memory)) + self._besides_weights(values, limit)

    def _weights(self, at_once: int) -> int:
        return min(self.footprint.weights, max(self.footprint.heaviest, at_once))

    def _besides_weights(self, values: Sequence[int], limit: int) -> float:
        shapes = {
            (min(examples, max(1, limit // elements)), elements)
            for examples, elements in self.found.shapes
        }  # fmt: skip
        run = max(self.footprint.peak(examples, elements, values) for examples, elements in shapes)
        return _AROUND + self.held + self._statistics(values) + 2 * self.found.bytes + _MARGIN * run

    def _statistics(self, values: Sequence[int]) -> float:
        """What stays for the whole of a pass: statistics of its values, or of all where results stay."""
        known = self.footprint.channels
        counted = [
            max(1, channels) for channels in (known if self.statistic.stays else [known[value] for value in values])
        ]
        besides = sorted((self.statistic.besides(channels) for channels in counted), reverse=True)
        # Of results that stay, the ones of this pass are not told from the others: the widest are taken.
        at_once = min(self.workers, len(values))
        return sum(self.statistic.held(channels) for channels in counted) + sum(besides[:at_once])
