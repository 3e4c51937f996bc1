"""Which values are observed in one pass over the data, and in batches of what size, so that memory suffices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from artifacts.errors import UsageError
from passes.statistics import BINS, SAMPLE_ROWS

from .batches import Survey
from .footprint import Footprint

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
    """

    values: tuple[int, ...]
    elements: int


def plan(footprint: Footprint, found: Survey, memory: int) -> tuple[Group, ...]:
    """Groups that fit: as few as can be, and then with batches as large as can be.

    Batches are halved before values are divided; only where a single example of the largest kind leaves no room for all
    values are there several groups, and so several passes over the data.

    Args:
        footprint: Of the graph with all values.
        found: The sizes of the examples.
        memory: Bytes that may be taken.

    Raises:
        UsageError: One value and one example do not fit; says what would.
    """
    budget = _Budget(footprint, found, memory)
    every = range(len(footprint.values))
    least = max(budget.need((value,), 1) for value in every)
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
    return tuple(Group(values, budget.largest(values)) for values in groups)


@dataclass(frozen=True)
class _Budget:
    footprint: Footprint
    found: Survey
    memory: int

    def largest(self, values: Sequence[int]) -> int:
        limit = max(examples * elements for examples, elements in self.found.shapes)
        while limit > 1 and self.need(values, limit) > self.memory:
            limit //= 2
        return limit

    def need(self, values: Sequence[int], limit: int) -> float:
        """Bytes at the height of any batch that is cut to so many elements; ``limit`` 1: to single examples."""
        shapes = {
            (min(examples, max(1, limit // elements)), elements)
            for examples, elements in self.found.shapes
        }  # fmt: skip
        run = max(self.footprint.peak(examples, elements, values) for examples, elements in shapes)
        feeds = max(8 * examples * elements for examples, elements in self.found.shapes)
        return self._held() + 2 * feeds + _MARGIN * run

    def _held(self) -> float:
        """What stays for the whole of it: weights, and the statistics of all values."""
        # Limits and totals, the sample with its keys, and once more while a result is copied out.
        statistics = [
            8 * BINS + max(1, channels) * (16 + 4 * SAMPLE_ROWS) + 16 * SAMPLE_ROWS
            for channels in self.footprint.channels
        ]
        return _AROUND + self.footprint.weights + sum(statistics) + max(statistics)
