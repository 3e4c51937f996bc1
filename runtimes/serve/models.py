"""The models that a server answers with, by name; each can be replaced by its bundle's successor while it works."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from artifacts.errors import HastenError, UsageError

if TYPE_CHECKING:
    from artifacts.manifest import Manifest

    from ..engine.engine import Engine
    from .tokens import TokenTexts

MakeEngine = Callable[[Path], "Engine"]
"""Makes the engine of a bundle; it is not started yet."""
Tell = Callable[[str, Mapping[str, object]], None]
"""Told what happens: an event's name, and what there is to say of it."""


class UnknownModelError(UsageError):
    """No model of that name is served."""


@dataclass
class Served:
    """One engine under its name.

    Attributes:
        name: What requests call it.
        path: Of the bundle.
        engine: It, started.
        since: Seconds of the epoch at which it was ready.
        loads: How often the bundle was loaded, 1 at first.
        failure: Why the bundle that lies there now was not taken; empty: it is the one that runs.
        uses: Requests that hold it now.
        idle: Set while there are none.
        tokens: Texts of its tokens; None: not asked for yet.
    """

    name: str
    path: Path
    engine: Engine
    since: float
    loads: int = 1
    failure: str = ""
    uses: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    tokens: TokenTexts | None = None

    def __post_init__(self) -> None:
        self.idle.set()

    @property
    def manifest(self) -> Manifest:
        """Of the bundle that runs."""
        return self.engine.bundle.manifest

    @property
    def task(self) -> str:
        """What the model does."""
        return self.manifest.task


class Models:
    """Name -> engine.

    Args:
        paths: Bundles by name, in the order in which they are listed.
        make: Makes an engine.
        drain: Seconds that an engine which was replaced has to finish its work.
        tell: Told of loads, replacements and failures.
    """

    def __init__(
        self,
        paths: Mapping[str, Path],
        make: MakeEngine,
        *,
        drain: float = 30.0,
        tell: Tell = lambda event, facts: None,
    ) -> None:
        self._paths = dict(paths)
        self._make = make
        self._drain = drain
        self._tell = tell
        self._live: dict[str, Served] = {}
        self._locks = {name: asyncio.Lock() for name in paths}
        self._leaving: dict[asyncio.Task[None], Served] = {}
        self.draining = False

    async def start(self) -> None:
        """Load all bundles, one after the other.

        Raises:
            HastenError: One cannot be loaded; those that were are closed again.
        """
        try:
            for name, path in self._paths.items():
                self._live[name] = await self._load(name, path)
        except BaseException:
            await self.close(drain=0.0)
            raise

    async def close(self, *, drain: float | None = None) -> None:
        """End all engines; what they have accepted may take ``drain`` seconds (None: as said at first)."""
        self.draining = True
        seconds = self._drain if drain is None else drain
        leaving = dict(self._leaving)
        for task in leaving:
            task.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        live, self._live = [*self._live.values(), *leaving.values()], {}
        await asyncio.gather(*(served.engine.close(drain=seconds) for served in live))

    @property
    def ready(self) -> bool:
        """Whether every model can answer, and new work is taken."""
        return not self.draining and len(self._live) == len(self._paths) and all(one.engine.ready for one in self)

    def __iter__(self) -> Iterator[Served]:
        """Each model, in the order of the command line."""
        return iter(list(self._live.values()))

    def __len__(self) -> int:
        """How many there are."""
        return len(self._live)

    def find(self, name: str | None) -> tuple[Served, str]:
        """The model that a request names, and the adapter on it: ``name`` or ``name:adapter``.

        Args:
            name: None stands for the only model there is.

        Returns:
            The model, and the adapter's name or "".

        Raises:
            UnknownModelError: There is none; says which there are.
        """
        if name is None and len(self._live) == 1:
            return next(iter(self._live.values())), ""
        if name is None:
            raise UnknownModelError("no model was named", f"Name one of {self._names()}")
        if (served := self._live.get(name)) is not None:
            return served, ""
        base, _, adapter = name.rpartition(":")
        if adapter and (served := self._live.get(base)) is not None:
            return served, adapter
        raise UnknownModelError(f"there is no model {name[:200]!r}", f"There are {self._names()}")

    @contextmanager
    def use(self, served: Served) -> Iterator[Engine]:
        """The engine for the time of a request: where it is replaced meanwhile, it lives until the request ends."""
        served.uses += 1
        served.idle.clear()
        try:
            yield served.engine
        finally:
            served.uses -= 1
            if served.uses == 0:
                served.idle.set()

    async def reload(self, name: str) -> bool:
        """Take the bundle that lies there now, if it is another one; requests that run finish on the old one.

        Returns:
            Whether it was replaced. A bundle that cannot be loaded changes nothing: `Served.failure` says why.
        """
        async with self._locks[name]:
            old = self._live.get(name)
            if self.draining or old is None:
                return False
            try:
                new = await self._load(name, old.path, old)
            except (HastenError, OSError) as error:
                old.failure = str(error)
                self._tell("reload failed", {"model": name, "error": str(error)})
                return False
            if new is old:
                old.failure = ""
                return False
            if self.draining or name not in self._live:
                await new.engine.close(drain=0.0)
                return False
            self._live[name] = new
            task = asyncio.create_task(self._retire(old))
            self._leaving[task] = old
            task.add_done_callback(self._leaving.pop)
            return True

    async def _load(self, name: str, path: Path, old: Served | None = None) -> Served:
        """The bundle's engine, started; ``old`` where the bundle is the one that runs already."""
        begin = time.monotonic()
        if old is not None and await asyncio.to_thread(digest_of, path) == old.engine.bundle.digest:
            return old
        engine = self._make(path)
        try:
            await engine.start()
        except BaseException:
            await engine.close(drain=0.0)
            raise
        loads = 1 if old is None else old.loads + 1
        facts = {"model": name, "task": engine.bundle.manifest.task, "seconds": round(time.monotonic() - begin, 2)}
        self._tell("loaded" if old is None else "reloaded", facts)
        return Served(name, path, engine, time.time(), loads)

    async def _retire(self, old: Served) -> None:
        try:
            async with asyncio.timeout(self._drain):
                await old.idle.wait()
        except TimeoutError:
            self._tell("drain ended", {"model": old.name, "requests": old.uses})
        await old.engine.close(drain=self._drain)

    def _names(self) -> str:
        return ", ".join(self._live) or "none: the server is starting or ending"


def digest_of(path: Path) -> str:
    """What tells the bundle that lies there from others.

    Raises:
        BundleError: Not a bundle, or a damaged one.
    """
    from artifacts.bundle import open_bundle

    return open_bundle(path, verify=False).digest
