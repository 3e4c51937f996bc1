"""How a value lies in a store: behind a mark, a checksum and the time it was made.

The checksum is over the key too: a value that a store gives for another key, whatever went wrong there, is no answer.
"""

from __future__ import annotations

import struct
import zlib

_MARK = b"hstn"
_HEAD = struct.Struct("<4sId")


def seal(key: str, value: bytes, made: float) -> bytes:
    """The value as it is stored: mark, CRC-32 of key, time and value, Unix time in seconds (float64), the value."""
    return _HEAD.pack(_MARK, zlib.crc32(value, _label(key, made)), made) + value


def unseal(key: str, sealed: bytes) -> tuple[bytes, float] | None:
    """(value, Unix time it was made); None if the bytes are not what `seal` made for this key, or were damaged."""
    if len(sealed) < _HEAD.size:
        return None
    mark, check, made = _HEAD.unpack_from(sealed)
    value = sealed[_HEAD.size :]
    if mark != _MARK or zlib.crc32(value, _label(key, made)) != check:
        return None
    return value, made


def _label(key: str, made: float) -> int:
    return zlib.crc32(struct.pack("<d", made) + key.encode())
