"""The parent's side of a worker process: it starts it, sends it frames, hears what it says, and sees it end."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

from numpy.typing import NDArray

from artifacts.errors import ProviderError, WorkerError

from ..environment import import_paths
from .batcher import Batch
from .placement import RUN_SECONDS, URGENT_SECONDS, Speed
from .stats import State, WorkerStats
from .wire import Arrays, Frames, Message, WireError, decode, encode, read_error

# Signals to the whole group (Ctrl-C, systemd) are the parent's business: it drains, and closes our stdin.
_BOOTSTRAP = (
    "import json, signal, sys; [signal.signal(one, signal.SIG_IGN) for one in (signal.SIGINT, signal.SIGTERM)]; "
    "sys.path[:] = json.loads(sys.argv[1]); from runtimes.engine.service import main; main()"
)
_START_SECONDS = 900.0
_CLOSE_SECONDS = 5.0
_TAIL_BYTES = 4096


class Listener(Protocol):
    """Who is told what a worker does."""

    def heard(self, host: Host, message: Message, arrays: Arrays) -> None:
        """It said something."""

    def died(self, host: Host, reason: str) -> None:
        """It ended, and was not asked to."""


class _Pipes(asyncio.SubprocessProtocol):
    """What comes from one process, told to its host."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._frames = Frames()
        self.tail = b""
        self.ended = asyncio.get_running_loop().create_future()
        self.transport: asyncio.SubprocessTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.SubprocessTransport", transport)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        if fd == 2:
            self.tail = (self.tail + data)[-_TAIL_BYTES:]
            return
        try:
            for frame in self._frames.feed(data):
                self._host.hear(self, *decode(frame))
        except WireError as error:
            self._host.end(self, error.what)

    def process_exited(self) -> None:
        # What it still said on its way lies in the pipes: let the loop read it first.
        asyncio.get_running_loop().call_later(0.01, self._exited)

    def _exited(self) -> None:
        if not self.ended.done():
            self.ended.set_result(None)
        self._host.exited(self)
        self._host.left(self)


