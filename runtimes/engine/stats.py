"""What an engine did so far, as numbers."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

State = Literal["starting", "ready", "idle", "broken", "closed"]
"""``idle``: ended to free its memory; it starts when there is work.
``broken``: it does not load, and is tried now and then."""

BOUNDS = (0.0005, 0.001, 0.002, 0.004, 0.008, 0.015, 0.03, 0.06, 0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
"""Upper bounds in seconds of the buckets of a `Histogram`; the last bucket has none."""


@dataclass(frozen=True)
class Histogram:
    """How often something took how long.

    Attributes:
        bounds: Upper bounds of the buckets in seconds; there is one bucket more than bounds.
        counts: How often, by bucket, not summed up.
        seconds: All of them together.
    """

    bounds: tuple[float, ...] = BOUNDS
    counts: tuple[int, ...] = (0,) * (len(BOUNDS) + 1)
    seconds: float = 0.0


@dataclass(frozen=True)
class WorkerStats:
    """One worker process.

    Attributes:
        pid: Process id; 0: it does not run.
        provider: Execution provider, full name; empty before it is known, as are the next two.
        device: Device.
        variant: Variant of the bundle.
        state: What it is doing.
        throughput: Tokens (of plain tensors: rows) a second while it works, as measured lately; 0: not yet.
        outstanding: Tokens that it was given and did not finish.
        rss: Resident bytes; 0: unknown.
        restarts: How often it was replaced after it died or hung.
        error: Why it ended last; empty: it did not.
        active: Of decoders: texts being written.
        prefix_hits: Of decoders: prompts that began like an earlier one.
        tokens_saved: Of decoders: tokens of prompts that were not read again.
    """

    pid: int
    provider: str
    device: str
    variant: str
    state: State
    throughput: float
    outstanding: int
    rss: int
    restarts: int
    error: str
    active: int = 0
    prefix_hits: int = 0
    tokens_saved: int = 0


@dataclass(frozen=True)
class Stats:
    """What an engine did since it was made.

    Attributes:
        queue_requests: Requests that wait now.
        queue_tokens: Tokens, as estimated, that wait now.
        outstanding: Requests that are at a worker now.
        accepted: Requests that were let in.
        refused: Requests refused because the queue was full or their time too short.
        done: Requests answered.
        failed: Requests that ended with an error, deadlines aside.
        cancelled: Requests that the caller gave up.
        deadline_missed: Requests whose time was over.
        retried: Requests tried again after a worker died or hung.
        restarts: Workers replaced.
        batches: Runs that workers were sent.
        tokens_in: Tokens read, cached answers not counted.
        tokens_out: Tokens written.
        cache_hits: Requests answered from the response cache.
        cache_misses: Requests that could have been and were not.
        queue_seconds: Time from a request's arrival to its start.
        total_seconds: Time from a request's arrival to its end.
        workers: Each worker.
    """

    queue_requests: int = 0
    queue_tokens: int = 0
    outstanding: int = 0
    accepted: int = 0
    refused: int = 0
    done: int = 0
    failed: int = 0
    cancelled: int = 0
    deadline_missed: int = 0
    retried: int = 0
    restarts: int = 0
    batches: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    queue_seconds: Histogram = Histogram()
    total_seconds: Histogram = Histogram()
    workers: tuple[WorkerStats, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


class Timings:
    """Collects a `Histogram`."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS) + 1)
        self._seconds = 0.0

    def add(self, seconds: float) -> None:
        """Count one."""
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self._seconds += seconds

    def histogram(self) -> Histogram:
        """What was counted so far."""
        return Histogram(counts=tuple(self._counts), seconds=self._seconds)


@dataclass
class Counters:
    """The counts of `Stats` as they grow."""

    counts: dict[str, int] = field(default_factory=dict)
    queue_seconds: Timings = field(default_factory=Timings)
    total_seconds: Timings = field(default_factory=Timings)

    def add(self, name: str, number: int = 1) -> None:
        """Count that many of a field of `Stats`."""
        self.counts[name] = self.counts.get(name, 0) + number

    def stats(self, workers: tuple[WorkerStats, ...], now: Mapping[str, int]) -> Stats:
        """All of them, with what is so just now."""
        return Stats(
            **self.counts,
            **now,
            restarts=sum(worker.restarts for worker in workers),
            queue_seconds=self.queue_seconds.histogram(),
            total_seconds=self.total_seconds.histogram(),
            workers=workers,
        )
