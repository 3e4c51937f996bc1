"""Prompts to token ids. Text that spells a control token is plain text, unless a caller or a chat template says it."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from artifacts.errors import BundleError, UsageError

from ..items import check_text
from .detokenize import Vocabulary

if TYPE_CHECKING:
    from .chat import Segment


class PromptEncoder:
    """Tokenizes for a decoder. Padding and truncation stated inside tokenizer.json are ignored.

    Tokenizing stays on the calling thread unless TOKENIZERS_PARALLELISM says otherwise, as in `TextEncoder`. Safe to
    use from several threads.

    Args:
        path: Of tokenizer.json; read on first use.
        bos: Token id that begins a text; -1: none.
    """

    def __init__(self, path: Path, bos: int) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self._path = path
        self._bos = bos
        self._lock = threading.RLock()

    @cached_property
    def plain(self) -> Tokenizer:
        """The tokenizer that takes control tokens in a text for text.

        Raises:
            BundleError: tokenizer.json cannot be read.
        """
        with self._lock:
            tokenizer = self._read()
            # A setting of the object, and another thread may be encoding: hence one object for each of its values.
            tokenizer.encode_special_tokens = True
            return tokenizer

    @cached_property
    def parsing(self) -> Tokenizer:
        """The tokenizer that makes control tokens of the text that spells them."""
        with self._lock:
            return self._read()

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """What the tokens are."""
        return Vocabulary(self.plain)

    @cached_property
    def control(self) -> dict[str, int]:
        """Control tokens: their text and id."""
        added = self.plain.get_added_tokens_decoder()
        return {token.content: index for index, token in added.items() if token.special and token.content}

    def encode(self, text: str, *, parse_special: bool = False) -> tuple[int, ...]:
        """Ids of a text, with what the tokenizer puts around it (a beginning-of-text token, where it has one).

        A beginning-of-text token that a parsed text begins with itself is not doubled.

        Raises:
            UsageError: It is not a str.
            BundleError: The tokenizer fails.
        """
        tokenizer = self.parsing if parse_special else self.plain
        ids = self._ids(tokenizer, check_text(text, "the prompt"), add=True)
        return ids[1:] if parse_special and self._bos >= 0 and ids[:2] == (self._bos,) * 2 else ids

    def encode_segments(self, segments: Sequence[Segment]) -> tuple[int, ...]:
        """Ids of a rendered chat, which says its own control tokens: the tokenizer adds none.

        What a message says of control tokens (a plain segment) becomes ordinary tokens. Then the text between control
        tokens is tokenized stretch by stretch.

        Raises:
            BundleError: The tokenizer fails.
        """
        if not any(segment.plain for segment in segments):
            return self._ids(self.parsing, "".join(segment.text for segment in segments), add=False)
        longest = sorted(self.control, key=len, reverse=True)
        pattern = re.compile("(" + "|".join(map(re.escape, longest)) + ")")
        ids: list[int] = []
        text = ""
        for segment in segments:
            pieces = [segment.text] if segment.plain else pattern.split(segment.text)
            for index, piece in enumerate(pieces):
                if index % 2 == 0:
                    text += piece
                    continue
                ids += (*self._ids(self.plain, text, add=False), self.control[piece])
                text = ""
        return (*ids, *self._ids(self.plain, text, add=False))

    def _ids(self, tokenizer: Tokenizer, text: str, *, add: bool) -> tuple[int, ...]:
        try:
            return tuple(tokenizer.encode(text, add_special_tokens=add).ids) if text or add else ()
        except Exception as error:  # tokenizers raises nothing narrower
            raise BundleError(f"the tokenizer failed: {error}", "Compile the model again") from error

    def _read(self) -> Tokenizer:
        try:
            tokenizer = Tokenizer.from_file(str(self._path))
        except Exception as error:  # tokenizers raises nothing narrower
            raise BundleError(f"{self._path} is not a tokenizer: {error}", "Compile the model again") from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer


def is_integer(value: object) -> bool:
    """Whether it can be a token id."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_one(prompt: object) -> bool:
    """Whether it is one prompt (a text, messages, or token ids), and not a list of them.

    Raises:
        UsageError: It is neither.
    """
    if isinstance(prompt, str):
        return True
    if isinstance(prompt, bytes | Mapping) or not isinstance(prompt, Sequence | np.ndarray):
        raise UsageError(f"a prompt is {type(prompt).__name__}", "Pass a text, messages, or a list of them")
    return len(prompt) > 0 and (isinstance(prompt[0], Mapping) or is_integer(prompt[0]))


def token_ids(prompt: Sequence[object]) -> tuple[int, ...]:
    """A prompt of token ids.

    Raises:
        UsageError: It holds something else.
    """
    if not all(is_integer(token) for token in prompt):
        raise UsageError("a prompt holds something else than messages or token ids", "Pass a text")
    return tuple(int(token) for token in prompt)  # type: ignore[call-overload]  # checked above


def check_ids(ids: Sequence[int], vocabulary: int, which: str = "the prompt") -> None:
    """Refuse ids that are none of the model's.

    Raises:
        UsageError: One is not.
    """
    for token in (min(ids), max(ids)) if len(ids) else ():
        if not 0 <= token < vocabulary:
            raise UsageError(f"{which} has the token id {token}", f"Token ids are 0 to {vocabulary - 1}")


def check_length(ids: Sequence[int], context: int, vocabulary: int, which: str = "the prompt") -> None:
    """Refuse a prompt that leaves no room for an answer.

    Args:
        ids: Its token ids.
        context: Most tokens that the model takes, the answer included.
        vocabulary: Ids are below it.
        which: What to call it.

    Raises:
        UsageError: It is empty or too long, or an id is none of the model's.
    """
    if not ids:
        raise UsageError(f"{which} is empty", "Pass a text")
    if len(ids) >= context:
        raise UsageError(
            f"{which} has {len(ids)} tokens; the model takes {context}, the answer included",
            f"Pass at most {context - 1} tokens",
        )
    check_ids(ids, vocabulary, which)