class Host:
    """A worker process, started, ended and started again under one name.

    Args:
        load: Its first message: what to load, and how.
        listener: Who is told what it does.
        hang_timeout: Seconds without a sign of life after which it is killed while it has work.
    """

    def __init__(self, load: Mapping[str, Any], listener: Listener, *, hang_timeout: float) -> None:
        self.load = dict(load)
        self.state: State = "idle"
        self.told: Message = {}
        self.error = ""
        self.restarts = 0
        self.speeds: dict[str, Speed] = {}
        self.batches: dict[int, Batch] = {}
        self.writing: dict[int, Any] = {}
        self.texts = 0
        self.replied = 0.0
        self.report: Message = {}
        self._listener = listener
        self._hang_timeout = hang_timeout
        self._pipes: _Pipes | None = None
        self._ready: asyncio.Future[Message] | None = None
        self._heard = 0.0
        self._watch: asyncio.TimerHandle | None = None
        self._answers: dict[int, asyncio.Future[Message]] = {}
        self._asked = 0
        self._leaving: set[_Pipes] = set()

    @property
    def pid(self) -> int:
        """Process id; 0: it does not run."""
        transport = self._pipes.transport if self._pipes is not None else None
        return transport.get_pid() or 0 if transport is not None else 0

    @property
    def digest(self) -> str:
        """Of the bundle that it loaded; empty before."""
        return str(self.told.get("digest", ""))

    @property
    def apart(self) -> bool:
        """Whether the rows of its model know nothing of each other; see `rows_apart`."""
        return bool(self.told.get("apart"))

    async def start(self) -> None:
        """Start the process and wait until it has loaded the bundle.

        Raises:
            HastenError: What the child says about the bundle: a BundleError, a ProviderError, a UsageError.
            WorkerError: It died or hung.
        """
        if not sys.executable:
            raise ProviderError("this Python does not know its own executable, so no child process can be started")
        self.state = "starting"
        loop = asyncio.get_running_loop()
        self._ready = loop.create_future()
        try:
            # -P and our own sys.path: a folder named `artifacts` in the working directory must not become a package.
            command = (sys.executable, "-P", "-c", _BOOTSTRAP, json.dumps(import_paths()))
            _, pipes = await loop.subprocess_exec(lambda: _Pipes(self), *command)
            self._pipes = pipes
            if pipes.ended.done():
                self.exited(pipes)
            self.send({"op": "load", **self.load})
            async with asyncio.timeout(_START_SECONDS):
                self.told = await self._ready
        except TimeoutError:
            self._gone()
            raise WorkerError(f"the worker did not load the bundle in {_START_SECONDS:g} s") from None
        except BaseException:
            self._gone()
            raise
        finally:
            self._ready = None
        if self._pipes is None:  # It died right after it said that it was ready.
            raise WorkerError(self.error)
        self.state, self.report = "ready", {}

    def send(self, message: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]] | None = None) -> None:
        """Send a frame, at once; what becomes of it is told to the listener.

        Raises:
            UsageError: It cannot be sent; nothing was.
        """
        self.write(encode(message, arrays or {}))

    def write(self, frame: bytes) -> None:
        """Send a frame that is encoded already."""
        transport = self._pipes.transport if self._pipes is not None else None
        pipe = cast("asyncio.WriteTransport | None", transport and transport.get_pipe_transport(0))
        if pipe is not None and not pipe.is_closing():
            pipe.write(frame)
        self._await_life()

    async def ask(self, message: Mapping[str, Any]) -> Message:
        """The reply to a question that its reading thread answers without waiting for the model.

        Raises:
            HastenError: What the worker says is wrong with it.
            WorkerError: The worker died.
        """
        self._asked += 1
        number = self._asked
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        try:
            self.send({**message, "id": number})
            found: Message = await answer
            return found
        finally:
            self._answers.pop(number, None)

    def hear(self, pipes: _Pipes, message: Message, arrays: Arrays) -> None:
        """A frame came."""
        if pipes is not self._pipes:
            return
        self._heard = asyncio.get_running_loop().time()
        kind = message.get("op")
        if kind == "ready" and self._ready is not None and not self._ready.done():
            self._ready.set_result(message)
        elif kind == "failed" and self._ready is not None and not self._ready.done():
            self._ready.set_exception(read_error(message.get("error")))
        elif kind == "reply":
            answer = self._answers.get(cast("int", message.get("id")))
            if answer is not None and not answer.done():
                if "error" in message:
                    answer.set_exception(read_error(message["error"]))
                else:
                    answer.set_result(message)
        else:
            self._listener.heard(self, message, arrays)

    def end(self, pipes: _Pipes, reason: str) -> None:
        """Kill the process because of what it did; its work goes elsewhere."""
        if pipes is self._pipes:
            self._fail(reason)

    def exited(self, pipes: _Pipes) -> None:
        """The process ended."""
        if pipes is self._pipes:
            self._fail(f"the worker died {_how(pipes)}")

    def left(self, pipes: _Pipes) -> None:
        """A process that was killed before is gone."""
        if pipes in self._leaving and pipes.transport is not None:
            pipes.transport.close()
        self._leaving.discard(pipes)

    async def stop(self) -> None:
        """End the process, politely and then not; its state is then ``idle``."""
        pipes, self._pipes = self._pipes, None
        self._forget("the worker was ended")
        self.state, self.texts = "idle", 0
        self.batches.clear()  # Of requests that were given up: nobody waits for them.
        self.writing.clear()
        if pipes is not None and pipes.transport is not None:
            self._leaving.add(pipes)
            stdin = pipes.transport.get_pipe_transport(0)
            if stdin is not None:
                stdin.close()
            await asyncio.wait([pipes.ended], timeout=_CLOSE_SECONDS)
        for one in list(self._leaving):
            _kill(one)
            await one.ended
            if one.transport is not None:
                one.transport.close()
        await asyncio.sleep(0)  # The pipes are closed in the next turn of the loop.

    def speed(self, method: str) -> Speed:
        """What was learned of its runs."""
        return self.speeds.setdefault(method, Speed())

    def little(self, method: str) -> int:
        """Tokens of a batch that keeps nobody waiting for long."""
        speed = self.speed(method)
        most = speed.budget(RUN_SECONDS)
        return min(most, speed.within(URGENT_SECONDS)) if speed.known else most

    @property
    def rate(self) -> float:
        """Tokens a second in batches of a good size; 0 where nothing was seen."""
        speed = next(iter(self.speeds.values()), Speed())
        return speed.rate(speed.budget(RUN_SECONDS))

    def finish(self, tokens: int, method: str = "") -> float:
        """Seconds until it would be done with that many tokens more."""
        speed = self.speed(method) if method else next(iter(self.speeds.values()), Speed())
        return self.remaining() + speed.seconds(tokens)

    def run_seconds(self, tokens: int, others: int) -> float:
        """Seconds that the run of so many tokens takes at least, with as many of others as a batch has room for.

        A request far larger than all that was seen is not judged by a line through small ones: it is tried.
        """
        speed = next(iter(self.speeds.values()), Speed())
        return speed.seconds(speed.foreseen(max(tokens, min(tokens + others, speed.budget(RUN_SECONDS)))))

    def remaining(self) -> float:
        """Seconds until it is done with its batches, as expected."""
        if not self.batches:
            return 0.0
        total = sum(self.speed(batch.method).seconds(batch.cost) for batch in self.batches.values())
        since = asyncio.get_running_loop().time() - max(self._heard, min(b.sent for b in self.batches.values()))
        return max(0.0, total - since)

    def stats(self) -> WorkerStats:
        """What it is and does."""
        pid = self.pid
        outstanding = sum(batch.cost for batch in self.batches.values())
        return WorkerStats(
            pid=pid,
            provider=str(self.told.get("provider", "")),
            device=str(self.told.get("device", "")),
            variant=str(self.told.get("variant", "")),
            state=self.state,
            throughput=self.rate,
            outstanding=outstanding + sum(ticket.cost for ticket in self.writing.values()),
            rss=resident_bytes(pid),
            restarts=self.restarts,
            error=self.error,
            active=int(self.report.get("active", 0)),
            prefix_hits=int(self.report.get("prefix_hits", 0)),
            tokens_saved=int(self.report.get("tokens_saved", 0)),
        )

    def _await_life(self) -> None:
        if self._watch is None and self.state == "ready":
            loop = asyncio.get_running_loop()
            self._heard = max(self._heard, loop.time())
            self._watch = loop.call_later(self._hang_timeout, self._look)

    def _look(self) -> None:
        """Kill it if it has work and was silent for too long; look again later if it has work."""
        self._watch = None
        if not (self.batches or self.writing or self._answers):
            return
        loop = asyncio.get_running_loop()
        started = min((batch.sent for batch in self.batches.values()), default=0.0)
        silent = loop.time() - max(self._heard, started)
        if silent >= self._hang_timeout:
            self._fail(f"the worker gave no sign of life for {self._hang_timeout:g} s and was killed")
        else:
            self._watch = loop.call_later(self._hang_timeout - silent, self._look)

    def _fail(self, reason: str) -> None:
        ready = self._ready
        self.error = reason
        self._gone()
        if ready is not None:
            if not ready.done():
                ready.set_exception(WorkerError(reason))
            return
        self._listener.died(self, reason)

    def _gone(self) -> None:
        pipes, self._pipes = self._pipes, None
        self.state = "idle"
        self._forget(self.error or "the worker is gone")
        if pipes is not None:
            _kill(pipes)
            if not pipes.ended.done():
                self._leaving.add(pipes)
            elif pipes.transport is not None:
                pipes.transport.close()

    def _forget(self, reason: str) -> None:
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(WorkerError(reason))


def resident_bytes(pid: int) -> int:
    """Memory of a process that is resident; 0 where the system does not say."""
    if not pid:
        return 0
    import psutil

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def _kill(pipes: _Pipes) -> None:
    if pipes.transport is not None and pipes.transport.get_returncode() is None:
        try:
            pipes.transport.kill()
        except ProcessLookupError:
            return


def _how(pipes: _Pipes) -> str:
    code = pipes.transport.get_returncode() if pipes.transport is not None else None
    how = f"with exit code {code}"
    if code is not None and code < 0:
        known: Callable[[int], str] = lambda number: signal.Signals(number).name  # noqa: E731
        try:
            how = f"with signal {-code} ({known(-code)})"
        except ValueError:
            how = f"with signal {-code}"
    lines = [line.strip() for line in pipes.tail.decode(errors="replace").split("\n") if line.strip()]
    return how + (f": {lines[-1][:300]}" if lines else "")
