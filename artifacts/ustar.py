"""The one form of a tar header that a packed bundle has."""

from __future__ import annotations

from .constraints import path_problem, shown

BLOCK = 512
"""Bytes of a header; files are padded to a multiple of it."""
SIZE_FIELD = slice(124, 136)
"""Where a header says the size of the file after it."""

_NAME_FIELD = 100
_OCTAL_LIMIT = 8**11
_TYPES = {
    b"1": "a hard link",
    b"2": "a link",
    b"3": "a device",
    b"4": "a device",
    b"5": "a folder",
    b"6": "a pipe",
    b"x": "an extended header",
    b"g": "an extended header",
    b"L": "an extended header",
    b"K": "an extended header",
}


def padded(size: int) -> int:
    """Bytes that a file of ``size`` bytes takes, without its header."""
    return -(-size // BLOCK) * BLOCK


def header_of(path: str, size: int) -> bytes:
    """The header of a file of ``size`` bytes: ustar, mode 0644, and zero for owner, group and time.

    Sizes from 8 GiB on are in base 256, as GNU tar and Python read them. A path of more than 100 characters is cut at
    the first ``/`` that leaves at most 100; paths of bundles are short enough that one does.
    """
    folder, name = "", path
    while len(name) > _NAME_FIELD:
        head, _, name = name.partition("/")
        folder = f"{folder}/{head}" if folder else head
    length = b"%011o\0" % size if size < _OCTAL_LIMIT else b"\x80" + size.to_bytes(11, "big")
    nobody = b"0000000\0" * 2
    front = name.encode("ascii").ljust(_NAME_FIELD, b"\0") + b"0000644\0" + nobody + length + b"00000000000\0"
    back = b"0".ljust(101, b"\0") + b"ustar\x0000" + bytes(80) + folder.encode("ascii").ljust(155, b"\0")
    checksum = sum(front) + sum(b" " * 8) + sum(back)
    return (front + b"%06o\0 " % checksum + back).ljust(BLOCK, b"\0")


def difference(header: bytes, name: str, size: int, seen: set[str]) -> str:
    """Why a header is not that of the file which must come; for the error only, so it trusts nothing."""
    if not any(header):
        return f"it ends before {name}"
    if header[257:262] != b"ustar":
        return f"no header of a tar where {name} must come"
    found = header[:_NAME_FIELD].rstrip(b"\0").decode("utf-8", "replace")
    if folder := header[345:500].rstrip(b"\0").decode("utf-8", "replace"):
        found = f"{folder}/{found}"
    if kind := _TYPES.get(header[156:157]):
        problem = f"{shown(found)} is {kind}; a packed bundle has plain files"
    elif found in seen:
        problem = f"{shown(found)} stands twice"
    elif found != name:
        problem = path_problem(found) or f"{shown(found)} stands where {name} must come; it is not listed or misplaced"
    elif header[SIZE_FIELD] != header_of(name, size)[SIZE_FIELD]:
        problem = f"{name} has not the {size} bytes that are stated"
    else:
        problem = f"the header of {name} is not of the form that hasten pack writes"
    return problem
