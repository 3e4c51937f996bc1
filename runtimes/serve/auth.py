"""API keys. A key has 256 random bits, so one SHA-256 of it, which is all that a file holds, tells nothing of it."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from artifacts.errors import OutputError, UsageError

PREFIX = "hasten-"
_SCHEME = "sha256:"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_HASH = re.compile(r"sha256:[0-9a-f]{64}")
_MOST = 1 << 22
_NEW = "Make one: hasten serve --api-keys FILE --new-key NAME"


@dataclass(frozen=True)
class Keys:
    """The keys of a file.

    Attributes:
        hashes: SHA-256 of a key -> the name of who holds it.
    """

    hashes: dict[bytes, str]

    def who(self, key: str) -> str | None:
        """Who holds a key; None: nobody. Each hash is compared in full, whatever the key."""
        given = hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
        found = None
        for known, name in self.hashes.items():
            if hmac.compare_digest(known, given):
                found = name
        return found

    @classmethod
    def read(cls, path: Path) -> Keys:
        """The keys of a file: on each line a name and ``sha256:`` with 64 hexadecimal digits; ``#`` begins a comment.

        Raises:
            UsageError: It cannot be read, a line is none, or there is no key in it.
        """
        found = _read(path)
        if not found:
            raise UsageError(f"{path} holds no key", _NEW)
        return cls(found)


def new_key(path: Path, name: str) -> str:
    """Make a key, and add its hash to a file, which is made for its owner alone where it is not there.

    Returns:
        The key. It is nowhere else.

    Raises:
        UsageError: The name is none, or the file has a key of that name.
        OutputError: The file cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise UsageError(f"{name!r} is no name of a key", "Use letters, digits, '.', '_', '@' and '-', at most 64")
    if path.exists() and name in _read(path).values():
        raise UsageError(f"{path} has a key named {name}", "Choose another name, or take its line out first")
    key = PREFIX + secrets.token_urlsafe(32)
    line = f"{name} {_SCHEME}{hashlib.sha256(key.encode()).hexdigest()}\n"
    try:
        with open(os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600), "r+b") as file:  # noqa: PTH123 - a descriptor
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                line = line if file.read(1) == b"\n" else "\n" + line
            file.write(line.encode())
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}", "Name a file that can be") from error
    return key


def _read(path: Path) -> dict[bytes, str]:
    try:
        with path.open("rb") as file:
            text = file.read(_MOST).decode("utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", _NEW) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8", _NEW) from error
    hashes: dict[bytes, str] = {}
    for number, line in enumerate(text.splitlines(), 1):
        parts = line.partition("#")[0].split()
        if not parts:
            continue
        if len(parts) != 2 or not _NAME.fullmatch(parts[0]) or not _HASH.fullmatch(parts[1]):
            raise UsageError(f"line {number} of {path} is no name and hash", _NEW)
        hashes[bytes.fromhex(parts[1].removeprefix(_SCHEME))] = parts[0]
    return hashes
