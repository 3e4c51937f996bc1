"""Servers in processes of their own, for the benchmarks."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
from measure import ROOT, memory

_READY_SECONDS = 120.0
_END_SECONDS = 30.0


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        port: On this machine.
        pid: Of its process.
    """

    port: int
    pid: int

    def rss(self) -> float:
        """MB of it and its workers."""
        return sum(memory(self.pid)) / 1e6

    def workers(self) -> list[psutil.Process]:
        """Its child processes."""
        return [one for one in psutil.Process(self.pid).children(recursive=True) if one.is_running()]


@contextmanager
def serving(command: Sequence[str], probe: str) -> Iterator[Server]:
    """Start a server whose command ends with a port, wait until ``probe`` answers, and end it."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    process = subprocess.Popen(
        [part.format(port=port) for part in command], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        wait_ready(f"http://127.0.0.1:{port}{probe}", process)
        yield Server(port, process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()


def wait_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    """Return when the address answers; 405 and 422 are answers of a server that wants a POST."""
    end = time.monotonic() + _READY_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=1.0):
                return
        except urllib.error.HTTPError as error:
            if error.code in (405, 422):
                return
        except OSError:
            pass
        time.sleep(0.05)
    raise SystemExit(f"the server at {url} did not become ready")


def hasten_server(bundles: Mapping[str, Path], *options: str) -> list[str]:
    """The real command; a log line a request, as users have it, goes nowhere."""
    named = [word for name, bundle in bundles.items() for word in ("--name", f"{name}={bundle}")]
    return [sys.executable, "-m", "hasten", "serve", *named, "--port", "{port}", *options]
