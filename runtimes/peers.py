"""Other programs that time themselves when asked, so that `hasten bench --peer` can compare a bundle with them.

A peer is any command that reads a JSON object a line on stdin and answers each with one line on stdout; docs/peers.md
is the whole protocol. What it says is not trusted to be sensible: each answer is checked, and waited for only so long.
"""

from __future__ import annotations

import json
import math
import os
import queue
import re
import shlex
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO, Any

from artifacts.constraints import printable
from artifacts.errors import ProviderError, UsageError

from .closing import Closing

ANSWER_SECONDS = 300.0
"""How long a peer may take for an answer, beyond what it was asked to measure: the first one may load a model."""

_EXIT_SECONDS = 2.0
_LONGEST_LINE = 1 << 24
_LONGEST_COMPLAINT = 1 << 12
_LINES_KEPT = 20
_SHOWN = 60
_CLOCK_SLACK = 1.01
_NAME = re.compile(r"[\w.+()-]+(?: [\w.+()-]+)*")


def parse_peer(text: str) -> tuple[str, tuple[str, ...]]:
    """``NAME=COMMAND`` -> the name, and the command as words; quotes as in a shell, but no shell is run.

    Raises:
        UsageError: It is of another form.
    """
    name, equals, command = text.partition("=")
    try:
        words = tuple(shlex.split(command))
    except ValueError as error:
        raise UsageError(f"the command of peer {name!r} cannot be read: {error}", "Close its quotes") from error
    if not equals or not _NAME.fullmatch(name) or not words:
        raise UsageError(f"{text!r} is not NAME=COMMAND", "Write --peer 'mine=python mine.py'; see docs/peers.md")
    return name, words


class Peer(Closing):
    """A peer's process. Use it as a context manager.

    Args:
        name: What to call it, in reports and errors.
        command: Program and arguments.
        timeout: Seconds an answer may take, beyond the seconds that it was asked to measure.
        environment: Variables to set for it, besides those of this process.

    Raises:
        UsageError: There is no such program.
        ProviderError: It cannot be started. The same for every method: it died, did not answer in time, answered what
            is not the protocol, or reported an error.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        timeout: float = ANSWER_SECONDS,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.command = tuple(command)
        self.timeout = timeout
        try:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, **(environment or {})},
                start_new_session=True,  # so that what it starts can be ended with it, and Ctrl-C is ours to handle
            )
        except OSError as error:
            if isinstance(error, FileNotFoundError | NotADirectoryError):
                remedy = "Name a program on the PATH, or give its path"
                raise UsageError(f"the command of peer {name}, {self.command[0]!r}, was not found", remedy) from error
            raise ProviderError(f"peer {name} cannot be started: {error.strerror}") from error
        self._answers: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._complaints: deque[bytes] = deque(maxlen=_LINES_KEPT)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()
        self._listener.start()

    @property
    def pid(self) -> int:
        """Process id of the peer."""
        return self._process.pid

    def time(self, batch: int, length: int, seconds: float) -> list[float]:
        """Seconds of each call on ``batch`` rows of ``length`` tokens, for about ``seconds``; the first is dropped."""
        start = time.perf_counter()
        reply = self.ask("time", {"batch": batch, "length": length, "seconds": seconds}, extra=seconds)
        elapsed = time.perf_counter() - start
        times = reply.get("seconds")
        if not isinstance(times, list) or len(times) < 2 or not all(_is_duration(value) for value in times):
            shown = printable(json.dumps(times))[:_SHOWN]
            raise ProviderError(
                f"peer {self.name} timed seconds: {shown}", "It needs the seconds of each call, at least two calls"
            )
        if sum(times) > _CLOCK_SLACK * elapsed:
            raise ProviderError(
                f"peer {self.name} reports {sum(times):.3g} s of calls within {elapsed:.3g} s",
                "Report seconds, not milliseconds, of calls made one after another",
            )
        return [float(value) for value in times[1:]]

    def ask(
        self, operation: str, arguments: Mapping[str, object] | None = None, *, extra: float = 0.0
    ) -> dict[str, Any]:
        """The peer's answer to any operation of the protocol.

        Args:
            operation: Its name.
            arguments: What goes with it; JSON.
            extra: Seconds to wait beyond the peer's ``timeout``.
        """
        limit = min(self.timeout + extra, threading.TIMEOUT_MAX)
        with suppress(queue.Empty):
            unasked = self._answers.get_nowait()
            raise self._nonsense("said", unasked, "unasked") if unasked else ProviderError(self._death(operation))
        try:
            self._send({"op": operation, **(arguments or {})})
            line = self._answers.get(timeout=limit)
        except queue.Empty:
            self._kill()
            raise ProviderError(
                f"peer {self.name} did not answer {operation!r} in {limit:g} s and was killed"
            ) from None
        except OSError:
            line = b""
        if not line:
            raise ProviderError(self._death(operation))
        return self._parse(operation, line)

    def close(self) -> None:
        """End the peer: politely, then not."""
        if self._process.poll() is None:
            with suppress(OSError):
                self._send({"op": "exit"})
            with suppress(OSError):
                self._input.close()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_EXIT_SECONDS)
        self._kill()
        with suppress(OSError):
            self._input.close()

    @property
    def _input(self) -> IO[bytes]:
        if self._process.stdin is None:
            raise BrokenPipeError
        return self._process.stdin

    def _read(self) -> None:
        stream = self._process.stdout
        if stream is not None:
            with stream:
                while line := stream.readline(_LONGEST_LINE):
                    self._answers.put(line)
        self._answers.put(b"")

    def _listen(self) -> None:
        stream = self._process.stderr
        if stream is not None:
            with stream:
                while line := stream.readline(_LONGEST_COMPLAINT):
                    self._complaints.append(line)

    def _send(self, request: Mapping[str, object]) -> None:
        if self._input.closed:
            raise BrokenPipeError
        self._input.write(json.dumps(request).encode() + b"\n")
        self._input.flush()

    def _parse(self, operation: str, line: bytes) -> dict[str, Any]:
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError):
            raise self._nonsense(f"answered {operation!r} with", line) from None
        if not isinstance(reply, dict) or not isinstance(reply.get("ok"), bool):
            raise self._nonsense(f"answered {operation!r} with", line)
        if not reply["ok"]:
            raise ProviderError(f"peer {self.name}: {printable(str(reply.get('error') or f'{operation} failed'))}")
        return reply

    def _nonsense(self, verb: str, line: bytes, when: str = "") -> ProviderError:
        text = line.decode(errors="replace").rstrip()
        shown = repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")
        remedy = "A peer prints nothing but answers to stdout; see docs/peers.md"
        return ProviderError(printable(f"peer {self.name} {verb} {shown} {when}"), remedy)

    def _kill(self) -> None:
        """The peer and all that it started."""
        with suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()
        self._process.wait()

    def _death(self, operation: str) -> str:
        try:
            code = self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._kill()
            return f"peer {self.name} closed its stdout instead of answering {operation!r}"
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        self._listener.join(_EXIT_SECONDS)
        lines = [line.decode(errors="replace") for line in list(self._complaints)]
        said = next((printable(line) for line in reversed(lines) if line.strip()), "")
        return f"peer {self.name} ended with {how} instead of answering {operation!r}{': ' if said else ''}{said}"


def _is_duration(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0
