"""Prefill and decode over the one graph of docs/format.md, on a KV cache that is updated in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..session import Binding, Session
from .cache import CacheLayout, KVCache
from .feeds import step_feeds
from .results import log_softmax

Floats = NDArray[np.float32]
Int64 = NDArray[np.int64]

PREFILL_TOKENS = 256
"""Padded tokens of a prefill call: it bounds the memory of a long prompt, and fills the kernels.

GroupQueryAttention computes the scores above the diagonal too, so that smaller pieces save some of them."""
_SCORED_BYTES = 64 << 20


class Decoder:
    """A session with a KV cache for some rows. Not to be used by two threads at once.

    Args:
        session: The graph.
        layout: Of its cache.
        vocabulary: Tokens that logits are given for.
        rows: Slots.
        capacity: Tokens of each.
    """

    def __init__(self, session: Session, layout: CacheLayout, vocabulary: int, *, rows: int, capacity: int) -> None:
        self.cache = KVCache(layout, rows, capacity)
        self.vocabulary = vocabulary
        self._session = session
        self._bindings: dict[int, Binding] = {}
        # What a decode step reads and writes, for all slots; a step of fewer rows is bound to the first of them.
        self._ids = np.zeros((rows, 1), np.int64)
        self._positions = np.zeros((rows, 1), np.int64)
        self._valid = np.zeros(rows, np.int32)
        self._total = np.zeros((), np.int32)
        self._first = np.zeros((rows, 1), np.int64)
        self._logits = np.zeros((rows, 1, vocabulary), np.float32)

    def step(self, tokens: Sequence[int], lengths: Sequence[int]) -> Floats:
        """One token more for the first ``len(tokens)`` slots.

        Args:
            tokens: The last token of each row, not yet in the cache.
            lengths: Tokens of each row in the cache.

        Returns:
            Logits of the next token, float32 [rows, vocabulary]: the graph's own output, overwritten by the next step;
            the caller may alter them.

        Raises:
            ProviderError: ONNX Runtime failed.
        """
        rows = len(tokens)
        self._ids[:rows, 0] = tokens
        self._positions[:rows, 0] = lengths
        self._valid[:rows] = lengths
        self._total[...] = max(lengths) + 1
        if rows not in self._bindings:
            self._bindings[rows] = self._bind_step(rows)
        self._bindings[rows].run()
        return self._logits[:rows, 0]

    def prefill(
        self, slot: int, prompts: Sequence[Sequence[int]], *, start: int = 0, stop: Callable[[], bool] | None = None
    ) -> Floats | None:
        """Read the prompts into the slots from ``slot`` on.

        Several go in one call, padded; a single one in pieces of `PREFILL_TOKENS`.

        Args:
            slot: The first prompt's.
            prompts: Token ids, none empty; see `grouped`.
            start: Tokens of a single prompt that the cache holds already.
            stop: Asked between pieces; True ends the prefill.

        Returns:
            Logits of the token after each prompt, float32 [prompts, vocabulary]; None if it was stopped.

        Raises:
            ProviderError: ONNX Runtime failed.
        """
        if len(prompts) > 1:
            return self._call(slot, prompts, 0)
        prompt, logits = prompts[0], None
        while start < len(prompt):
            if stop is not None and stop():
                return None
            end = min(start + PREFILL_TOKENS, len(prompt))
            logits = self._call(slot, [prompt[start:end]], start)
            start = end
        return logits

    def grow(self, capacity: int, lengths: Sequence[int]) -> None:
        """Make room for so many tokens a row; see `KVCache.grow`."""
        self.cache.grow(capacity, lengths)
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

    def _call(self, slot: int, prompts: Sequence[Sequence[int]], start: int) -> Floats:
        places = np.array([[len(prompt) - 1] for prompt in prompts], np.int64)
        return self._run(slot, prompts, start, places)[:, 0]

    def _run(self, slot: int, prompts: Sequence[Sequence[int]], start: int, places: Int64) -> Floats:
        feeds = step_feeds(prompts, start, places)
        past, present = self.cache.views(slot, slot + len(prompts))
        logits = np.empty((*places.shape, self.vocabulary), np.float32)
        self._session.bind({**feeds, **past}, {"logits": logits, **present}).run()
        return logits

    def _bind_step(self, rows: int) -> Binding:
        past, present = self.cache.views(0, rows)
        feeds: dict[str, NDArray[Any]] = {
            "input_ids": self._ids[:rows],
            "position_ids": self._positions[:rows],
            "seqlens_k": self._valid[:rows],
            "total_sequence_length": self._total,
            "logits_index": self._first[:rows],
        }
        return self._session.bind({**feeds, **past}, {"logits": self._logits[:rows], **present})


def grouped(lengths: Sequence[int]) -> list[list[int]]:
    """Prompts that are prefilled together, by index: of similar length, at most `PREFILL_TOKENS` padded tokens."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: lengths[index]):
        # Ascending order: this one is the longest so far and sets the width.
        if groups and (len(groups[-1]) + 1) * lengths[index] <= PREFILL_TOKENS:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups
