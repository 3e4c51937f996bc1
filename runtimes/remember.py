"""Decisions and tuned settings kept between processes: one small JSON file each, in the user's cache folder.

`keep` is how every file of that folder is written, of other kinds too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from artifacts.errors import SchemaError
from artifacts.strict import At, check_schema, decode, encode_document, read_json

from .environment import cache_directory
from .fingerprint import fingerprint
from .settings import Settings

if TYPE_CHECKING:
    from .decide import Decision

_MOST_BYTES = 1 << 20
T = TypeVar("T")


def keep(path: Path, make: Callable[[Path], object]) -> None:
    """Put a file into a cache, whole or not at all. A cache that cannot be written is no error.

    Args:
        path: Where; its folder need not be there, and what is there is replaced.
        make: Makes the file under the path it is given, in the same folder; an OSError of its own is no error either.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            make(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def key(digest: str, device: str | None, provider: str | None, variant: str | None, threads: int) -> str:
    """Name of the decision about a bundle of that digest, on this machine, with these wishes."""
    return _hash(digest, fingerprint(), device, provider, variant, threads)


def recall(name: str) -> Decision | None:
    """The decision kept under a key; None if there is none that can be read."""
    from .decide import Decision

    return _read(_path("decisions", name), Decision)


def remember(name: str, decision: Decision) -> None:
    """Keep a decision. A cache that cannot be written is no error: the next process measures again."""
    _write(_path("decisions", name), decision)


@dataclass(frozen=True)
class _Tuned:
    # The machine stands in the file and not in its name: a load that finds no file need not ask which machine it is.
    machine: str
    settings: Settings


def recall_settings(digest: str, variant: str, provider: str, device: str, threads: int) -> Settings | None:
    """The settings tuned on this machine for a variant on a provider; None if there are none that can be read."""
    kept = _read(_path("settings", _hash(digest, variant, provider, device, threads)), _Tuned)
    return kept.settings if kept is not None and kept.machine == fingerprint() else None


def remember_settings(digest: str, variant: str, provider: str, device: str, threads: int, settings: Settings) -> None:
    """Keep tuned settings. A cache that cannot be written is no error."""
    path = _path("settings", _hash(digest, variant, provider, device, threads))
    _write(path, _Tuned(fingerprint(), settings))


def _hash(*told: object) -> str:
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _path(kind: str, name: str) -> Path:
    return cache_directory() / kind / f"{name}.json"


def _read(path: Path, kind: type[T]) -> T | None:
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
        if len(data) > _MOST_BYTES:
            return None
        at = At(path.parent.name)
        document = read_json(data, at)
        check_schema(document, at)
        del document["schema"]
        return decode(kind, document, at)
    except (OSError, SchemaError):
        return None


def _write(path: Path, value: object) -> None:
    keep(path, lambda temporary: temporary.write_bytes(encode_document(value)))
