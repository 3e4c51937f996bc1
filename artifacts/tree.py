"""Reading a folder that somebody else may have made: no links followed, nothing but plain files, bounded reads."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from .constraints import shown
from .digest import CHUNK
from .errors import BundleError, IntegrityError

_MAX_ENTRIES = 250_000
_SAFE = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


class Readable(Protocol):
    """A source of bytes."""

    def read(self, size: int, /) -> bytes:
        """At most ``size`` bytes; none at the end."""


class Writable(Protocol):
    """A sink of bytes."""

    def write(self, data: bytes, /) -> int:
        """Take all of ``data``."""


@contextlib.contextmanager
def reading_errors(path: Path) -> Iterator[None]:
    """Turn what the system says while ``path`` is read into a `BundleError`."""
    try:
        yield
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror or error}") from error


def scan(root: Path) -> tuple[dict[str, int], frozenset[str]]:
    """Paths of the files under a folder with their sizes in bytes, and the paths of the folders.

    Raises:
        IntegrityError: There is a link, a device, a socket or a pipe, or no end of files.
        OSError: A folder cannot be read.
    """
    files: dict[str, int] = {}
    folders: set[str] = set()
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        with os.scandir(root / prefix) as entries:
            for entry in entries:
                path = f"{prefix}{entry.name}"
                state = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(state.st_mode):
                    folders.add(path)
                    waiting.append(f"{path}/")
                elif stat.S_ISREG(state.st_mode):
                    files[path] = state.st_size
                else:
                    raise IntegrityError(f"{root}: {shown(path)} is {_kind(state.st_mode)}; a bundle has plain files")
                if len(files) + len(folders) > _MAX_ENTRIES:
                    raise IntegrityError(f"{root}: more than {_MAX_ENTRIES} files and folders")
    return files, frozenset(folders)


def read_bounded(root: Path, name: str, limit: int) -> bytes:
    """Content of a plain file of a folder.

    Raises:
        IntegrityError: It is no plain file, or has more than ``limit`` bytes.
        OSError: It cannot be read.
    """
    with open_plain(root, name) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise IntegrityError(f"{root}: {name} has more than {limit} bytes")
    return data


@contextlib.contextmanager
def open_plain(root: Path, name: str) -> Iterator[Readable]:
    """A plain file of a folder, open for reading; no link is followed, and a pipe does not block.

    Raises:
        IntegrityError: It is no plain file.
        OSError: It cannot be opened.
    """
    path = root / name
    mode = path.lstat().st_mode
    if not stat.S_ISREG(mode):
        raise IntegrityError(f"{root}: {shown(name)} is {_kind(mode)}; a bundle has plain files")
    with os.fdopen(os.open(path, os.O_RDONLY | _SAFE), "rb", buffering=0) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise IntegrityError(f"{root}: {shown(name)} is no plain file")
        yield file


def copy_exactly(source: Readable, size: int, sink: Writable | None = None) -> tuple[int, str]:
    """Read up to ``size`` bytes, and write them to ``sink``.

    Returns:
        How many there were, and their SHA-256.

    Raises:
        OSError: Reading or writing failed.
    """
    digest = hashlib.sha256()
    left = size
    while left and (chunk := source.read(min(CHUNK, left))):
        digest.update(chunk)
        if sink is not None:
            sink.write(chunk)
        left -= len(chunk)
    return size - left, digest.hexdigest()


def _kind(mode: int) -> str:
    if stat.S_ISLNK(mode):
        return "a link"
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a device, a socket or a pipe"
