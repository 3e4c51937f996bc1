"""What a server writes down: a line for each event, never what a prompt or an answer says."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Literal

import orjson

Form = Literal["json", "text"]
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-/:@+,[]()*×")


class Log:
    """Writes lines to a stream: JSON objects, or ``time event name=value …``.

    Args:
        form: Which of them.
        stream: Where to; standard error unless said otherwise.
    """

    def __init__(self, form: Form = "text", stream: IO[str] | None = None) -> None:
        self._form = form
        self._stream = stream or sys.stderr

    def __call__(self, event: str, facts: Mapping[str, object], *, level: str = "info") -> None:
        """Write a line. What cannot be written is left out: a full disk must not end the server."""
        now = datetime.fromtimestamp(time.time(), UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        if self._form == "json":
            line = orjson.dumps({"time": now, "level": level, "event": event, **facts}, default=str).decode()
        else:
            told = " ".join(f"{name}={_shown(value)}" for name, value in facts.items() if value not in (None, ""))
            line = f"{now} {level if level != 'info' else ''} {event} {told}".replace("  ", " ").rstrip()
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except (OSError, ValueError):
            return

    def bug(self, error: BaseException, facts: Mapping[str, object]) -> None:
        """Write where an error came from that is none of ours; its text is left out, it may quote a prompt."""
        frames = traceback.extract_tb(error.__traceback__)[-8:]
        where = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
        self("bug", {**facts, "error": type(error).__name__, "at": where}, level="error")

    def forward(self, name: str, level: int = logging.WARNING) -> None:
        """Take over what a logger of the standard library says from a level on, without its arguments' texts."""
        logger = logging.getLogger(name)
        logger.handlers = [_Handler(self)]
        logger.propagate = False
        logger.setLevel(level)


class _Handler(logging.Handler):
    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        facts = {"logger": record.name, "message": str(record.msg).strip()}
        if record.exc_info and record.exc_info[1] is not None:
            self._log.bug(record.exc_info[1], facts)
        else:
            self._log("library", facts, level=record.levelname.lower())


def _shown(value: object) -> str:
    """A value on a line of text: quoted where it could be taken for something else, or obeyed by a terminal."""
    text = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if text and set(text) <= _PLAIN else json.dumps(text)
