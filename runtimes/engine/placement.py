"""How long a worker takes, learned from what it did, and which worker is done soonest."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Protocol, TypeVar

RUN_SECONDS = 0.05
"""Longest run of a batch: whoever comes meanwhile waits that long."""
URGENT_SECONDS = 0.005
"""The same where more urgent requests come, or go along with less urgent ones."""
LEAST_TOKENS = 256
"""A batch of so many tokens is large enough for a CPU."""

_MEMORY = 0.97
_PLANNED = 0.75
_EVEN = 1e-6
_OVERHEAD = 0.1
_GROWTH = 2
_MOST_TOKENS = 1 << 20
_HASTE = 0.9
_LEAST_FACTOR, _MOST_EXCESS = 1.1, 9.0
_HALF_LIFE = 5.0
_SHARE = 0.95
_STEP = 0.1
_GRAIN = 0.001


class Speed:
    """Seconds of a run as ``fixed + each * tokens``: least squares over the runs seen, the latest weighing most.

    Attributes:
        line: (fixed seconds of a run, seconds a token), both at least 0.
    """

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self._largest = 0.0
        self.line = (0.0, 0.0)

    @property
    def known(self) -> bool:
        """Whether a run was seen."""
        return self._weight > 0.0

    def add(self, tokens: int, seconds: float) -> None:
        """A run was seen."""
        x = float(tokens)
        self._weight = self._weight * _MEMORY + 1.0
        self._x = self._x * _MEMORY + x
        self._y = self._y * _MEMORY + seconds
        self._xx = self._xx * _MEMORY + x * x
        self._xy = self._xy * _MEMORY + x * seconds
        self._largest = max(self._largest * _MEMORY, x)
        self.line = self._fitted()

    def _fitted(self) -> tuple[float, float]:
        spread = self._weight * self._xx - self._x * self._x
        mean = self._y / self._x if self._x else 0.0
        if spread <= _EVEN * self._weight * self._xx:  # All runs of one size: nothing tells what is fixed.
            return 0.0, mean
        each = (self._weight * self._xy - self._x * self._y) / spread
        fixed = (self._y - each * self._x) / self._weight
        if each <= 0.0:
            return self._y / self._weight, 0.0
        return (fixed, each) if fixed > 0.0 else (0.0, mean)

    def seconds(self, tokens: int) -> float:
        """What a run of that many tokens will take; 0 where nothing was seen."""
        fixed, each = self.line
        return fixed + each * tokens

    def budget(self, longest: float) -> int:
        """Tokens of a batch: so many that what is fixed is a tenth of it, and no more than `within` says."""
        fixed, each = self.line
        if not self.known:
            return LEAST_TOKENS
        worthwhile = max(LEAST_TOKENS, int(fixed / (_OVERHEAD * each))) if each > 0.0 else _MOST_TOKENS
        return min(worthwhile, self.within(longest))

    def within(self, longest: float) -> int:
        """Tokens of a run of at most so many seconds, one at least.

        Where what is fixed takes more than half of them, as many as make it half of the run: smaller batches would
        only make the queue longer.
        """
        fixed, each = self.line
        room = max(longest - fixed, fixed)
        fitting = int(room / each) if each > 0.0 else _MOST_TOKENS
        return max(1, min(self.foreseen(fitting), _MOST_TOKENS))

    def foreseen(self, tokens: int) -> int:
        """That many, but no more than a few times what was seen: nobody knows how the line goes on."""
        return min(tokens, _GROWTH * max(LEAST_TOKENS, int(self._largest)))

    def rate(self, tokens: int) -> float:
        """Tokens a second in batches of that many; 0 where nothing was seen."""
        seconds = self.seconds(tokens)
        return tokens / seconds if seconds > 0.0 else 0.0


class Trust:
    """How far expected times fell short: the factor that 19 of 20 requests lately stayed below, 1.1 at least.

    It is forgotten with time, so that who refused everybody tries again.
    """

    def __init__(self) -> None:
        self._excess = 0.0
        self._learned = time.monotonic()

    def learn(self, expected: float, seconds: float) -> None:
        """A request was expected to take that long, and took so many seconds."""
        factor = self._factor()
        step = _STEP * factor
        beyond = seconds > factor * (expected + _GRAIN)
        factor += _SHARE * step if beyond else (_SHARE - 1.0) * step
        self._excess = min(max(factor - _LEAST_FACTOR, 0.0), _MOST_EXCESS)
        self._learned = time.monotonic()

    def seconds(self, expected: float) -> float:
        """What to reckon with."""
        return self._factor() * (expected + _GRAIN)

    def late(self, expected: float, timeout: float) -> bool:
        """Whether to reckon with more than may be planned with: what comes and goes takes time on its way, too."""
        return self.seconds(expected) > _PLANNED * timeout

    def _factor(self) -> float:
        return _LEAST_FACTOR + self._excess * math.exp2((self._learned - time.monotonic()) / _HALF_LIFE)


class Placed(Protocol):
    """A worker as placement sees it."""

    def finish(self, tokens: int) -> float:
        """Seconds until it would be done with that many tokens more."""
        ...


W = TypeVar("W", bound=Placed)


def choose(free: Sequence[W], busy: Sequence[W], tokens: int, backlog: int) -> W | None:
    """The worker that is done soonest; None: waiting for a busy one is sooner.

    Args:
        free: Workers that take a batch now.
        busy: Workers that take one later.
        tokens: Of the batch.
        backlog: Tokens that wait in all: a busy worker does them first.
    """
    if not free:
        return None
    best = min(free, key=lambda worker: worker.finish(tokens))
    soonest = best.finish(tokens)
    if any(worker.finish(backlog) < _HASTE * soonest for worker in busy):
        return None
    return best
