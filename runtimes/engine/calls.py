"""What is asked of an engine and what it answers: plain values."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from numpy.typing import NDArray

from artifacts.errors import UsageError

Method = Literal["embed", "rows", "run"]
Items = Sequence[Any] | Mapping[str, NDArray[Any]]
"""Texts of `embed`, records of `rows`, or arrays by input name of `run`."""

MOST_PRIORITY = 10
_MOST_COUNT = 1 << 40
_MOST_WORKERS = 256


@dataclass(frozen=True)
class Call:
    """How a request is treated.

    Attributes:
        priority: -10 to 10, higher first. A waiting request gains one step each `EngineOptions.aging` seconds.
        timeout: Seconds from now until the answer is worthless: then it is a DeadlineError. A request that cannot be
            answered by then is refused at once. None: there is no hurry.
    """

    priority: int = 0
    timeout: float | None = None

    def __post_init__(self) -> None:
        """Refuse what makes no sense.

        Raises:
            UsageError: The priority is not in [-10, 10], or the timeout is not a positive number.
        """
        if isinstance(self.priority, bool) or not isinstance(self.priority, int) or abs(self.priority) > MOST_PRIORITY:
            raise UsageError(f"the priority is {self.priority!r}", f"Pass a whole number in [-{MOST_PRIORITY}, 10]")
        if self.timeout is not None and not (_is_number(self.timeout) and self.timeout > 0.0):
            raise UsageError(f"the timeout is {self.timeout!r}", "Pass positive seconds, or None")


@dataclass(frozen=True)
class Answer:
    """What an engine answers.

    Attributes:
        arrays: Of `embed` ``{"embedding": float32 [n, d]}``, of `run` the outputs by name; else empty.
        rows: Of `rows`, one JSON-ready object a record; else empty.
        tokens: Tokens of the input, special tokens included; 0 for plain tensors.
        cached: It was taken from the response cache.
    """

    arrays: dict[str, NDArray[Any]]
    rows: list[dict[str, Any]]
    tokens: int
    cached: bool = False


@dataclass(frozen=True)
class Place:
    """Workers of one kind: where they run, and how many.

    Attributes:
        device: ``cpu``, ``cuda``, ``cuda:1``...; None: any.
        provider: Execution provider, full or short name; None: any.
        variant: Id of a variant; None: any.
        workers: Processes; 0: by measurement on a CPU, else one.
        threads: Threads within an operator of each; 0: the cores shared among the workers.
    """

    device: str | None = None
    provider: str | None = None
    variant: str | None = None
    workers: int = 0
    threads: int = 0

    def __post_init__(self) -> None:
        """Refuse what makes no sense.

        Raises:
            UsageError: A count is negative or absurd.
        """
        _counted(self, {"workers": (0, _MOST_WORKERS), "threads": (0, 1024)})


@dataclass(frozen=True)
class EngineOptions:
    """How an engine works. What is left at its default is found out by measurement.

    Attributes:
        workers: Processes; 0: as many as do most on this machine.
        threads: Threads within an operator of each; 0: the cores shared among the workers.
        device: ``cpu``, ``cuda``, ``cuda:1``...; None: any.
        provider: Execution provider, full or short name; None: any.
        variant: Id of a variant; None: any.
        places: Several kinds of workers at once, instead of the five above.
        queue_requests: Most requests that wait; more are refused.
        queue_tokens: Most tokens that wait; more are refused.
        max_batch_tokens: Most tokens of a batch; 0: as many as keep its run short.
        max_delay: Most seconds that a batch waits for company while others keep the engine busy; a lone request never
            waits.
        aging: Seconds of waiting that are worth one step of priority.
        idle_timeout: Seconds without work after which the workers end and their memory is free; the next request
            starts them again. None: never.
        hang_timeout: Seconds without a sign of life after which a worker that has work is replaced.
        slots: Decoders: texts that a worker writes at once; 0: 8, or what memory allows.
        prefix_cache: Decoders: bytes of KV cache kept of earlier prompts, in each worker; 0: none.
        draft: Decoders: bundle of a smaller model of the same tokenizer that guesses how texts go on; None: none.
        pause: Decoders: longest gap in seconds that reading a prompt may put between two tokens of the others.
        cache: Use and write what is kept on this machine of decisions and measurements.
        verify: Hash every file of the bundle before it is used.
    """

    workers: int = 0
    threads: int = 0
    device: str | None = None
    provider: str | None = None
    variant: str | None = None
    places: tuple[Place, ...] = ()
    queue_requests: int = 4096
    queue_tokens: int = 1 << 20
    max_batch_tokens: int = 0
    max_delay: float = 0.0
    aging: float = 1.0
    idle_timeout: float | None = None
    hang_timeout: float = 60.0
    slots: int = 0
    prefix_cache: int = 256 << 20
    draft: str | os.PathLike[str] | None = None
    pause: float = 0.1
    cache: bool = True
    verify: bool = True

    def __post_init__(self) -> None:
        """Refuse what makes no sense.

        Raises:
            UsageError: A number is out of its range, or `places` and what it replaces were both given.
        """
        counts = {"workers": (0, _MOST_WORKERS), "threads": (0, 1024), "slots": (0, 1024)}
        counts |= dict.fromkeys(("queue_requests", "queue_tokens"), (1, _MOST_COUNT))
        counts |= dict.fromkeys(("max_batch_tokens", "prefix_cache"), (0, _MOST_COUNT))
        _counted(self, counts)
        for name, least in (("max_delay", 0.0), ("aging", 1e-3), ("hang_timeout", 0.1), ("pause", 1e-3)):
            value = getattr(self, name)
            if not (_is_number(value) and least <= value < math.inf):
                raise UsageError(f"{name} is {value!r}", f"Pass seconds, at least {least:g}")
        if self.idle_timeout is not None and not (_is_number(self.idle_timeout) and self.idle_timeout > 0.0):
            raise UsageError(f"idle_timeout is {self.idle_timeout!r}", "Pass positive seconds, or None")
        if self.places and self._own != Place():
            raise UsageError("places and one place of workers were both given", "Say it within places")

    @property
    def kinds(self) -> tuple[Place, ...]:
        """`places`, or the one that the other options describe."""
        return self.places or (self._own,)

    @property
    def _own(self) -> Place:
        return Place(self.device, self.provider, self.variant, self.workers, self.threads)


def _counted(owner: object, ranges: Mapping[str, tuple[int, int]]) -> None:
    for name, (least, most) in ranges.items():
        value = getattr(owner, name)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise UsageError(f"{name} is {value!r}", f"Pass a whole number of at least {least} and at most {most}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
