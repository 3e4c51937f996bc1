"""Where the shared data lies, and how it is read."""

from __future__ import annotations

import csv
import os
from pathlib import Path

import pytest

SHARED = Path(os.environ.get("HASTEN_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def sts_pairs(name: str) -> list[tuple[str, str, float]]:
    """Sentence, sentence, score; skips the test where the data is absent."""
    file = SHARED / "data" / "stsb" / name
    if not file.is_file():
        pytest.skip(f"{file} is absent; HASTEN_SHARED names another place")
    with file.open(encoding="utf-8") as stream:
        rows = list(csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [(row[5], row[6], float(row[4])) for row in rows]
