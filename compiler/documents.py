"""Running text: a file's texts, and the passages that they are cut into."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from artifacts.errors import DataError

SEPARATOR = "<|endoftext|>"
"""Stands between the texts of a .txt file."""
PASSAGE = 2048
"""Characters of a passage, at most: about 500 tokens of English."""
MOST_BYTES = 64 << 20
"""How much of a .txt file is read: many times what calibration and judging look at."""
_LONGEST_CHARACTER = 4  # bytes, in UTF-8


def is_plain(path: Path) -> bool:
    """Whether the file is text through and through, without records."""
    return path.suffix.lower() == ".txt" and path.is_file()


def read_documents(path: Path) -> tuple[str, ...]:
    """The texts of a .txt file of UTF-8: all of it, or what stands between its `SEPARATOR`; at most `MOST_BYTES`.

    Raises:
        DataError: It cannot be read, or is not UTF-8: names the byte.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(MOST_BYTES)
            whole = not stream.read(1)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "Check its permissions") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        if whole or error.start < len(data) - _LONGEST_CHARACTER + 1:
            what = f"{path} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}"
            raise DataError(what, "Convert it to UTF-8") from error
        text = data[: error.start].decode("utf-8")  # the limit cuts a character
    texts = text.removeprefix("\ufeff").replace("\r\n", "\n").split(SEPARATOR)
    return tuple(one.strip("\n") for one in texts if one.strip())


def passages(text: str, longest: int = PASSAGE) -> Iterator[str]:
    """The text in pieces of at most ``longest`` characters, cut before white space where there is some.

    No character is lost: joined, they are the text. Pieces of nothing but white space are left out.
    """
    start = 0
    while start < len(text):
        end = min(start + longest, len(text))
        if end < len(text):
            middle = start + longest // 2
            end = max((text.rfind(space, middle, end) for space in "\n "), default=-1)
            end = end if end > start else min(start + longest, len(text))
        piece = text[start:end]
        if piece.strip():
            yield piece
        start = end
