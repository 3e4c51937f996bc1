"""Decisions kept between processes: one small JSON file each, in the user's cache folder."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from artifacts.errors import SchemaError
from artifacts.strict import At, check_schema, decode, encode_document, read_json

from .environment import cache_directory
from .fingerprint import fingerprint

if TYPE_CHECKING:
    from .decide import Decision

_MOST_BYTES = 1 << 20


def key(digest: str, device: str | None, provider: str | None, variant: str | None, threads: int) -> str:
    """Name of the decision about a bundle of that digest, on this machine, with these wishes."""
    told = [digest, fingerprint(), device, provider, variant, threads]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def recall(name: str) -> Decision | None:
    """The decision kept under a key; None if there is none that can be read."""
    from .decide import Decision

    try:
        with _path(name).open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            return None
        at = At("decision")
        document = read_json(data, at)
        check_schema(document, at)
        del document["schema"]
        return decode(Decision, document, at)
    except (OSError, SchemaError):
        return None


def remember(name: str, decision: Decision) -> None:
    """Keep a decision. A cache that cannot be written is no error: the next process measures again."""
    path = _path(name)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(encode_document(decision))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _path(name: str) -> Path:
    return cache_directory() / "decisions" / f"{name}.json"
