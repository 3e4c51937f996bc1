"""What each token adds to a text, in bytes: what a grammar over text needs to know of a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from artifacts.errors import UsageError

from .detokenize import Vocabulary

_ANCHOR = "\x02"


@dataclass(frozen=True)
class Pieces:
    """What tokens add to a text.

    Attributes:
        data: UTF-8, or parts of it, that each token adds after another one; empty for control tokens and ids that are
            none.
        strips: A text loses one space at its beginning (sentencepiece's decoder, and those that join words).
        begins: Where a text loses it: the tokens for which that is all that being the first changes, bool
            [vocabulary].
    """

    data: tuple[bytes, ...]
    strips: bool
    begins: NDArray[np.bool_]


def pieces_of(vocabulary: Vocabulary, size: int) -> Pieces:
    """The pieces of the tokens 0 to ``size`` - 1.

    Raises:
        UsageError: What a token adds depends on more than whether it is the first.
    """
    data, later, first = [b""] * size, list[int](), list[int]()
    for index in range(size):
        token = vocabulary.token(index)
        if token is None:
            continue
        known = vocabulary.token_bytes(index, token)
        if known is not None:
            data[index] = known
            first.append(index)
        else:
            later.append(index)
    begins = np.zeros(size, bool)
    begins[first] = [not data[index].startswith(b" ") for index in first]
    strips = False
    if later:
        texts = _later(vocabulary, later)
        for index, text in zip(later, texts, strict=True):
            data[index] = text.encode("utf-8")
            alone = vocabulary.decode([index])
            strips = strips or alone != text
            begins[index] = alone == text.removeprefix(" ")
    return Pieces(tuple(data), strips, begins if strips else np.ones(size, bool))


def _later(vocabulary: Vocabulary, indices: Sequence[int]) -> list[str]:
    """What each token adds after others, which must not matter."""
    anchors = _anchors(vocabulary, indices)
    found: list[list[str]] = []
    for anchor in anchors:
        before = len(vocabulary.decode([anchor]))
        found.append([vocabulary.decode([anchor, index])[before:] for index in indices])
    if any(texts != found[0] for texts in found):
        raise UsageError(
            "what a token of this model adds to a text depends on its neighbours", "Leave out schema, regex or choices"
        )
    return found[0]


def _anchors(vocabulary: Vocabulary, indices: Sequence[int]) -> list[int]:
    """Tokens that are letters: one that begins a word, and one that does not, where there are both."""
    found: dict[bool, int] = {}
    for index in indices:
        token = vocabulary.token(index) or ""
        letters = "".join(character for character in token if character.isascii() and character.isalnum())
        if letters:
            found.setdefault(letters == token, index)
        if len(found) == 2:
            break
    return list(found.values()) or list(indices[:1])


class Segmenter:
    """Cuts text into tokens in the middle of a text.

    Args:
        tokenizer: Takes control tokens in a text for text.
        pieces: Of its tokens.
    """

    def __init__(self, tokenizer: Tokenizer, pieces: Pieces) -> None:
        self._tokenizer = tokenizer
        self._data = pieces.data
        self._ids = {data: index for index, data in reversed(list(enumerate(pieces.data))) if data}
        self._longest = max(map(len, self._ids), default=0)
        self._prefix = self._encode(_ANCHOR)

    def ids(self, text: str) -> list[int]:
        """As the tokenizer cuts it where that gives this text back; else from the left, the longest token each time.

        Where the tokenizer has no tokens for it, those up to there.
        """
        wanted = text.encode("utf-8")
        anchored = self._encode(_ANCHOR + text)
        candidates = [self._encode(text)]
        if anchored[: len(self._prefix)] == self._prefix:
            candidates.append(anchored[len(self._prefix) :])
        for ids in candidates:
            if b"".join(self._data[index] if index < len(self._data) else b"" for index in ids) == wanted:
                return ids
        return self._greedy(wanted)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def _greedy(self, data: bytes) -> list[int]:
        found: list[int] = []
        place = 0
        while place < len(data):
            sizes = range(min(self._longest, len(data) - place), 0, -1)
            size = next((size for size in sizes if data[place : place + size] in self._ids), 0)
            if not size:
                break
            found.append(self._ids[data[place : place + size]])
            place += size
        return found
