"""The load generator: clients in a process of their own that send requests to a server and time the answers.

    python benchmarks/load_generator.py SPECIFICATION.json     puts the results, as JSON, in its place

Closed load: each client sends its next request when the last is answered. Open load: requests start at random moments
(a Poisson process) at a rate that does not care how the server does. HTTP/1.1 over kept connections, parsed by hand: a
client library would take more of the machine than the server does.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import gc
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

try:
    import uvloop
except ImportError:  # Windows
    uvloop = None  # type: ignore[assignment]

_READ_LIMIT = 1 << 24
_AFTER = 0.2
"""Seconds in which an answer that nobody asked for would come."""


@dataclass(frozen=True)
class Load:
    """What is sent, and how.

    Attributes:
        port: Of the server, on this machine.
        path: Of the requests.
        bodies: JSON bodies, sent in turn.
        clients: At once, for closed load; for open load the most connections.
        seconds: How long requests are started.
        rate: Requests a second of open load; 0: closed load.
        keep: Keep each answer: (index of the body, embedding, scores or text).
        seed: Of the random moments.
        first: Index of the first body.
    """

    port: int
    path: str
    bodies: list[Any]
    clients: int = 1
    seconds: float = 5.0
    rate: float = 0.0
    keep: bool = False
    seed: int = 0
    first: int = 0


@dataclass
class Outcome:
    """What came of it.

    Attributes:
        seconds: From the first request to the last answer.
        latencies: Seconds of each request that was answered with 200, in the order of the answers.
        ended: Moment of each of these answers, seconds after the start.
        refused: Seconds until each refusal (429, 503).
        late: Requests that were accepted and missed their deadline (504).
        failed: Any other answer, or none, in words.
        tokens: Tokens that were written, as the answers' usage says.
        first: Seconds until the first piece of each stream.
        answers: See `Load.keep`.
        twice: Answers whose ``x-request-id`` was that of another, and connections with bytes after the last answer.
    """

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)
    late: int = 0
    failed: list[str] = field(default_factory=list)
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    answers: list[tuple[int, Any]] = field(default_factory=list)
    twice: int = 0

    @property
    def rate(self) -> float:
        """Answers a second."""
        return len(self.latencies) / self.seconds if self.seconds else 0.0

    def percentile(self, share: float) -> float | None:
        """Seconds within which that share of the requests was answered; None without any."""
        return percentile(self.latencies, share)


def percentile(values: list[float], share: float) -> float | None:
    """The value that this share of the values does not exceed; None without any."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else None


def start(load: Load) -> subprocess.Popen[bytes]:
    """Begin in a process of its own; see `result`."""
    with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False, encoding="utf-8") as file:
        json.dump(dataclasses.asdict(load), file)
    return subprocess.Popen([sys.executable, __file__, file.name])


def result(process: subprocess.Popen[bytes]) -> Outcome:
    """Wait for what `start` began."""
    path = Path(cast("Sequence[str]", process.args)[-1])
    try:
        if process.wait():
            raise SystemExit("the load generator failed")
        return Outcome(**json.loads(path.read_text(encoding="utf-8")))
    finally:
        path.unlink()


def run(load: Load) -> Outcome:
    """`start` and `result`."""
    return result(start(load))


