"""Read .jsonl, .csv, .tsv and .txt files line by line, with every defect named by its line or byte."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from artifacts.errors import DataError

from .columns import KNOWN_NAMES, Columns, Record, guess

LINE_LIMIT = 1_000_000  # bytes
_JSON = (".jsonl", ".ndjson")
_TABLE = (".csv", ".tsv")

Lines = Iterator[tuple[int, str]]


def read_records(path: Path, columns: Columns | None) -> Iterator[Record]:
    """Every record of the file.

    Raises:
        DataError: As the module says.
    """
    suffix = path.suffix.lower()
    if path.is_dir() or not path.exists():
        raise DataError(f"there is no data file {path}", "Pass a .jsonl, .csv, .tsv or .txt file")
    if suffix not in (*_JSON, *_TABLE, ".txt"):
        raise DataError(f"{path} has the unknown suffix {suffix or '(none)'}", "Known are .jsonl, .csv, .tsv and .txt")
    lines = _lines(path)
    if suffix == ".txt":
        return _plain(path, lines)
    return _json(path, lines, columns) if suffix in _JSON else _table(path, lines, columns)


def _lines(path: Path) -> Lines:
    """(number, text) of each line that is not blank, without its end."""
    offset = 0
    try:
        with path.open("rb") as stream:
            for number, raw in enumerate(iter(lambda: stream.readline(LINE_LIMIT + 2), b""), start=1):
                if len(raw.rstrip(b"\r\n")) > LINE_LIMIT:
                    raise DataError(f"line {number} of {path} is longer than {LINE_LIMIT:,} bytes", "Split the text")
                try:
                    text = raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    where = offset + error.start
                    raise DataError(
                        f"{path} is not UTF-8: byte {where} is 0x{raw[error.start]:02x} (line {number})",
                        "Convert it to UTF-8",
                    ) from error
                offset += len(raw)
                text = text.removeprefix("\ufeff") if number == 1 else text
                if text.strip():
                    yield number, text.rstrip("\r\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "Check its permissions") from error


def _plain(path: Path, lines: Lines) -> Iterator[Record]:
    for number, line in lines:
        yield Record({"text": line}, path, number)


def _json(path: Path, lines: Lines, columns: Columns | None) -> Iterator[Record]:
    for number, line in lines:
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"line {number} of {path} is not JSON: {error}", "A line is one JSON object") from error
        if isinstance(value, str):
            value = {"text": value}
        if not isinstance(value, dict):
            raise DataError(f"line {number} of {path} is no JSON object", 'Write lines like {"text": "..."}')
        yield Record(_pick(value, columns, path), path, number)


def _pick(value: dict[str, object], columns: Columns | None, path: Path) -> dict[str, object]:
    names = list(value)
    if columns is None:
        found = guess(names, path)
    elif columns.positional:
        found = guess([name for name, _ in columns.chosen if name in value] and names, path)
    else:
        found = columns.locate(names, 0, path)
    return {role: value[names[index]] for role, index in found.items()}


def _table(path: Path, lines: Lines, columns: Columns | None) -> Iterator[Record]:
    places: dict[str, int] | None = None
    for number, fields in _fields(path, lines):
        if places is None:
            header = fields if _is_header(fields, columns) else None
            places = _places(fields, header, columns, path)
            if header is not None:
                continue
        missing = [index for index in places.values() if index >= len(fields)]
        if missing:
            raise DataError(
                f"line {number} of {path} has {len(fields)} columns, and column {missing[0]} is wanted",
                "Every line needs the same columns; count from 0",
            )
        yield Record({role: fields[index] for role, index in places.items()}, path, number)


def _is_header(fields: list[str], columns: Columns | None) -> bool:
    named = [column for _, column in columns.chosen if not column.isdecimal()] if columns is not None else []
    return any(field.strip().lower() in KNOWN_NAMES for field in fields) or any(name in fields for name in named)


def _places(fields: list[str], header: list[str] | None, columns: Columns | None, path: Path) -> dict[str, int]:
    if columns is not None:
        return columns.locate(header, len(fields), path)
    if header is not None:
        return guess(header, path)
    if len(fields) == 1:
        return {"text": 0}
    raise DataError(
        f"{path} has {len(fields)} columns without names",
        'Say which is which: --columns "text=0,label=1", counted from 0',
    )


def _fields(path: Path, lines: Lines) -> Iterator[tuple[int, list[str]]]:
    """(line, fields). Tabs separate if the first line has any: then quotes are text unless they enclose a field."""
    first = next(lines, None)
    if first is None:
        return
    if "\t" in first[1]:
        for number, line in chain((first,), lines):
            yield number, [_unquote(field) for field in line.split("\t")]
        return
    delimiter = ";" if "," not in first[1] and ";" in first[1] else ","
    current = [first[0]]

    def texts() -> Iterator[str]:
        yield first[1] + "\n"
        for number, line in lines:
            current[0] = number
            yield line + "\n"

    reader = csv.reader(texts(), delimiter=delimiter, strict=True)
    try:
        for fields in reader:
            yield current[0], fields
    except csv.Error as error:
        remedy = "Quote fields that hold commas, quotes or line ends"
        raise DataError(f"line {current[0]} of {path} is not valid CSV: {error}", remedy) from error


def _unquote(field: str) -> str:
    inner = field[1:-1]
    enclosed = len(field) >= 2 and field[0] == field[-1] == '"' and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if enclosed else field
