"""Requests inside an engine, and the bounded queue in which they wait."""

from __future__ import annotations

import asyncio
import math
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from artifacts.errors import OverloadError

from .calls import MOST_PRIORITY, Answer, Call


@dataclass(eq=False)
class Ticket:
    """A request from its arrival to its answer.

    Attributes:
        number: Order of arrival.
        method: What is asked.
        call: How it is to be treated.
        arrived: On the loop's clock, as all times here.
        cost: Tokens of all of it, as estimated.
        aging: Seconds that are worth a step of priority.
        future: What the caller waits for.
        retries: How often a worker died or hung on it.
        death: Which death of a worker was the last that it saw; 0: none.
        avoid: The worker on which that happened last.
        started: When its first part went to a worker.
        expected: Seconds that it was expected to take when it came; 0: nobody asked.
    """

    number: int
    method: str
    call: Call
    arrived: float
    cost: int
    aging: float
    future: asyncio.Future[Any]
    retries: int = 0
    death: int = 0
    avoid: object = None
    started: float | None = None
    expected: float = 0.0
    timer: asyncio.TimerHandle | None = None

    def __post_init__(self) -> None:
        """Fix its place in the queue, which aging does not change: all who wait grow older alike."""
        self.key = (self.arrived - self.call.priority * self.aging, self.number)
        self.left = self.cost

    @property
    def deadline(self) -> float:
        """When its answer is worthless; infinite: never."""
        return math.inf if self.call.timeout is None else self.arrived + self.call.timeout

    @property
    def done(self) -> bool:
        """Answered, failed or given up."""
        return self.future.done()

    def ended(self) -> None:
        """The future has its error now."""


@dataclass(frozen=True, eq=False)
class Part:
    """Items of a request that go to a worker together.

    Attributes:
        work: The request.
        indices: Which of its items.
        cost: Their tokens, as estimated.
    """

    work: Work
    indices: Sequence[int]
    cost: int


@dataclass(eq=False)
class Work(Ticket):
    """A request whose items are computed in batches, in any order.

    Attributes:
        items: Texts, records, or one dict of arrays.
        costs: Tokens of each, as estimated.
        alone: Not to be batched with other requests: it may be what killed a worker.
        form: Requests of one form may be computed together; None: with no other.
    """

    items: Sequence[Any] = ()
    costs: Sequence[int] = ()
    alone: bool = False
    form: Hashable = ""
    tokens: int = 0
    _returned: deque[Part] = field(default_factory=deque)

    def __post_init__(self) -> None:
        """Put the items in order, the longest first: neighbours are of about one length."""
        super().__post_init__()
        count = len(self.items)
        self._order = [0] if count == 1 else sorted(range(count), key=self.costs.__getitem__, reverse=True)
        self._next = 0
        self._open = count
        self._vectors: NDArray[np.float32] | None = None
        self._rows: list[Any] = []
        self._arrays: dict[str, NDArray[Any]] = {}

    @property
    def length(self) -> int:
        """Tokens of the longest item that waits."""
        if self._returned:
            return max(self.costs[index] for index in self._returned[0].indices)
        return self.costs[self._order[self._next]] if self._next < len(self._order) else 0

    def take(self, budget: int) -> Part:
        """The next items of at most that many tokens together, one at least."""
        if self._returned:
            part = self._returned.popleft()
            self.left -= part.cost
            return part
        first, cost = self._next, 0
        while self._next < len(self._order):
            more = self.costs[self._order[self._next]]
            if self._next > first and cost + more > budget:
                break
            cost += more
            self._next += 1
        self.left -= cost
        return Part(self, self._order[first : self._next], cost)

    def give_back(self, part: Part) -> None:
        """A part that was not computed waits again."""
        self._returned.append(part)
        self.left += part.cost

    @property
    def waits(self) -> bool:
        """Whether there are items that were not taken."""
        return bool(self._returned) or self._next < len(self._order)

    def accept_vectors(self, part: Part, vectors: NDArray[np.float32]) -> None:
        """What `embed` made of a part: float32 [items of it, d]."""
        if len(part.indices) == len(self.items):
            # A copy: an answer must not keep the frame of the whole batch.
            self._vectors = np.empty_like(vectors)
        elif self._vectors is None:
            self._vectors = np.empty((len(self.items), vectors.shape[1]), np.float32)
        self._vectors[part.indices] = vectors
        self._open -= len(part.indices)

    def accept_rows(self, part: Part, rows: Sequence[Any]) -> None:
        """What `rows` made of a part."""
        if not self._rows:
            self._rows = [None] * len(self.items)
        for index, row in zip(part.indices, rows, strict=True):
            self._rows[index] = row
        self._open -= len(part.indices)

    def accept_arrays(self, arrays: dict[str, NDArray[Any]]) -> None:
        """What `run` made."""
        self._arrays = arrays
        self._open = 0

    def answer(self) -> Answer | None:
        """The answer; None while parts are missing."""
        if self._open:
            return None
        if self._vectors is not None:
            return Answer({"embedding": self._vectors}, [], self.tokens)
        return Answer(self._arrays, self._rows, self.tokens)


class Waiting:
    """The requests that wait, in the order of ``arrived - priority * aging``; bounded.

    Args:
        requests: Most of them.
        tokens: Most tokens of them together; a single request may have more.
    """

    def __init__(self, requests: int, tokens: int) -> None:
        self._most_requests = requests
        self._most_tokens = tokens
        self._queue: list[Ticket] = []
        self._levels = [0] * (2 * MOST_PRIORITY + 1)

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Ticket]:
        return iter(self._queue)

    @property
    def tokens(self) -> int:
        """Tokens that wait."""
        return sum(self._levels)

    def ahead(self, priority: int) -> int:
        """Tokens that wait and will go before a newcomer of that priority."""
        return sum(self._levels[priority + MOST_PRIORITY :])

    def check(self, cost: int, wait: Callable[[], float]) -> None:
        """Refuse a newcomer for which there is no room; ``wait`` says in how many seconds there may be some.

        Raises:
            OverloadError: There is none.
        """
        if len(self._queue) >= self._most_requests:
            said = f"{len(self._queue)} requests wait already"
        elif self._queue and self.tokens + cost > self._most_tokens:
            said = f"{self.tokens} tokens wait already"
        else:
            return
        retry_after = wait()
        raise OverloadError(said, f"Try again in {retry_after:.1f} s", retry_after=retry_after)

    def add(self, ticket: Ticket) -> None:
        """Let it wait; see `check`."""
        insort(self._queue, ticket, key=_key)
        self._levels[ticket.call.priority + MOST_PRIORITY] += ticket.left

    def remove(self, ticket: Ticket) -> bool:
        """Whether it waited; it does not any more."""
        place = bisect_left(self._queue, ticket.key, key=_key)
        if place == len(self._queue) or self._queue[place] is not ticket:
            return False
        del self._queue[place]
        self._levels[ticket.call.priority + MOST_PRIORITY] -= ticket.left
        return True

    @property
    def head(self) -> Ticket | None:
        """Whose turn it is."""
        return self._queue[0] if self._queue else None


def _key(ticket: Ticket) -> tuple[float, int]:
    return ticket.key
