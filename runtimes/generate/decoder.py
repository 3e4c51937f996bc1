"""Prefill and decode over the one graph of docs/format.md, on a KV cache that is updated in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from artifacts.errors import UsageError

from ..session import Binding, Session
from .cache import CacheLayout, KVCache
from .feeds import step_feeds
from .results import log_softmax

if TYPE_CHECKING:
    from .adapters import AdaptedSession

Floats = NDArray[np.float32]
Int64 = NDArray[np.int64]

PREFILL_TOKENS = 128
"""Padded tokens of a prefill call: it bounds the memory of a long prompt, and fills the kernels.

GroupQueryAttention computes the scores above the diagonal too, so that smaller pieces save some of them."""
_SCORED_BYTES = 64 << 20
_BINDINGS = 64
"""Steps of other rows or other adapters that are kept bound."""
_SEVERAL = 4
"""Tokens of one row that there are arrays for at first, see `Decoder.verify`."""
_Key = tuple[int, int, tuple[str, ...]]
"""First slot, tokens of each row, the adapter of each row."""


class Decoder:
    """A session with a KV cache for some rows. Not to be used by two threads at once.

    Args:
        session: The graph.
        layout: Of its cache.
        vocabulary: Tokens that logits are given for.
        rows: Slots.
        capacity: Tokens of each.
        adapt: Gives the graph that takes adapters, which is run from the first row on that has one.
    """

    def __init__(
        self,
        session: Session | AdaptedSession,
        layout: CacheLayout,
        vocabulary: int,
        *,
        rows: int,
        capacity: int,
        adapt: Callable[[], AdaptedSession] | None = None,
    ) -> None:
        self.cache = KVCache(layout, rows, capacity)
        self.vocabulary = vocabulary
        self._session = session
        self._adapt = adapt
        self._bindings: dict[_Key, Binding] = {}
        self._single = _Buffers(rows, 1, vocabulary)
        self._several = _Buffers(1, _SEVERAL, vocabulary)

    def step(self, tokens: Sequence[int], lengths: Sequence[int], adapters: Sequence[str] = ()) -> Floats:
        """One token more for the first ``len(tokens)`` slots.

        Args:
            tokens: The last token of each row, not yet in the cache.
            lengths: Tokens of each row in the cache.
            adapters: Name of each row's; empty: none.

        Returns:
            Logits of the next token, float32 [rows, vocabulary]: the graph's own output, overwritten by the next step;
            the caller may alter them.

        Raises:
            ProviderError: ONNX Runtime failed.
        """
        return self._go_on(0, np.asarray(tokens)[:, None], lengths, adapters)[:, 0]

    def prefill(
        self,
        slot: int,
        prompts: Sequence[Sequence[int]],
        *,
        start: int = 0,
        stop: Callable[[], bool] | None = None,
        adapters: Sequence[str] = (),
    ) -> Floats | None:
        """Read the prompts into the slots from ``slot`` on.

        Several go in one call, padded; a single one in pieces of `PREFILL_TOKENS`.

        Args:
            slot: The first prompt's.
            prompts: Token ids, none empty; see `grouped`.
            start: Tokens of a single prompt that the cache holds already.
            stop: Asked between pieces; True ends the prefill.
            adapters: Name of each prompt's; empty: none.

        Returns:
            Logits of the token after each prompt, float32 [prompts, vocabulary]; None if it was stopped.

        Raises:
            ProviderError: ONNX Runtime failed.
        """
        if len(prompts) > 1:
            return self.read(slot, prompts, 0, adapters)
        prompt, logits = prompts[0], None
        while start < len(prompt):
            if stop is not None and stop():
                return None
            end = piece_end(start, PREFILL_TOKENS, len(prompt))
            logits = self.read(slot, [prompt[start:end]], start, adapters)
            start = end
        return logits

    def read(self, slot: int, prompts: Sequence[Sequence[int]], start: int, adapters: Sequence[str] = ()) -> Floats:
        """One call: the prompts, padded, into the slots from ``slot`` on; or a piece of a single one.

        Args:
            slot: The first prompt's.
            prompts: Token ids, none empty.
            start: Tokens of a single prompt, before these, that its slot holds; 0 for several.
            adapters: Name of each prompt's; empty: none.

        Returns:
            Logits of the token after each, float32 [prompts, vocabulary].

        Raises:
            ProviderError: ONNX Runtime failed.
        """
        places = np.array([[len(prompt) - 1] for prompt in prompts], np.int64)
        return self._run(slot, prompts, start, places, adapters)[:, 0]

    def verify(self, tokens: Sequence[Sequence[int]], lengths: Sequence[int], adapters: Sequence[str] = ()) -> Floats:
        """Some tokens more for each of the first ``len(tokens)`` slots, with the logits behind every one of them.

        GroupQueryAttention takes several tokens behind a past for one row only: each row that has several is a call of
        its own, neighbours that have one share a call. Which of the tokens stay, the caller says with the ``lengths``
        of the next call.

        Args:
            tokens: Of each row, not yet in the cache, at least one; the slots have room for them.
            lengths: Tokens of each row in the cache.
            adapters: Name of each row's; empty: none.

        Returns:
            Logits of the token after each, float32 [rows, longest, vocabulary], zeros behind a row's last one; as
            those of `step`, they are overwritten by the next call, and the caller may alter them.

        Raises:
            ProviderError: ONNX Runtime failed.
        """
        if len(tokens) == 1 or all(len(row) == 1 for row in tokens):
            return self._go_on(0, tokens, lengths, adapters)
        found = np.zeros((len(tokens), max(map(len, tokens)), self.vocabulary), np.float32)
        start = 0
        while start < len(tokens):
            stop, width = start + 1, len(tokens[start])
            while width == 1 and stop < len(tokens) and len(tokens[stop]) == 1:
                stop += 1
            some = tokens[start:stop], lengths[start:stop], adapters[start:stop]
            found[start:stop, :width] = self._go_on(start, *some)
            start = stop
        return found

    def grow(self, capacity: int, lengths: Sequence[int], *, rows: int = 0) -> None:
        """Make room for so many tokens a row, in at most as many slots as at first; see `KVCache.grow`."""
        self.cache.grow(capacity, lengths, rows=rows)
        self._bindings.clear()

    def losses(self, ids: Sequence[int]) -> NDArray[np.float64]:
        """Negative log-likelihood, in nats, of each of the ids but the first; float64 [len(ids) - 1]. Uses slot 0.

        Raises:
            ProviderError: ONNX Runtime failed.
        """
        targets = np.asarray(ids[1:], np.int64)
        losses = np.empty(len(targets))
        # Logits of a large vocabulary are large: read in pieces that continue each other.
        piece = max(1, min(PREFILL_TOKENS, _SCORED_BYTES // (4 * self.vocabulary)))
        for start in range(0, len(targets), piece):
            end = min(start + piece, len(targets))
            logits = self._run(0, [ids[start:end]], start, np.arange(end - start)[None])[0]
            losses[start:end] = -log_softmax(logits)[np.arange(end - start), targets[start:end]]
        return losses

    def _run(
        self,
        slot: int,
        prompts: Sequence[Sequence[int]],
        start: Int64 | int,
        places: Int64,
        adapters: Sequence[str] = (),
    ) -> Floats:
        feeds = step_feeds(prompts, start, places)
        past, present = self.cache.views(slot, slot + len(prompts))
        logits = np.empty((*places.shape, self.vocabulary), np.float32)
        self._bind({**feeds, **past}, {"logits": logits, **present}, adapters).run()
        return logits

    def _bind(
        self, inputs: dict[str, NDArray[Any]], outputs: dict[str, NDArray[Any]], adapters: Sequence[str]
    ) -> Binding:
        if not any(adapters):
            return self._session.bind(inputs, outputs)
        if self._adapt is None:
            raise UsageError("this model takes no adapters", "Load a bundle that has some")
        adapted = self._adapt()
        if self._session is not adapted:
            # The plain graph is let go of: the weights of both would be in memory.
            self._session = adapted
            self._bindings.clear()
        return adapted.bind(inputs, outputs, adapters)

    def _forget(self, adapters: Sequence[str]) -> None:
        """Let go of calls bound long ago, or to other sets of adapters: their weights lie side by side for each set."""
        active = {*adapters, ""}
        for key in list(self._bindings):
            others = {*key[2], ""}
            if len(others) > 2 and others != active:
                del self._bindings[key]
        while len(self._bindings) >= _BINDINGS:
            del self._bindings[next(iter(self._bindings))]

    def _go_on(
        self,
        slot: int,
        tokens: Sequence[Sequence[int]] | Int64,
        lengths: Sequence[int],
        adapters: Sequence[str] = (),
    ) -> Floats:
        """As many tokens for each row from ``slot`` on, one, or several for a single row, through arrays bound once.

        Returns:
            Logits behind each, float32 [rows, tokens, vocabulary]: overwritten by the next call.
        """
        rows, width = len(tokens), len(tokens[0])
        if width > self._several.width:
            self._several = _Buffers(1, 2 * width, self.vocabulary)
            self._bindings.clear()
        buffers = self._single if width == 1 else self._several
        buffers.fill(tokens, np.asarray(lengths, np.int64))
        key = slot, width, tuple(adapters) or ("",) * rows
        if key not in self._bindings:
            self._forget(key[2])
            past, present = self.cache.views(slot, slot + rows)
            feeds, logits = buffers.arrays(rows, width)
            self._bindings[key] = self._bind({**feeds, **past}, {"logits": logits, **present}, key[2])
        self._bindings[key].run()
        return buffers.logits[:rows, :width]


class _Buffers:
    """What calls for a few tokens read and write, beside the cache: smaller ones use the first of it.

    Args:
        rows: Most rows; more than one only with a width of 1, so that what is used is one piece of memory.
        width: Most tokens of each.
        vocabulary: Of the logits.
    """

    def __init__(self, rows: int, width: int, vocabulary: int) -> None:
        self.width = width
        self.logits = np.zeros((rows, width, vocabulary), np.float32)
        self._ids = np.zeros((rows, width), np.int64)
        self._positions = np.zeros((rows, width), np.int64)
        self._valid = np.zeros(rows, np.int32)
        self._total = np.zeros((), np.int32)
        self._places = np.tile(np.arange(width), (rows, 1))

    def fill(self, tokens: Sequence[Sequence[int]] | Int64, held: Int64) -> None:
        """Write the feeds of a call, as `step_feeds` states them; ``held`` int64 [rows]."""
        rows, width = len(tokens), len(tokens[0])
        self._ids[:rows, :width] = tokens
        self._positions[:rows, :width] = held[:, None] + self._places[:rows, :width]
        self._valid[:rows] = held + (width - 1)
        self._total[...] = held.max() + width

    def arrays(self, rows: int, width: int) -> tuple[dict[str, NDArray[Any]], Floats]:
        """(feeds, logits) of calls for so many rows and tokens: the memory itself."""
        feeds: dict[str, NDArray[Any]] = {
            "input_ids": self._ids[:rows, :width],
            "position_ids": self._positions[:rows, :width],
            "seqlens_k": self._valid[:rows],
            "total_sequence_length": self._total,
            "logits_index": self._places[:rows, :width],
        }
        return feeds, self.logits[:rows, :width]


def piece_end(start: int, most: int, length: int) -> int:
    """Where a piece of a prompt ends that begins at ``start`` and has at most ``most`` tokens, at least 3.

    No single token is left for the next one: attention rounds one token, as a decode step has it, otherwise than
    several, and what a prompt is cut into would show in its logits.
    """
    end = min(start + most, length)
    return end - 1 if end == length - 1 and end - start > 1 else end


def grouped(lengths: Sequence[int], most: int = PREFILL_TOKENS) -> list[list[int]]:
    """Prompts that are prefilled together, by index: of similar length, at most ``most`` padded tokens."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        # Ascending order: this one is the longest so far and sets the width.
        if groups and (len(groups[-1]) + 1) * lengths[index] <= most:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
