"""Classify every line of a large file: python examples/classify_file.py BUNDLE INPUT OUTPUT

BUNDLE is a compiled text classifier. A line of INPUT is a text, or in a .jsonl file an object with a "text" (and a
"text_pair"). OUTPUT gets a line of JSON for each, in the same order. All workers of the engine work at once, and memory
stays constant. What was interrupted goes on where it stood: run it again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

import hasten
from artifacts.errors import DataError, UsageError

FLUSH = 1000
"""Lines between two moments at which everything so far is on the disk."""


def records_of(file: BinaryIO, *, skip: int, parsed: bool, done: dict[str, int]) -> Iterator[Any]:
    """The records after the first ``skip``; ``done["read"]`` counts the bytes."""
    for number, line in enumerate(file, 1):
        done["read"] += len(line)
        if number <= skip:
            continue
        text = line.rstrip(b"\r\n").decode("utf-8", "replace")
        if not parsed:
            yield text
            continue
        try:
            record = json.loads(text)
        except ValueError as error:
            raise DataError(f"line {number} is no JSON: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise DataError(f'line {number} has no "text"')
        yield {name: record[name] for name in ("text", "text_pair") if name in record}


def finished(part: Path) -> int:
    """How many whole lines were written; half a line at the end is cut off."""
    if not part.exists():
        return 0
    count = end = 0
    with part.open("r+b") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            count, end = count + 1, end + len(line)
        file.truncate(end)
    return count


def check_same(job: Path, told: dict[str, object]) -> None:
    """Refuse to go on with another input, or by another model."""
    if job.exists() and json.loads(job.read_text()) != told:
        raise UsageError(f"{job} is of another input or model", f"Remove it and {job.with_suffix('.part').name}")
    job.write_text(json.dumps(told))


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("input", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--workers", type=int, default=0, help="processes [default: measured]")
    asked = parser.parse_args()
    if not asked.input.is_file():
        parser.error(f"{asked.input} is no file")
    if asked.output.exists():
        parser.error(f"{asked.output} is there already")
    part, job = asked.output.with_suffix(".part"), asked.output.with_suffix(".job")
    about = asked.input.stat()
    columns = (
        BarColumn(None),
        TaskProgressColumn(),
        TextColumn("{task.fields[lines]:,} lines"),
        TimeRemainingColumn(compact=True),
    )
    console = Console(stderr=True)
    async with hasten.serve_engine(asked.bundle, workers=asked.workers) as engine:
        if engine.bundle.manifest.task != "text-classification":
            raise UsageError(f"{asked.bundle} is a {engine.bundle.manifest.task} model", "Name a text classifier")
        check_same(job, {"bundle": engine.bundle.digest, "size": about.st_size, "modified": about.st_mtime_ns})
        lines = finished(part)
        if lines:
            console.print(f"goes on after {lines:,} lines")
        progress_of_input = {"read": 0}
        with (
            asked.input.open("rb") as source,
            part.open("ab") as target,
            Progress(*columns, console=console) as progress,
        ):
            bar = progress.add_task("", total=max(1, about.st_size), lines=lines)
            parsed = asked.input.suffix == ".jsonl"
            records = records_of(source, skip=lines, parsed=parsed, done=progress_of_input)
            async for row in engine.map(records):
                target.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                lines += 1
                if lines % FLUSH == 0:
                    target.flush()
                    os.fsync(target.fileno())
                    progress.update(bar, completed=progress_of_input["read"], lines=lines)
            progress.update(bar, completed=max(1, about.st_size), lines=lines)
        part.replace(asked.output)
        job.unlink()
        console.print(f"{lines:,} lines in {asked.output}")


if __name__ == "__main__":
    try:
        asyncio.run(main())
    except hasten.HastenError as error:
        sys.exit(f"classify_file: {error}")
    except KeyboardInterrupt:
        sys.exit("classify_file: interrupted; run it again to go on")
