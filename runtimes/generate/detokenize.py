"""Token ids to text, piece by piece: each is whole characters, and together they are what decoding at once gives.

Three kinds of tokenizers are told apart by their decoder. Byte-level BPE (GPT-2, Llama 3, Qwen): each token is bytes.
Byte fallback (sentencepiece, Llama 2, Gemma): tokens ``<0x00>`` to ``<0xFF>`` are bytes, the others text. All else:
text that depends on the token before it. Where a model writes bytes that are no UTF-8, each maximal part becomes
U+FFFD, as Unicode recommends; tokenizers' byte fallback gives one for every byte of the run, valid characters included.
"""

from __future__ import annotations

import codecs
import json
import re
from functools import cached_property

from tokenizers import Tokenizer

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_MOST_PENDING = 8


class Vocabulary:
    """What a tokenizer's tokens are, for any number of `Detokenizer`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        kinds = _decoders(tokenizer)
        self.byte_level = kinds == ["ByteLevel"]
        self.byte_fallback = "ByteFallback" in kinds
        self._special = {index for index, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._bytes: dict[int, bytes] = {}

    @cached_property
    def _characters(self) -> dict[str, int]:
        return _byte_of_character()

    def token(self, index: int) -> str | None:
        """The token's own text in the vocabulary; None for special tokens and ids that are none."""
        if index in self._special:
            return None
        found: str | None = self._tokenizer.id_to_token(index)
        return found

    def token_bytes(self, index: int, token: str) -> bytes | None:
        """The bytes that a token stands for; None if it stands for text that depends on its neighbours."""
        if not self.byte_level:
            match = _BYTE.fullmatch(token) if self.byte_fallback else None
            return bytes([int(match[1], 16)]) if match else None
        if index not in self._bytes:
            try:
                self._bytes[index] = bytes(self._characters[character] for character in token)
            except KeyError:  # An added token: its own text.
                self._bytes[index] = token.encode("utf-8")
        return self._bytes[index]

    def decode(self, ids: list[int]) -> str:
        """The text of the ids at once, special tokens left out."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


class Detokenizer:
    """The text of one row.

    Args:
        vocabulary: Of its tokenizer.
    """

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._before: list[int] = []
        self._pending: list[int] = []

    def push(self, index: int) -> str:
        """What can be said for sure once this token is there; may be empty."""
        token = self._vocabulary.token(index)
        if token is None:
            return ""
        data = self._vocabulary.token_bytes(index, token)
        if data is not None:
            self._before = [index]
            return self._utf8.decode(data)
        text = self._flush_bytes()
        self._pending.append(index)
        said = self._said()
        # Half a character of a decoder we do not know ends in U+FFFD; what really is one is not waited for long.
        if said.endswith("\ufffd") and len(self._pending) < _MOST_PENDING:
            return text
        self._before, self._pending = self._pending[-1:], []
        return text + said

    def flush(self) -> str:
        """What is left at the end of the text."""
        text = self._flush_bytes()
        if self._pending:
            text += self._said()
            self._before, self._pending = self._pending[-1:], []
        return text

    def _flush_bytes(self) -> str:
        left = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return left

    def _said(self) -> str:
        """The text of the pending tokens, after the one before them."""
        context = self._vocabulary.decode(self._before)
        return self._vocabulary.decode(self._before + self._pending)[len(context) :]


def detokenize(vocabulary: Vocabulary, ids: list[int]) -> str:
    """The text of the ids, as the pieces of a `Detokenizer` add up."""
    one = Detokenizer(vocabulary)
    return "".join([*(one.push(index) for index in ids), one.flush()])


def _decoders(tokenizer: Tokenizer) -> list[str]:
    """Types of the tokenizer's decoders, in order."""
    decoder = tokenizer.decoder
    if decoder is None:
        return []
    stated = json.loads(decoder.__getstate__())
    parts = stated.get("decoders", [stated])
    return [str(part.get("type")) for part in parts]


def _byte_of_character() -> dict[str, int]:
    """The characters by which byte-level BPE writes bytes (GPT-2's encoder.py)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}
