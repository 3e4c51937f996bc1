"""`hasten serve` in a process of its own, and the tiny bundles that it serves in tests."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import decoder_graphs
import task_builders
import task_graphs
from real_command import command, environment

from artifacts.bundle import Bundle

TIMEOUT = 60.0
TEMPLATE = (
    "{% for tool in tools or [] %}<s>tool {{ tool.function.name }}</s>{% endfor %}"
    "{% for message in messages %}"
    "{% if message.role == 'strange' %}{{ raise_exception('roles are user and assistant') }}{% endif %}"
    "{% if message.role == 'broken' %}{{ message.nothing.nothing }}{% endif %}"
    "{{ message.role[0] }}:{{ message.content }};{% endfor %}"
)


@dataclass
class Server:
    """A server that runs.

    Attributes:
        url: Where.
        process: It.
        lines: What it wrote to standard error so far.
    """

    url: str
    process: subprocess.Popen[bytes]
    lines: list[str] = field(default_factory=list)

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    @property
    def events(self) -> list[dict[str, Any]]:
        """Its log."""
        return [json.loads(line) for line in list(self.lines) if line.startswith("{")]

    def wait_for(self, event: str, count: int = 1, **facts: object) -> dict[str, Any]:
        """The event of the log that says this, once it was written so often."""
        until = time.monotonic() + TIMEOUT
        while time.monotonic() < until:
            found = [one for one in self.events if one["event"] == event and facts.items() <= one.items()]
            if len(found) >= count:
                return found[count - 1]
            time.sleep(0.02)
        raise AssertionError((event, facts, self.lines[-20:]))

    def wait_for_line(self, part: str) -> str:
        """The first line with this in it, once it was written."""
        until = time.monotonic() + TIMEOUT
        while time.monotonic() < until:
            if found := [line for line in list(self.lines) if part in line]:
                return found[0]
            time.sleep(0.02)
        raise AssertionError((part, self.lines[-20:]))

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(TIMEOUT)

    def connect(self, timeout: float = 20.0) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=timeout)

    def raw(self, data: bytes, timeout: float = 20.0) -> bytes:
        """All that comes back for these bytes until the server closes the connection."""
        with self.connect(timeout) as client:
            client.sendall(data)
            return read_all(client)


def read_all(client: socket.socket) -> bytes:
    found = b""
    try:
        while chunk := client.recv(65536):
            found += chunk
    except ConnectionResetError:
        pass
    return found


def answer_of(data: bytes) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of an answer's bytes."""
    head, _, body = data.partition(b"\r\n\r\n")
    first, *rest = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in rest)
    return int(first.split()[1]), headers, json.loads(body) if body else None


@contextmanager
def serving(*words: str | Path, **changes: str) -> Iterator[Server]:
    """``hasten serve --port 0 …``, ready; ended afterwards, its log free of tracebacks."""
    arguments = [*command()[1:], "serve", "--port", "0", "--log", "json", *map(str, words)]
    with spawned(*arguments, **changes) as server:
        _await_url(server)
        yield server
    assert [one for one in server.events if one["event"] == "bug"] == []


@contextmanager
def spawned(*arguments: str, **changes: str) -> Iterator[Server]:
    """Python with these arguments, its standard error read; ended afterwards, free of tracebacks."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        env=environment(**changes),
        start_new_session=True,  # a group of its own, as a shell gives it
    )
    server = Server("", process)
    reader = threading.Thread(target=_read, args=(server,), daemon=True)
    reader.start()
    try:
        yield server
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(TIMEOUT)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()
        reader.join(TIMEOUT)
        if process.stderr is not None:
            process.stderr.close()
    assert not [line for line in server.lines if "Traceback" in line], server.lines


def _read(server: Server) -> None:
    stream = server.process.stderr
    assert stream is not None
    for line in stream:
        server.lines.append(line.decode().rstrip("\n"))


def _await_url(server: Server) -> None:
    until = time.monotonic() + TIMEOUT
    while server.process.poll() is None and time.monotonic() < until:
        if found := [one for one in server.events if one["event"] == "serving"]:
            server.url = re.sub(r"//[^:]*:", "//127.0.0.1:", found[0]["url"])
            return
        time.sleep(0.02)
    raise AssertionError((server.process.poll(), server.lines))


def write_decoder(folder: Path, *, seed: int = 0, context: int = 128, template: str = TEMPLATE) -> Bundle:
    """A random language model, ``tiny``, with a byte-level tokenizer and a chat template that knows tools."""
    folder.mkdir(parents=True, exist_ok=True)
    model = decoder_graphs.tiny_llama(seed, context=context)
    tokenizer = decoder_graphs.byte_level(folder / "tokenizer.json")
    return decoder_graphs.write_decoder(folder / "bundle", model, tokenizer, template=template)


def write_encoder(out: Path) -> Bundle:
    """An encoder of 60 words to vectors of 8 numbers, ``tiny``."""
    return task_graphs.write_bundle(out, "feature-extraction", task_graphs.embedder(), text=task_builders.processor())


def write_classifier(out: Path) -> Bundle:
    """A classifier of three classes."""
    return task_graphs.write_bundle(out, "text-classification", task_graphs.classifier())
