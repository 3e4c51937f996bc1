"""A smaller model of the same tokenizer that guesses how a text goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from .decoder import Decoder

_FADE = 0.95
_PRIOR = 0.7
_TRUST = 4.0
_ROOM = 512


class Draft:
    """Guesses for one text at a time: it remembers what it read of the last one.

    Args:
        make: Gives a decoder of one row and that many tokens.
        context: Most tokens that it takes.
        vocabulary: Token ids are below it: those that both models give logits for.

    Attributes:
        seconds: What a token takes, lately; 0 as long as none was written.
    """

    def __init__(self, make: Callable[[int], Decoder], context: int, vocabulary: int) -> None:
        self.seconds = 0.0
        self._make = make
        self._context = context
        self._vocabulary = vocabulary
        self._decoder: Decoder | None = None
        self._held: list[int] = []
        self._hits = self._tries = 0.0
        self._said: tuple[int, list[int]] = (0, [])

    @property
    def chance(self) -> float:
        """Probability that a guess is right if those before it are."""
        return (self._hits + _TRUST * _PRIOR) / (self._tries + _TRUST)

    def guess(self, ids: Sequence[int], count: int) -> list[int]:
        """The likeliest tokens after a text, each after those before it; none where the text is too long.

        Args:
            ids: Of the text, the prompt included.
            count: Tokens to guess, at least 1.

        Raises:
            ProviderError: ONNX Runtime failed.
        """
        self._learn(ids)
        if len(ids) + count > self._context:
            return []
        decoder = self._prepared(len(ids) + count)
        most = min(len(self._held), len(ids) - 1)
        start = next((at for at in range(most) if self._held[at] != ids[at]), most)
        logits = decoder.prefill(0, [ids], start=start)
        self._held = list(ids)
        found: list[int] = []
        begin = time.perf_counter()
        while logits is not None:
            found.append(int(logits[0, : self._vocabulary].argmax()))
            if len(found) == count:
                break
            logits = decoder.step(found[-1:], [len(self._held)])
            self._held.append(found[-1])
        if count > 1:
            self.seconds = (time.perf_counter() - begin) / (count - 1)
        self._said = (len(ids), found)
        return found

    def _learn(self, ids: Sequence[int]) -> None:
        """Compare what was guessed last with what came."""
        start, guessed = self._said
        self._said = (0, [])
        if list(ids[:start]) != self._held[:start]:
            return
        for token, wanted in zip(guessed, ids[start:], strict=False):
            self._hits = _FADE * self._hits + (token == wanted)
            self._tries = _FADE * self._tries + 1.0
            if token != wanted:
                break

    def _prepared(self, length: int) -> Decoder:
        """Its decoder, with room for so many tokens."""
        if self._decoder is None:
            self._decoder = self._make(min(length + _ROOM, self._context))
        elif self._decoder.cache.capacity < length:
            self._decoder.grow(min(length + _ROOM, self._context), [len(self._held)])
        return self._decoder
