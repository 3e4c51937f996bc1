"""What `hasten run` does to a stream: records in, one JSON object a line out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import BinaryIO, Literal

from artifacts.errors import DataError, HastenError, OutputError, ProviderError, UsageError
from artifacts.swap import staged_file

from .tasks.base import Record, Task

Form = Literal["auto", "text", "jsonl"]
Numbered = tuple[int, Record]
"""A record and the number of its line, from 1."""
Row = dict[str, object]

MAX_LINE = 64 << 20
"""Most bytes of a line."""
CHUNK = 256
"""Records that go through the model together."""


def read_records(stream: BinaryIO, *, name: str = "stdin", form: Form = "auto") -> Iterator[Numbered]:
    """The records of a stream, lazily; blank lines are skipped.

    Args:
        stream: UTF-8 bytes, with or without a byte order mark.
        name: What to call it in errors.
        form: ``text``: each line is a text. ``jsonl``: each line is a JSON object or string. ``auto``: jsonl where the
            first line that is not blank starts with ``{``.

    Raises:
        DataError: A line is longer than 64 MiB, is not UTF-8 or not JSON; the line is named.
    """
    number = 0
    while line := stream.readline(MAX_LINE + 1):
        number += 1
        where = f"{name}, line {number}"
        if len(line) > MAX_LINE:
            raise DataError(f"{where} is longer than {MAX_LINE >> 20} MiB", "Give one record a line")
        text = _decode(line, where).removeprefix("\ufeff" if number == 1 else "").rstrip("\r\n")
        if not text.strip():
            continue
        if form == "auto":
            form = "jsonl" if text.lstrip().startswith("{") else "text"
        yield number, _parse(text, where) if form == "jsonl" else text


def run_records(
    task: Task,
    records: Iterable[Numbered],
    *,
    name: str = "stdin",
    max_tokens: int | None = None,
    chunk: int = CHUNK,
) -> Iterator[Row]:
    """The task's result for each record, in order, lazily; a record's ``id`` is carried over.

    Args:
        task: A loaded model.
        records: From `read_records`.
        name: What to call the source in errors.
        max_tokens: Padded tokens a batch; None: as many as suit this machine.
        chunk: Records read before the first result appears; 1 answers line by line.

    Raises:
        UsageError: ``chunk`` or ``max_tokens`` is not positive.
        DataError: A record is not what the task takes; the line is named.
        ProviderError: ONNX Runtime failed.
    """
    if chunk < 1 or (max_tokens is not None and max_tokens < 1):
        raise UsageError("the sizes of chunks and batches are counts", "Pass positive numbers")
    left = iter(records)
    while taken := list(islice(left, chunk)):
        try:
            rows = task.rows([record for _, record in taken], max_tokens=max_tokens)
        except (DataError, UsageError):
            rows = [_single(task, record, f"{name}, line {number}", max_tokens) for number, record in taken]
        for (_, record), row in zip(taken, rows, strict=True):
            yield {"id": record["id"], **row} if isinstance(record, Mapping) and "id" in record else row


def to_line(row: Mapping[str, object]) -> bytes:
    """One line of JSON in UTF-8, newline included.

    Raises:
        ProviderError: The model computed a number that is not finite: JSON has none.
    """
    try:
        text = json.dumps(row, ensure_ascii=False, allow_nan=False)
    except ValueError as error:
        raise ProviderError("the model computed a number that is not finite", "Run `hasten verify`") from error
    return text.encode("utf-8", "replace") + b"\n"


def write_rows(rows: Iterable[Mapping[str, object]], path: Path) -> int:
    """Write the rows to a file that appears complete or not at all; returns how many.

    An existing file is replaced; a device or pipe is written to directly.

    Raises:
        OutputError: The file cannot be written.
        HastenError: What ``rows`` raises; the file is then as it was.
    """
    try:
        target = path.resolve()
        if target.is_dir():
            raise OutputError(f"{path} is a folder", "Name a file")
        if target.exists() and not target.is_file():
            with target.open("wb") as file:
                return _write(rows, file)
        with staged_file(target) as file:
            return _write(rows, file)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}", "Name a file in a writable folder") from error


def _write(rows: Iterable[Mapping[str, object]], file: BinaryIO) -> int:
    count = 0
    for row in rows:
        file.write(to_line(row))
        count += 1
    return count


def _single(task: Task, record: Record, where: str, max_tokens: int | None) -> Row:
    try:
        return task.rows([record], max_tokens=max_tokens)[0]
    except (DataError, UsageError) as error:
        problem: HastenError = error
        raise DataError(f"{where}: {problem.what}", problem.remedy) from error


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8: {error.reason} at byte {error.start}", "Convert it to UTF-8") from error


def _parse(text: str, where: str) -> Record:
    try:
        value: object = json.loads(text)
    except RecursionError as error:
        raise DataError(f"{where} is nested too deeply", "Give one flat JSON object a line") from error
    except ValueError as error:
        raise DataError(f"{where} is not JSON: {error}", "Give one JSON object a line") from error
    if isinstance(value, str | dict):
        return value
    raise DataError(f"{where} is not a JSON object", 'Write {"text": "..."}')
