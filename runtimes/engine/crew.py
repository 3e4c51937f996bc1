"""The workers of an engine: started, replaced when they die, ended when there is nothing to do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from artifacts.errors import HastenError, WorkerError

from .host import Host

_FIRST_DELAY = 0.1
_LONGEST_DELAY = 30.0
Failure = HastenError | None
PINNED = ("variant", "provider", "device")
"""What one worker decides for the others of its kind, so that all answer alike."""


class Crew:
    """Keeps the workers running.

    Args:
        hosts: The workers, not started.
        changed: Called when one is ready, or is given up for now.
        idle_timeout: Seconds without work after which all end; None: never.
    """

    def __init__(self, hosts: Sequence[Host], changed: Callable[[], None], idle_timeout: float | None) -> None:
        self.hosts = tuple(hosts)
        self.failure: HastenError | None = None
        self._changed = changed
        self._idle_timeout = idle_timeout
        self._delays: dict[Host, float] = {}
        self._tasks: dict[Host, asyncio.Task[None]] = {}
        self._idle: asyncio.TimerHandle | None = None
        self._closed = False

    @property
    def ready(self) -> list[Host]:
        """The workers that take work."""
        return [host for host in self.hosts if host.state == "ready"]

    @property
    def hopeless(self) -> bool:
        """Whether no worker runs, nor loads the bundle for the first time."""
        return all(host.state in ("broken", "closed") for host in self.hosts)

    async def start(self) -> None:
        """Start all workers; of each kind one alone first, which decides for the others what runs there.

        Raises:
            HastenError: What the first says, where none could start.
        """
        found: list[Failure] = []
        for kind in dict.fromkeys(host.load["kind"] for host in self.hosts):
            first, *others = [host for host in self.hosts if host.load["kind"] == kind]
            found.append(await self._try(first))
            for host in others:
                host.load |= {name: first.told[name] for name in PINNED if first.told.get(name)}
            found += await asyncio.gather(*map(self._try, others))
        failures = [failure for failure in found if failure is not None]
        if len(failures) == len(self.hosts):
            raise failures[0]
        for host in self.hosts:
            if host.state == "broken":
                self._later(host)

    def wake(self) -> None:
        """Start the workers that were ended for want of work."""
        self.rest(busy=True)
        for host in self.hosts:
            if host.state == "idle" and host not in self._tasks and not self._closed:
                self._tasks[host] = asyncio.create_task(self._again(host, 0.0))

    async def any(self) -> Host:
        """A worker that takes work, started if it must be.

        Raises:
            WorkerError: None can be started.
        """
        while not self.ready:
            if self.hopeless:
                raise WorkerError(f"no worker runs: {self.failure.what if self.failure else 'the engine was closed'}")
            self.wake()
            await asyncio.wait([*self._tasks.values()], return_when=asyncio.FIRST_COMPLETED)
        return min(self.ready, key=lambda host: len(host.batches))

    def replace(self, host: Host) -> None:
        """Start a worker again that died; the sooner it died after its start, the later."""
        host.restarts += 1
        if not self._closed:
            self._later(host)

    def proven(self, host: Host) -> None:
        """It did something: should it die, it is started again at once."""
        if host in self._delays:
            del self._delays[host]

    def rest(self, *, busy: bool) -> None:
        """Say whether there is work, whenever that changes."""
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        if not busy and self._idle_timeout is not None and not self._closed:
            self._idle = asyncio.get_running_loop().call_later(self._idle_timeout, self._sleep)

    async def close(self) -> None:
        """End all workers."""
        self._closed = True
        self.rest(busy=True)
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)
        await asyncio.gather(*(host.stop() for host in self.hosts))
        for host in self.hosts:
            host.state = "closed"

    def _sleep(self) -> None:
        self._idle = None
        for host in self.hosts:
            if host.state == "ready" and host not in self._tasks:
                host.state = "idle"
                self._tasks[host] = asyncio.create_task(self._end(host))

    async def _end(self, host: Host) -> None:
        try:
            await host.stop()
        finally:
            self._tasks.pop(host, None)
        self._changed()

    def _later(self, host: Host) -> None:
        delay = self._delays.get(host, 0.0)
        self._delays[host] = min(max(_FIRST_DELAY, 2.0 * delay), _LONGEST_DELAY)
        old = self._tasks.pop(host, None)
        if old is not None and old is not asyncio.current_task():
            old.cancel()
        self._tasks[host] = asyncio.create_task(self._again(host, delay))

    async def _again(self, host: Host, delay: float) -> None:
        await asyncio.sleep(delay)
        failure = await self._try(host)
        self._tasks.pop(host, None)
        if failure is not None and not self._closed:
            self._later(host)
        self._changed()

    async def _try(self, host: Host) -> Failure:
        try:
            await host.start()
        except HastenError as error:
            host.state, host.error = "broken", str(error)
            self.failure = error
            return error
        self.failure = None
        return None
