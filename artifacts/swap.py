"""Putting a finished folder in the place of another, at once: whoever is killed leaves the old one or the new one.

A new folder grows in a *staging* folder beside its place and on the same file system, named
``.<name>.<pid>-<random>.hasten-tmp`` and locked while its writer lives. When it is complete and synced, it takes the
place in one step of the kernel: a rename where nothing stands there, an exchange of the two names where something
does (``renameat2`` with ``RENAME_EXCHANGE`` on Linux, ``renamex_np`` with ``RENAME_SWAP`` on macOS). What stood there
is then under the staging name, and is deleted. What a killed writer leaves under that name, the next one deletes.

Where the system has no exchange (Windows, some network file systems), two renames stand in: the old one aside as
``.<name>.<pid>-<random>.hasten-old``, the new one in. Killed between the two, the place is empty, and the next writer
puts the old one back first.

An interrupt (Ctrl-C) may come at any step of these lines, before the folder's own context is entered or while it is
left: what it leaves is deleted when the interpreter ends.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from .digest import sha256_bytes
from .errors import OutputError

if sys.platform != "win32":
    import fcntl

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_RENAME_SWAP = 2
_ABANDONED_S = 3600.0
"""Age from which an unlocked staging folder is abandoned even if a process of that number lives: numbers return."""
_LONGEST = 200
"""Bytes of a name that staging names can hold: most file systems allow 255."""
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_unfinished: dict[Path, Path] = {}
"""Places by the staging names of this process: noted before there is anything to tidy, forgotten once it is tidied."""


class Staging:
    """A folder that is to take the place ``out``. A context manager: leaving it deletes what did not take the place.

    Attributes:
        out: The place; if it was a link, where that leads.
        path: The staging folder; there from entering on.
    """

    def __init__(self, out: Path) -> None:
        """Nothing is written yet.

        Raises:
            OutputError: The folder that ``out`` is in is missing, or may not be written.
        """
        with output_errors(out):
            self.out = Path(os.path.realpath(out))
        check_parent(self.out)
        self.path = _staging_path(self.out)
        self._lock = -1

    def __enter__(self) -> Staging:
        """Delete what killed writers left, and make the folder."""
        with output_errors(self.out):
            sweep(self.out)
            _unfinished[self.path] = self.out
            self.path.mkdir()
            self._lock = _lock(self.path)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Delete the staging folder, or what the place held before; put back what was only moved aside."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
        _tidy(self.path, self.out)
        if isinstance(error, OSError) and error.errno in _FULL:
            raise output_error(error, self.out) from error

    def swap(self) -> None:
        """Put the folder in its place. Afterwards the staging name holds what was there, if anything was.

        Raises:
            OutputError: The system refuses; the place holds what it held.
        """
        with output_errors(self.out):
            sync_tree(self.path)
            sync_folder(self.out.parent)
            if os.path.lexists(self.out):
                if not _exchange(self.path, self.out):
                    _two_renames(self.path, self.out)
            else:
                self.path.rename(self.out)
            sync_folder(self.out.parent)


@contextlib.contextmanager
def staged_file(out: Path) -> Iterator[BinaryIO]:
    """A file open for writing that takes the place ``out`` when the context is left without an error.

    Raises:
        OutputError: It cannot be written; the place holds what it held.
    """
    check_parent(out)
    path = _staging_path(out)
    with output_errors(out):
        sweep(out)
        _unfinished[path] = out
        try:
            with path.open("xb") as file:
                lock = _lock(path)
                try:
                    yield file
                finally:
                    if lock >= 0:
                        os.close(lock)
                file.flush()
                os.fsync(file.fileno())
            path.replace(out)
            sync_folder(out.parent)
        finally:
            _tidy(path, out)


@contextlib.contextmanager
def output_errors(out: Path) -> Iterator[None]:
    """Turn what the system says while ``out`` is written into an `OutputError` that says what to do."""
    try:
        yield
    except OSError as error:
        raise output_error(error, out) from error


def output_error(error: OSError, out: Path) -> OutputError:
    """The `OutputError` for what the system said while ``out`` was written."""
    what = f"{out} cannot be written: {error.strerror or error}"
    if error.errno in _FULL:
        return OutputError(
            what, f"free space on the disk of {out.parent}, or choose another place; nothing was changed"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return OutputError(what, "choose a place that you may write")
    return OutputError(what)


def check_parent(out: Path) -> None:
    """Refuse a place that cannot be written.

    Raises:
        OutputError: The folder it is in is missing, no folder, or may not be written; or it is a root.
    """
    if any("\ud800" <= character <= "\udfff" for character in str(out)):
        raise OutputError(f"{out} cannot be written: its name is not UTF-8", "choose another place")
    if not out.name:
        raise OutputError(f"{out} cannot be written: it is the root of a file system", "name a folder in it")
    if not out.parent.is_dir():
        fault = "is no folder" if out.parent.exists() else "does not exist"
        raise OutputError(f"{out} cannot be written: {out.parent} {fault}", "make that folder first, or choose another")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise OutputError(
            f"{out} cannot be written: {out.parent} may not be written", "choose a place that you may write"
        )
    with output_errors(out), contextlib.suppress(FileNotFoundError):
        out.lstat()  # a name too long for the file system is refused now and not at the end


def sweep(out: Path) -> None:
    """Delete what killed writers of ``out`` left beside it; put back what one had only moved aside.

    Raises:
        OSError: The folder that ``out`` is in cannot be read, or the old one not be put back.
    """
    pattern = re.compile(rf"\.{re.escape(_stem(out))}\.([0-9]+)-[0-9a-f]{{16}}\.hasten-(tmp|old)")
    with os.scandir(out.parent) as entries:
        found = [(Path(entry.path), match) for entry in entries if (match := pattern.fullmatch(entry.name))]
    for path, match in found:
        if not _abandoned(path, int(match[1])):
            continue
        if match[2] == "old":
            _put_back(path, out)
        else:
            remove(path)


def remove(path: Path) -> None:
    """Delete a file, a link (never what it leads to) or a folder with all that is in it; fine if it is gone.

    What cannot be deleted stays: it lies under a staging name, and the next writer tries again.
    """
    try:
        mode = path.lstat().st_mode
    except OSError:
        return
    if stat.S_ISDIR(mode):
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def sync_tree(root: Path) -> None:
    """Make everything under ``root`` durable.

    Raises:
        OSError: The device does not take it.
    """
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            sync_file(Path(folder, name))
        sync_folder(Path(folder))


def sync_file(path: Path) -> None:
    """Make the content of a file durable.

    Raises:
        OSError: The device does not take it.
    """
    # Windows syncs only what is open for writing.
    handle = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable, where the system can.

    Raises:
        OSError: The device does not take it.
    """
    if sys.platform == "win32":
        return
    sync_file(path)


def _staging_path(out: Path) -> Path:
    return out.with_name(f".{_stem(out)}.{os.getpid()}-{secrets.token_hex(8)}.hasten-tmp")


def _stem(out: Path) -> str:
    """The name of a place in staging names; its hash where it leaves no room for what those add."""
    name = os.fsencode(out.name)
    return out.name if len(name) <= _LONGEST else sha256_bytes(name)


def _lock(path: Path) -> int:
    """A handle that holds the lock of a folder until it is closed or the process ends; -1 where there are no locks."""
    if sys.platform == "win32":
        return -1
    handle = os.open(path, os.O_RDONLY)
    # Some network file systems have no locks; the process number has to do there.
    with contextlib.suppress(OSError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return handle


def _abandoned(path: Path, pid: int) -> bool:
    """Whether the writer of a staging folder is gone."""
    try:
        age = time.time() - path.lstat().st_mtime
        if _locked(path):
            return False
    except OSError:
        return False
    return age > _ABANDONED_S or not _alive(pid)


def _locked(path: Path) -> bool:
    """Whether a living process, maybe of another container, holds the lock of a folder or file.

    Raises:
        OSError: It cannot be opened.
    """
    if sys.platform == "win32":
        return False
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _alive(pid: int) -> bool:
    """Whether another process of that number lives. Ours would hold its lock: a dead one had the number before."""
    if pid == os.getpid():
        return False
    if sys.platform == "win32":
        return True  # no harmless question exists there; age decides
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _exchange(one: Path, other: Path) -> bool:
    """Exchange what two names stand for, in one step; False where the system cannot.

    Raises:
        OSError: The system can, and refuses.
    """
    if sys.platform == "win32":
        return False
    library = ctypes.CDLL(None, use_errno=True)
    names = (os.fsencode(one), os.fsencode(other))
    if sys.platform == "linux" and hasattr(library, "renameat2"):
        failed = library.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], ctypes.c_uint(_RENAME_EXCHANGE))
    elif sys.platform == "darwin" and hasattr(library, "renamex_np"):
        failed = library.renamex_np(names[0], names[1], ctypes.c_uint(_RENAME_SWAP))
    else:
        return False
    if not failed:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(other))


def _two_renames(staged: Path, out: Path) -> None:
    """Stand in for an exchange; between the two renames nothing is at ``out``, and `sweep` knows how to go back.

    Raises:
        OSError: The system refuses; ``out`` is what it was.
    """
    aside = _aside(staged)
    out.rename(aside)
    try:
        staged.rename(out)
    finally:
        aside.rename(staged if os.path.lexists(out) else out)


def _aside(staged: Path) -> Path:
    return staged.with_suffix(".hasten-old")


def _put_back(aside: Path, out: Path) -> None:
    """Put what was moved aside back where nothing came after it; delete it where something did.

    Raises:
        OSError: The system refuses.
    """
    if os.path.lexists(out):
        remove(aside)
    else:
        aside.rename(out)


def _tidy(staged: Path, out: Path) -> None:
    """Leave nothing under the names of a writer that ends. What cannot be tidied is left to the next one."""
    aside = _aside(staged)
    if os.path.lexists(aside):
        with contextlib.suppress(OSError):
            _put_back(aside, out)
    remove(staged)
    _unfinished.pop(staged, None)


@atexit.register
def _tidy_unfinished() -> None:
    for staged, out in [*_unfinished.items()]:
        _tidy(staged, out)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unfinished.clear)  # what the parent writes is not the child's to delete
