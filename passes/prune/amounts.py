"""How much of a weight is pruned, and which of its elements given a score for each. Plain arrays, no graph."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Dropped = NDArray[np.bool_]
"""Which elements of a weight become 0."""

_PATTERN = re.compile(r"([0-9]{1,3}):([0-9]{1,3})")


@dataclass(frozen=True)
class Share:
    """A part of all elements, wherever they are.

    Attributes:
        ratio: Between 0 and 1, both excluded.
    """

    ratio: float

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise ValueError(f"ratio is {self.ratio}, not between 0 and 1")

    def count(self, elements: int) -> int:
        """How many of so many elements are pruned."""
        # 0.3 * 2210 is 662.99... and means 663.
        return int(self.ratio * elements + 1e-6)

    def kept_by(self, weight: Floats) -> bool:
        """Whether ``W [K, N]`` has so many zeros already; one a column may be missing."""
        rows, columns = weight.shape
        return bool(weight.size - np.count_nonzero(weight) >= columns * self.count(rows))


@dataclass(frozen=True)
class Pattern:
    """N:M sparsity: of each M elements that follow each other along K, N stay at most.

    Attributes:
        keep: N.
        group: M.
    """

    keep: int
    group: int

    def __post_init__(self) -> None:
        if not 0 < self.keep < self.group <= 64:
            raise ValueError(f"pattern is {str(self)!r}, not n:m with 0 < n < m <= 64")

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}"

    @staticmethod
    def parse(text: str) -> Pattern:
        """The pattern of ``2:4`` and its like.

        Raises:
            ValueError: It is none.
        """
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise ValueError(f"pattern is {text!r}, not n:m with 0 < n < m <= 64")
        return Pattern(int(match[1]), int(match[2]))

    def kept_by(self, weight: Floats) -> bool:
        """Whether ``W [K, N]`` has the pattern, K being a multiple of M."""
        rows, columns = weight.shape
        held = np.count_nonzero(weight.reshape(rows // self.group, self.group, columns), axis=1)
        return bool((held <= self.keep).all())


Amount = Share | Pattern


def lowest(scores: Floats, count: int) -> Dropped:
    """So many elements of the lowest score, bool of the shape of ``scores``; of equal ones any."""
    dropped = np.zeros(scores.size, np.bool_)
    if count:
        dropped[np.argpartition(scores, count - 1, axis=None)[:count]] = True
    return dropped.reshape(scores.shape)


def lowest_of_groups(scores: Floats, pattern: Pattern) -> Dropped:
    """The elements that leave the highest scores of each group of rows, bool [K, N], K a multiple of the group."""
    rows, columns = scores.shape
    groups = scores.reshape(rows // pattern.group, pattern.group, columns)
    return _lowest_along(groups, pattern.group - pattern.keep, axis=1).reshape(rows, columns)


def lowest_of_columns(scores: Floats, count: int) -> Dropped:
    """So many elements of the lowest score of each column, bool [K, N]."""
    return _lowest_along(scores, count, axis=0) if count else np.zeros(scores.shape, np.bool_)


def _lowest_along(scores: Floats, count: int, axis: int) -> Dropped:
    order = np.argpartition(scores, count - 1, axis=axis)
    dropped = np.zeros(scores.shape, np.bool_)
    np.put_along_axis(dropped, np.take(order, np.arange(count), axis=axis), True, axis=axis)
    return dropped
