"""Values in a folder of this machine, in SQLite, by diskcache."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

from artifacts.errors import InstallationError

T = TypeVar("T")
_PATIENCE = 2.0
_PROBE = "probe"


class DiskStore:
    """Sealed values in ``cache.db`` of a folder, which several processes may share.

    diskcache keeps the rows, their last use and the size, and is given no chance to pickle: keys are str, values are
    bytes in the table itself. What else lies in the file (a pickled value, the name of another file) is never read.
    SQLite's write-ahead log makes a value whole or absent if the process is killed in the middle of writing it.

    A thread of its own does the work: the event loop never waits for a disk or for another process's lock.
    """

    def __init__(self, folder: Path, *, max_bytes: int, max_age: float | None) -> None:
        """Nothing is opened before the first use.

        Args:
            folder: Where; made if it is not there, for its owner only.
            max_bytes: Most bytes of the database; the values not used the longest go first.
            max_age: Seconds that a value is kept; None: no limit.

        Raises:
            InstallationError: diskcache is not installed.
        """
        _disk()
        self._folder, self._limit, self._age = folder, max_bytes, max_age
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="responses")
        self._cache: Any = None
        self._held = 0, 0

    def __str__(self) -> str:
        return str(self._folder)

    async def load(self, key: str) -> bytes | None:
        """The sealed value, or None."""
        return await self._do(partial(self._load, key))

    async def save(self, key: str, sealed: bytes) -> None:
        """Keep a sealed value, and make room for it."""
        await self._do(partial(self._save, key, sealed))

    async def probe(self) -> None:
        """Fails if a value of some kB can not be kept at present."""
        await self._do(self._probe)

    async def close(self) -> None:
        """Close the file and end the thread."""
        try:
            await self._do(self._close)
        finally:
            self._thread.shutdown(wait=False)

    def held(self) -> tuple[int, int]:
        """(bytes, values) after the last write or the opening."""
        return self._held

    async def _do(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _opened(self) -> Any:
        if self._cache is None:
            from diskcache import Cache

            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._cache = Cache(
                str(self._folder),
                timeout=_PATIENCE,
                disk=_disk(),
                eviction_policy="least-recently-used",
                size_limit=self._limit,
                cull_limit=0,
            )
            self._look()
        return self._cache

    def _load(self, key: str) -> bytes | None:
        found = self._opened().get(key)
        return found if isinstance(found, bytes) else None

    def _save(self, key: str, sealed: bytes) -> None:
        opened = self._opened()
        opened.set(key, sealed, expire=self._age)
        # With each new value diskcache removes ten at most, which large ones would outrun; this goes on, ten by ten.
        if opened.volume() > self._limit:
            opened.cull()
        self._look()

    def _probe(self) -> None:
        opened = self._opened()
        opened.set(_PROBE, bytes(1 << 14))
        opened.delete(_PROBE)
        self._look()

    def _look(self) -> None:
        self._held = int(self._cache.volume()), len(self._cache)

    def _close(self) -> None:
        if self._cache is not None:
            self._cache.close()


@cache
def _disk() -> type:
    """The `diskcache.Disk` that takes bytes under str and nothing else.

    Raises:
        InstallationError: diskcache is not installed.
    """
    try:
        from diskcache import Disk
        from diskcache.core import MODE_RAW
    except ImportError as error:
        raise InstallationError("diskcache is not installed", "pip install 'hasten[serve]'") from error

    class Bytes(Disk):  # type: ignore[misc]  # diskcache has no types
        def put(self, key: object) -> tuple[object, bool]:
            if not isinstance(key, str):
                raise TypeError(f"a key is a str, not {type(key).__name__}")
            return key, True

        def get(self, key: object, raw: object) -> object:
            return key

        def store(self, value: object, read: bool, key: object = None) -> tuple[int, int, None, object]:
            if not isinstance(value, bytes):
                raise TypeError(f"a value is bytes, not {type(value).__name__}")
            return 0, MODE_RAW, None, sqlite3.Binary(value)

        def fetch(self, mode: int, filename: object, value: object, read: bool) -> object:
            return value if mode == MODE_RAW and filename is None else None

        def remove(self, file_path: object) -> None:
            """There are no files of ours; what a database names may be anyone's."""

    return Bytes
