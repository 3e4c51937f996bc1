"""Hashes of bytes and files, and the one byte form of a JSON document that they are taken over."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

CHUNK = 1 << 20
"""Bytes read or written at a time."""


def sha256_bytes(data: bytes | memoryview) -> str:
    """SHA-256 of ``data`` as 64 lower-case hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content as 64 lower-case hexadecimal digits.

    Raises:
        OSError: The file cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def canonical_json(document: object) -> bytes:
    """``document`` as ASCII JSON: sorted keys, indent of one, newline at the end; equal documents give equal bytes.

    Raises:
        ValueError: It holds a number that is not finite.
    """
    text = json.dumps(document, sort_keys=True, indent=1, ensure_ascii=True, allow_nan=False)
    return text.encode("ascii") + b"\n"