class Connection:
    """One kept connection, one request at a time."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self.name = ""
        """What the last answer called its request; empty: nothing."""

    async def ask(self, path: str, body: bytes) -> tuple[int, bytes, float]:
        """(status, body, moment of the first byte of the body), after connecting where that is needed."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port, limit=_READ_LIMIT)
        reader, writer = self._streams
        kind = f"Content-Type: application/json\r\nContent-Length: {len(body)}"
        writer.write(f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{kind}\r\n\r\n".encode() + body)
        try:
            return await self._read(reader)
        except BaseException:
            self.close()
            raise

    async def _read(self, reader: asyncio.StreamReader) -> tuple[int, bytes, float]:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        status = int(head.split(" ", 2)[1])
        fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if ": " in line)
        self.name = fields.get("x-request-id", "")
        if "content-length" in fields:
            found = await reader.readexactly(int(fields["content-length"]))
            moment = time.perf_counter()
        else:
            found, moment = await self._chunks(reader)
        if fields.get("connection") == "close":
            self.close()
        return status, found, moment

    async def _chunks(self, reader: asyncio.StreamReader) -> tuple[bytes, float]:
        parts, moment = [], 0.0
        while size := int(await reader.readuntil(b"\r\n"), 16):
            parts.append((await reader.readexactly(size + 2))[:-2])
            moment = moment or time.perf_counter()
        await reader.readexactly(2)
        return b"".join(parts), moment

    async def end(self) -> bool:
        """Drop it; whether bytes came that nobody asked for."""
        if self._streams is None:
            return False
        try:
            async with asyncio.timeout(_AFTER):
                return bool(await self._streams[0].read(1))
        except TimeoutError:
            return False
        finally:
            self.close()

    def close(self) -> None:
        """Drop it; the next request connects again."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


class Generator:
    """Sends what a `Load` says; see the module."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._bodies = [json.dumps(body).encode() for body in load.bodies]
        self._sent = load.first
        self._names: set[str] = set()
        self._connections: list[Connection] = []
        self._start = 0.0
        self.outcome = Outcome()

    async def run(self) -> Outcome:
        """All requests, until the last is answered."""
        self._start = time.perf_counter()
        await (self._open() if self._load.rate else self._closed())
        self.outcome.seconds = time.perf_counter() - self._start
        self.outcome.twice += sum(await asyncio.gather(*(connection.end() for connection in self._connections)))
        return self.outcome

    async def _closed(self) -> None:
        async def client() -> None:
            connection = self._connect()
            while time.perf_counter() < self._start + self._load.seconds:
                await self._one(connection)

        await asyncio.gather(*(client() for _ in range(self._load.clients)))

    async def _open(self) -> None:
        chance = random.Random(self._load.seed)
        idle: deque[Connection] = deque()
        running: set[asyncio.Task[None]] = set()

        async def one() -> None:
            connection = idle.popleft() if idle else self._connect()
            await self._one(connection)
            idle.append(connection)

        due = self._start
        while (due := due + chance.expovariate(self._load.rate)) < self._start + self._load.seconds:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            task = asyncio.create_task(one())
            running.add(task)
            task.add_done_callback(running.discard)
        if running:
            await asyncio.wait(running)

    def _connect(self) -> Connection:
        self._connections.append(Connection(self._load.port))
        return self._connections[-1]

    async def _one(self, connection: Connection) -> None:
        index, self._sent = self._sent % len(self._bodies), self._sent + 1
        begin = time.perf_counter()
        try:
            status, body, first = await connection.ask(self._load.path, self._bodies[index])
        except (OSError, EOFError, ValueError, asyncio.IncompleteReadError) as error:
            connection.close()
            self.outcome.failed.append(f"{type(error).__name__}: {error}")
            return
        end = time.perf_counter()
        self.outcome.twice += bool(connection.name) and connection.name in self._names
        self._names.add(connection.name)
        if status == 200:
            self.outcome.latencies.append(end - begin)
            self.outcome.ended.append(end - self._start)
            self._note(index, body, first - begin)
        elif status in (429, 503):
            self.outcome.refused.append(end - begin)
        elif status == 504:
            self.outcome.late += 1
        else:
            self.outcome.failed.append(f"{status}: {body[:200].decode(errors='replace')}")

    def _note(self, index: int, body: bytes, first: float) -> None:
        if body.startswith(b"data:"):
            self.outcome.first.append(first)
            events = [line[6:] for line in body.split(b"\n") if line.startswith(b"data: {")]
            usage = [found for event in events if (found := json.loads(event).get("usage"))]
            self.outcome.tokens += usage[-1]["completion_tokens"] if usage else 0
        elif self._load.keep:
            document = json.loads(body)
            if "data" in document:
                self.outcome.answers.append((index, document["data"][0]["embedding"]))
            elif "results" in document:
                self.outcome.answers.append((index, document["results"][0]["scores"]))
            else:
                self.outcome.answers.append((index, document["choices"][0]["text"]))


def decode(embedding: str) -> Any:
    """The vector of an answer in base64, float32 [d]."""
    import numpy as np

    return np.frombuffer(base64.b64decode(embedding), np.float32)


def main() -> None:
    """Run the specification."""
    path = Path(sys.argv[1])
    load = Load(**json.loads(path.read_text(encoding="utf-8")))
    # What this process takes from the machine, and how long it stops, is not the server's doing.
    gc.disable()
    factory = None if uvloop is None else uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        outcome = runner.run(Generator(load).run())
    path.write_text(json.dumps(dataclasses.asdict(outcome)), encoding="utf-8")


if __name__ == "__main__":
    main()
