"""A conversation's KV cache, kept from one answer to the next."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ..session import Session
from .cache import CacheLayout, check_memory
from .decoder import Decoder

if TYPE_CHECKING:
    from .adapters import AdaptedSession


class PromptCache:
    """What a model has read of one conversation: the next prompt is read only from where it differs.

    Pass it as ``cache`` to `Generator.generate`, one call at a time.

    Attributes:
        tokens: Ids of what the cache holds.
        reused: How many of the last prompt's tokens were there already.
    """

    def __init__(self) -> None:
        self.tokens: tuple[int, ...] = ()
        self.reused = 0
        self._decoder: Decoder | None = None
        self._made: tuple[object, str] | None = None

    def prepare(
        self,
        session: Session | AdaptedSession,
        layout: CacheLayout,
        vocabulary: int,
        prompt: Sequence[int],
        capacity: int,
        *,
        adapter: str = "",
        adapt: Callable[[], AdaptedSession] | None = None,
    ) -> Decoder:
        """A decoder of one row for that many tokens that holds the first :attr:`reused` tokens of the prompt.

        What it holds is forgotten until :meth:`keep` says what became of it; and for good where it was of another
        adapter. ``adapt`` is as of `Decoder`.

        Raises:
            UsageError: It would not fit in memory; see `check_memory`.
        """
        if self._made != (session, adapter):
            self._decoder, self._made, self.tokens = None, (session, adapter), ()
        held, self.tokens = self.tokens, ()
        # The last token is always read: its logits are what the answer begins with.
        most = min(len(held), len(prompt) - 1)
        self.reused = next((i for i in range(most) if held[i] != prompt[i]), most)
        if self._decoder is None or self._decoder.cache.capacity < capacity:
            check_memory(layout, 1, capacity)
            if self._decoder is None:
                self._decoder = Decoder(session, layout, vocabulary, rows=1, capacity=capacity, adapt=adapt)
            else:
                self._decoder.grow(capacity, [self.reused])
        return self._decoder

    def keep(self, tokens: Sequence[int]) -> None:
        """Say which tokens the cache holds now."""
        self.tokens = tuple(tokens)
