"""What a response cache does, whatever it keeps its values in."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import asdict, dataclass
from typing import Protocol

from .front import Front
from .seal import seal, unseal

_LOG = logging.getLogger("hasten.responses")
_FRONT_BYTES = 16 << 20
_WAITING_BYTES = 64 << 20
_UNSEEN = 60.0
_FIRST_REST = 0.25
_LONGEST_REST = 15.0


@dataclass(frozen=True)
class CacheStats:
    """What a cache did since it was opened.

    Attributes:
        hits: Requests answered from it, those that waited for an equal one included.
        misses: Requests that had to be computed.
        errors: Failures of the store, and damaged values; each request was served all the same.
        bytes: Bytes held: on disk by all who share the folder; of Redis only what this process holds in memory.
        entries: Values held, likewise.
        working: Whether the store can be reached.
    """

    hits: int
    misses: int
    errors: int
    bytes: int
    entries: int
    working: bool = True

    def to_dict(self) -> dict[str, object]:
        """As JSON."""
        return asdict(self)


class ResponseCache(Protocol):
    """Answers by the key of their request, see `request_key`. One event loop uses it; no method fails for its store."""

    async def get(self, key: str) -> bytes | None:
        """The value kept under a key, or None."""

    async def put(self, key: str, value: bytes) -> None:
        """Keep a value."""

    async def single(self, key: str, make: Callable[[], Awaitable[bytes]]) -> tuple[bytes, bool]:
        """The value kept, or the one that ``make`` gives, which is kept then; of equal requests one is computed.

        Returns:
            The value, and whether it was there already or came from an equal request that was being computed.

        Raises:
            BaseException: What ``make`` raises. It is not kept: one of the requests that waited computes instead.
        """

    def stats(self) -> CacheStats:
        """What it did so far."""

    async def close(self) -> None:
        """Write what is still to be written, and let go of the store. Calling it again does nothing."""


class Store(Protocol):
    """Where sealed values are kept. Every method may fail in any way."""

    def __str__(self) -> str: ...

    async def load(self, key: str) -> bytes | None:
        """The sealed value, or None."""

    async def save(self, key: str, sealed: bytes) -> None:
        """Keep a sealed value."""

    async def probe(self) -> None:
        """Fails if values can not be kept at present."""

    async def close(self) -> None:
        """Let go of it."""

    def held(self) -> tuple[int, int] | None:
        """(bytes, values) as last seen; None if that is not for this process to know."""


class _Flight:
    """One computation that equal requests wait for. ``value`` stays None if it failed."""

    def __init__(self) -> None:
        self.done = asyncio.Event()
        self.value: bytes | None = None


class StoredCache:
    """A `ResponseCache` of a store with a memory before it.

    While the store fails, requests are served without it: it is left alone but for a probe in the background, after
    0.25 s and then after twice as long each time, up to 15 s. The log tells it once, and once that values are kept
    again: a disk that has room for the probe and not for a value is not back.
    """

    def __init__(self, store: Store, *, max_bytes: int, max_age: float | None) -> None:
        """Nothing is opened before the first request.

        Args:
            store: Where values are kept.
            max_bytes: A value larger than a 64th of it is not kept.
            max_age: Seconds after which a value is not used any more; None: never.
        """
        self._store = store
        self._largest = max_bytes // 64
        self._age = math.inf if max_age is None else max_age
        self._front = Front(min(_FRONT_BYTES, max_bytes))
        self._flights: dict[str, _Flight] = {}
        self._writes: dict[asyncio.Task[object], int] = {}
        self._recovery: asyncio.Task[None] | None = None
        self._rest = _FIRST_REST
        self._told = False
        self._hits = self._misses = self._errors = 0
        self._closed = False

    async def get(self, key: str) -> bytes | None:
        """The value kept under a key, or None."""
        value = self._look(key)
        if value is None:
            value = await self._load(key)
        self._count(value is not None)
        return value

    async def put(self, key: str, value: bytes) -> None:
        """Keep a value."""
        if not self._closed and len(value) <= self._largest:
            now = time.time()
            self._front.put(key, value, now, now + self._age)
            await self._save(key, seal(key, value, now))

    async def single(self, key: str, make: Callable[[], Awaitable[bytes]]) -> tuple[bytes, bool]:
        """As `ResponseCache.single`. The store is written to after the value was returned."""
        while True:
            value = self._look(key)
            flight = None if value is not None else self._flights.get(key)
            if value is None and flight is None:
                return await self._lead(key, make)
            if flight is not None:
                await flight.done.wait()
                value = flight.value
            if value is not None:
                self._count(True)
                return value, True

    def stats(self) -> CacheStats:
        """What it did so far."""
        size, entries = self._store.held() or (self._front.size, len(self._front))
        return CacheStats(self._hits, self._misses, self._errors, size, entries, self._recovery is None)

    async def close(self) -> None:
        """Write what is still to be written, and let go of the store. Calling it again does nothing."""
        if self._closed:
            return
        self._closed = True
        # Only of this loop: one that has ended, as of an engine without await, runs nothing any more.
        loop = asyncio.get_running_loop()
        if self._recovery is not None and self._recovery.get_loop() is loop:
            self._recovery.cancel()
        if writes := [task for task in self._writes if task.get_loop() is loop]:
            await asyncio.wait(writes)
        try:
            await self._store.close()
        except Exception as error:  # noqa: BLE001 — a store may fail in any way, and nothing is lost by it
            self._errors += 1
            _LOG.debug("%s did not close: %s", self._store, error)

    async def _lead(self, key: str, make: Callable[[], Awaitable[bytes]]) -> tuple[bytes, bool]:
        flight = self._flights[key] = _Flight()
        try:
            flight.value = value = await self._load(key)
            cached = value is not None
            self._count(cached)
            if value is None:
                flight.value = value = await make()
        finally:
            del self._flights[key]
            flight.done.set()
        if not cached:
            self._keep(key, value)
        return value, cached

    def _keep(self, key: str, value: bytes) -> None:
        """`put` that does not wait for the store, which misses it where more waits already than memory should hold."""
        if self._closed or len(value) > self._largest:
            return
        now = time.time()
        self._front.put(key, value, now, now + self._age)
        if sum(self._writes.values()) + len(value) <= _WAITING_BYTES:
            self._start(self._save(key, seal(key, value, now)), len(value))

    def _look(self, key: str) -> bytes | None:
        """The value in memory. Once a minute the store is asked too, so that it does not take the value for unused."""
        now = time.time()
        value = self._front.get(key, now)
        if value is not None and self._front.unseen(key, now, _UNSEEN) and not self._closed:
            self._start(self._load(key), 0)
        return value

    def _start(self, work: Coroutine[None, None, object], size: int) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._writes[task] = size
        task.add_done_callback(self._writes.pop)

    def _count(self, hit: bool) -> None:
        self._hits += hit
        self._misses += not hit

    async def _load(self, key: str) -> bytes | None:
        if self._recovery is not None or self._closed:
            return None
        try:
            sealed = await self._store.load(key)
        except Exception as error:  # noqa: BLE001 — a store may fail in any way; the request is served without it
            self._failed(error)
            return None
        if sealed is None:
            return None
        opened = unseal(key, sealed)
        if opened is None:
            self._errors += 1
            return None
        value, made = opened
        now = time.time()
        if made + self._age <= now:
            return None
        self._front.put(key, value, now, made + self._age)
        return value

    async def _save(self, key: str, sealed: bytes) -> None:
        if self._recovery is not None:
            return
        try:
            await self._store.save(key, sealed)
        except Exception as error:  # noqa: BLE001 — a store may fail in any way; the value is lost, no request is
            self._failed(error)
            return
        if self._told:
            self._told, self._rest = False, _FIRST_REST
            _LOG.info("the response cache %s is back", self._store)

    def _failed(self, error: Exception) -> None:
        self._errors += 1
        if not self._told:
            self._told = True
            _LOG.warning("the response cache %s fails; requests are served without it: %s", self._store, error)
        if self._recovery is None and not self._closed:
            self._recovery = asyncio.get_running_loop().create_task(self._recover())

    async def _recover(self) -> None:
        failing = True
        while failing:
            await asyncio.sleep(self._rest)
            self._rest = min(2.0 * self._rest, _LONGEST_REST)
            try:
                await self._store.probe()
            except Exception:  # noqa: BLE001 — a store may fail in any way; another try comes later
                self._errors += 1
            else:
                failing = False
        self._recovery = None
