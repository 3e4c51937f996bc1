"""Which column of a data file is the text, the second text and the label."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from artifacts.errors import DataError, UsageError

ROLES = ("text", "pair", "label")
_ALIASES = {
    "text": ("text", "sentence", "sentence1", "question", "query", "premise", "content", "review"),
    "pair": ("pair", "text2", "sentence2", "context", "passage", "hypothesis", "answer_text"),
    "label": ("label", "score", "labels", "similarity", "target", "class", "similarity_score"),
}
KNOWN_NAMES = frozenset(name for names in _ALIASES.values() for name in names)
_FORM = 'Write --columns "text=NAME,pair=NAME,label=NAME" with names or numbers from 0'


@dataclass(frozen=True)
class Record:
    """One line of a data file.

    Attributes:
        values: Role -> value, for the roles the file has.
        path: The file.
        line: Number of the line, from 1.
    """

    values: Mapping[str, object]
    path: Path
    line: int

    def has(self, role: str) -> bool:
        """Whether the file has that column."""
        return role in self.values


@dataclass(frozen=True)
class Columns:
    """What ``--columns`` asks for.

    Attributes:
        chosen: (role, column name or number); in the order given.
        positional: Only roles were given: they name the columns from left to right.
    """

    chosen: tuple[tuple[str, str], ...]
    positional: bool

    @classmethod
    def parse(cls, text: str) -> Columns:
        """Read ``text=5,pair=6,label=4`` or ``text,label``.

        Raises:
            UsageError: Unknown or repeated role, no text, or a mixture of both forms.
        """
        parts = [part.strip() for part in text.split(",")]
        named = ["=" in part for part in parts]
        if any(named) and not all(named):
            raise UsageError(f"--columns {text!r} mixes two forms", _FORM)
        chosen = []
        for index, part in enumerate(parts):
            role, _, column = part.partition("=") if any(named) else (part, "=", str(index))
            role, column = _role(role.strip(), text), column.strip()
            if not column:
                raise UsageError(f"--columns {text!r} names no column for {role}", _FORM)
            chosen.append((role, column))
        roles = [role for role, _ in chosen]
        if len(set(roles)) != len(roles) or "text" not in roles:
            raise UsageError(f"--columns {text!r} must name the text, and nothing twice", _FORM)
        return cls(tuple(chosen), positional=not any(named))

    def locate(self, header: Sequence[str] | None, width: int, path: Path) -> dict[str, int]:
        """Role -> number of the column.

        Raises:
            DataError: There is no such column.
        """
        found = {}
        for role, column in self.chosen:
            if header is not None and column in header and not self.positional:
                found[role] = header.index(column)
            elif column.isdecimal() and int(column) < width:
                found[role] = int(column)
            else:
                there = ", ".join(header) if header is not None else f"0 to {width - 1}, without names"
                if header is None and not column.isdecimal():
                    there += ": its first line has no such name"
                raise DataError(f"{path} has no column {column}", f"Its columns are {there}")
        return found


def _role(name: str, text: str) -> str:
    for role, names in _ALIASES.items():
        if name.lower() in names:
            return role
    raise UsageError(f"--columns {text!r} has the unknown part {name!r}", _FORM)


def guess(header: Sequence[str], path: Path) -> dict[str, int]:
    """Role -> number of the column, by the usual names.

    Raises:
        DataError: No column looks like the text.
    """
    lower = [name.strip().lower() for name in header]
    found = {}
    for role, names in _ALIASES.items():
        for name in names:
            if name in lower:
                found[role] = lower.index(name)
                break
    if "text" not in found:
        raise DataError(
            f"{path} has no column that looks like text; its columns are {', '.join(header)}",
            'Name it: --columns "text=..."',
        )
    return found


def text_of(record: Record, role: str) -> str:
    """The text in that role; empty if the file has none.

    Raises:
        DataError: It is not a text.
    """
    value = record.values.get(role, "")
    if value is None:
        return ""
    if not isinstance(value, str):
        kind = type(value).__name__
        raise DataError(f"line {record.line} of {record.path} has a {kind} as {role}", "It must be a string")
    return value


def label_of(record: Record, *, number: bool) -> str | float | None:
    """The label: a finite number where ``number``, else its text.

    Raises:
        DataError: A score is not a finite number.
    """
    value = record.values.get("label")
    if value is None or isinstance(value, list | dict):
        return None
    if not number:
        return str(int(value)) if isinstance(value, bool) else str(value).strip()
    try:
        score = float(value) if isinstance(value, str | int | float) else math.nan
    except (ValueError, OverflowError):
        score = math.nan
    if not math.isfinite(score):
        raise DataError(f"line {record.line} of {record.path} has the score {value!r}", "Scores must be finite numbers")
    return score
