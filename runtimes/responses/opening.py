"""From what a user writes to a cache."""

from __future__ import annotations

import math
import re
from pathlib import Path

from artifacts.errors import UsageError

from .cache import ResponseCache, StoredCache
from .disk import DiskStore
from .shared import SCHEMES, RedisStore

SMALLEST = 1 << 20
"""Fewest bytes of a cache."""
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")


def open_cache(where: str | Path, *, max_bytes: int = 1 << 30, max_age: float | None = None) -> ResponseCache:
    """A cache in a folder, or in a Redis server. Nothing is opened before the first request.

    Args:
        where: A folder, made if it is not there; or ``redis://host:port/database``, ``rediss://`` for TLS.
        max_bytes: Most bytes of the folder, at least 1 MiB; a value larger than a 64th of it is not kept. Of a Redis
            server, only the latter: its ``maxmemory`` bounds the rest.
        max_age: Seconds after which a value is not used any more; None: never.

    Raises:
        UsageError: A file stands there, the URL has another scheme, or a limit makes no sense.
        InstallationError: diskcache or redis is not installed.
    """
    if isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes < SMALLEST:
        raise UsageError(f"a cache of {max_bytes} bytes is too small", f"Pass at least {SMALLEST}")
    if max_age is not None and not (math.isfinite(max_age) and max_age > 0.0):
        raise UsageError(f"max_age is {max_age}", "Pass a positive number of seconds, or None")
    if isinstance(where, str) and (scheme := _SCHEME.match(where)):
        if scheme[1].lower() not in SCHEMES:
            raise UsageError(f"there is no cache at {scheme[1]}://", f"Pass a folder, or {SCHEMES[0]}://host:port")
        return StoredCache(RedisStore(where, max_age=max_age), max_bytes=max_bytes, max_age=max_age)
    folder = Path(where)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file, and a cache is a folder", "Name a folder")
    return StoredCache(DiskStore(folder, max_bytes=max_bytes, max_age=max_age), max_bytes=max_bytes, max_age=max_age)
