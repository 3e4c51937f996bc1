"""How many workers of how many threads do most on this machine, by measurement, remembered."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import psutil

from artifacts.bundle import Bundle
from artifacts.constraints import Between
from artifacts.errors import HastenError, SchemaError
from artifacts.strict import At, check_schema, decode, encode_document, read_json

from .. import remember
from ..environment import cache_directory, physical_cores
from ..tune import is_busy
from .calls import EngineOptions, Place
from .crew import PINNED
from .host import Host, resident_bytes
from .wire import Arrays, Message

GAIN = 1.1
"""Least gain for which there are more workers, each of which holds the weights."""
_SECONDS = 0.5
_ROUNDS = 3
_PATIENCE = 30.0
_MOST_WORKERS = 32
_MEMORY_SHARE = 0.5
_TASKS = ("feature-extraction", "text-classification", "token-classification")


@dataclass(frozen=True)
class Shape:
    """Workers of one kind.

    Attributes:
        workers: Processes.
        threads: Threads within an operator of each; 0: as tuned for one alone.
    """

    workers: Annotated[int, Between(1, 1024)]
    threads: Annotated[int, Between(0, 1024)]


async def shapes(bundle: Bundle, options: EngineOptions) -> list[Message]:
    """What each worker is told to load.

    Args:
        bundle: What is served.
        options: Of the engine.

    Raises:
        HastenError: The bundle does not load in a worker that was to be measured.
    """
    loads = []
    for kind, place in enumerate(options.kinds):
        shape = await shape_of(bundle, place, options)
        loads += [{**_load(bundle, place, options, shape.threads), "kind": kind}] * shape.workers
    return loads


async def shape_of(bundle: Bundle, place: Place, options: EngineOptions) -> Shape:
    """The workers of a place: as asked for; as remembered; measured, if the machine is quiet; else one.

    Only encoders on a CPU are measured: a decoder writes all its texts in one worker, and a GPU takes whole batches.

    Raises:
        HastenError: The bundle does not load.
    """
    cores = physical_cores()
    if place.workers:
        shared = max(1, cores // place.workers) if place.workers > 1 else 0
        return Shape(place.workers, place.threads or shared)
    usual = Shape(1, place.threads)
    measurable = place.threads == 0 and place.device in (None, "cpu") and bundle.manifest.task in _TASKS
    if not measurable or cores < 2 or not options.cache:
        return usual
    path = _path(bundle, place)
    known = _recall(path)
    if known is not None:
        return known
    if is_busy():
        return usual
    found = await measure(_load(bundle, place, options, 0), cores)
    remember.keep(path, lambda temporary: temporary.write_bytes(encode_document(found)))
    return found


async def measure(load: Message, cores: int) -> Shape:
    """The workers that do most tokens a second together: one, or twice as many as long as that gains.

    Args:
        load: What one worker of all threads is told to load.
        cores: Physical cores to share.

    Raises:
        HastenError: The bundle does not load.
    """
    listener = _Listener()
    first = Host(load, listener, hang_timeout=_PATIENCE)
    best, most = Shape(1, 0), 0.0
    try:
        await first.start()
        if first.told.get("device") != "cpu":
            return best
        most = await listener.rate([first])
        memory = resident_bytes(first.pid)
    finally:
        await first.stop()
    pinned = {**load, **{name: first.told[name] for name in PINNED}}
    workers = 2
    while workers <= min(cores, _MOST_WORKERS):
        if workers * memory > _MEMORY_SHARE * psutil.virtual_memory().available:
            break
        shape = Shape(workers, max(1, cores // workers))
        hosts = [Host({**pinned, "threads": shape.threads}, listener, hang_timeout=_PATIENCE) for _ in range(workers)]
        try:
            await hosts[0].start()
            await asyncio.gather(*(host.start() for host in hosts[1:]))
            rate = await listener.rate(hosts)
        except HastenError:
            break
        finally:
            await asyncio.gather(*(host.stop() for host in hosts))
        if rate < GAIN * most:
            break
        best, most, workers = shape, rate, 2 * workers
    return best


class _Listener:
    """Lets workers run ordinary batches, all at once, and counts."""

    def __init__(self) -> None:
        self._waiting: dict[Host, asyncio.Future[float]] = {}

    async def rate(self, hosts: Sequence[Host]) -> float:
        """Tokens a second of all together, the best of some rounds: what else runs here only ever slows it down."""
        return max([await self._round(hosts, number) for number in range(_ROUNDS)])

    async def _round(self, hosts: Sequence[Host], number: int) -> float:
        loop = asyncio.get_running_loop()
        self._waiting = {host: loop.create_future() for host in hosts}
        for host in hosts:
            host.send({"op": "work", "id": number, "method": "bench", "priority": 0, "seconds": _SECONDS / _ROUNDS})
        try:
            async with asyncio.timeout(_PATIENCE):
                return sum(await asyncio.gather(*self._waiting.values()))
        except TimeoutError:
            return 0.0

    def heard(self, host: Host, message: Message, arrays: Arrays) -> None:
        """A worker is done."""
        if (waiting := self._waiting.get(host)) is not None and not waiting.done():
            waiting.set_result(float(message["tokens"]) / float(message["seconds"]))

    def died(self, host: Host, reason: str) -> None:
        """A worker does nothing any more."""
        if (waiting := self._waiting.get(host)) is not None and not waiting.done():
            waiting.set_result(0.0)


def _load(bundle: Bundle, place: Place, options: EngineOptions, threads: int) -> Message:
    return {
        "op": "load",
        "path": str(bundle.path),
        "digest": bundle.digest,
        "device": place.device,
        "provider": place.provider,
        "variant": place.variant,
        "threads": threads,
        "cache": options.cache,
        "slots": options.slots,
        "prefix_cache": options.prefix_cache,
        "draft": "" if options.draft is None else str(Path(options.draft).resolve()),
        "pause": options.pause,
    }


def _path(bundle: Bundle, place: Place) -> Path:
    name = remember.key(bundle.digest, place.device, place.provider, place.variant, physical_cores())
    return cache_directory() / "shapes" / f"{name}.json"


def _recall(path: Path) -> Shape | None:
    try:
        at = At("shapes")
        document = read_json(path.read_bytes(), at)
        check_schema(document, at)
        del document["schema"]
        return decode(Shape, document, at)
    except (OSError, SchemaError):
        return None
