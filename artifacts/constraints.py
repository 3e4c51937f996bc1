"""What a string, number or path of a document may be; `strict` applies these where a field's type names them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

MAX_TEXT = 1 << 16
"""Most characters of any one string."""
MAX_INTEGER = 1 << 53
"""Largest magnitude of any one integer: what every reader of JSON keeps exactly."""

_MAX_PATH = 150
_COMPONENT = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,98}[A-Za-z0-9_-])?")
_WINDOWS_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
_TERMINAL_SEQUENCE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
"""What moves a terminal's cursor, breaks a line or reorders what is shown, and halves of surrogate pairs."""


@dataclass(frozen=True)
class Matches:
    """A string that a regular expression matches from end to end."""

    pattern: str

    def problem(self, value: str) -> str:
        """What is wrong with ``value``; empty if nothing is."""
        return "" if re.fullmatch(self.pattern, value) else f"{shown(value)} does not match {self.pattern}"


@dataclass(frozen=True)
class OneOf:
    """A string out of a closed vocabulary."""

    words: tuple[str, ...]

    def problem(self, value: str) -> str:
        """What is wrong with ``value``; empty if nothing is."""
        return "" if value in self.words else f"{shown(value)} is none of {', '.join(map(repr, self.words))}"


@dataclass(frozen=True)
class Between:
    """A number in a closed interval."""

    low: float
    high: float

    def problem(self, value: float) -> str:
        """What is wrong with ``value``; empty if nothing is."""
        return "" if self.low <= value <= self.high else f"{value} is not in [{self.low}, {self.high}]"


@dataclass(frozen=True)
class Unbounded:
    """A measured number that may be infinite: null in JSON. NaN is written as null too, and read as infinity."""

    def problem(self, value: float) -> str:
        """Nothing is ever wrong."""
        return ""


@dataclass(frozen=True)
class RelativePath:
    """The path of a file of a bundle, as every file system and archive can hold it, and none can misread it."""

    def problem(self, value: str) -> str:
        """What is wrong with ``value``; empty if nothing is."""
        return path_problem(value)


@dataclass(frozen=True)
class PathOrNone:
    """As `RelativePath`, or empty: there is no such file."""

    def problem(self, value: str) -> str:
        """What is wrong with ``value``; empty if nothing is."""
        return path_problem(value) if value else ""


Count = Annotated[int, Between(0, MAX_INTEGER)]
Measured = Annotated[float, Unbounded()]
Sha256 = Annotated[str, Matches(r"[0-9a-f]{64}")]
BundlePath = Annotated[str, RelativePath()]


def path_problem(path: str) -> str:
    """What is wrong with ``path`` as the path of a file of a bundle; empty if nothing is.

    Paths are at most 150 characters of ASCII letters, digits, ``.``, ``_`` and ``-``; no part of one begins or ends
    with a dot, begins with a dash, is longer than 100 or is the name of a Windows device.
    """
    if path.startswith(("/", "\\")) or path[1:2] == ":":
        return f"{shown(path)} is an absolute path"
    if len(path) > _MAX_PATH:
        return f"a path of {len(path)} characters; {_MAX_PATH} are allowed"
    for part in path.split("/"):
        if part in ("", ".", ".."):
            return f"the path {shown(path)} has the part {part!r}"
        if not _COMPONENT.fullmatch(part) or _WINDOWS_DEVICE.fullmatch(part):
            return f"{shown(path)} is no portable path"
    return ""


def shown(value: object) -> str:
    """``value`` on one short line, with nothing a terminal would obey."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "an array"
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def printable(text: str) -> str:
    """``text`` on one line, without characters that a terminal obeys, within the bound of a string of a document."""
    return " ".join(UNSAFE.sub(" ", _TERMINAL_SEQUENCE.sub("", text)).split())[:MAX_TEXT]
