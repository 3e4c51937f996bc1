"""Texts to vectors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..items import check_texts, read_texts
from ..pipeline import in_order
from ..pool import Arrays
from ..text import Batch
from .base import Record, TextTask, text_field
from .numbers import masked_mean


class Embedder(TextTask):
    """A sentence encoder."""

    task: ClassVar[str] = "feature-extraction"
    method: ClassVar[str] = "embed(texts)"

    def embed(self, texts: Iterable[str], *, max_tokens: int | None = None) -> NDArray[np.float32]:
        """A vector for each text: float32 [n, d], C-contiguous, in the order given; [0, d] for no texts.

        Pooling and normalisation are part of the graph. A graph that gives token vectors only (``last_hidden_state``)
        is pooled here by the mean over the attended tokens.

        A vector depends on the texts it is batched with by rounding only: over STS-B, float32 changes by 6e-8, bfloat16
        by 7e-4 (cosine 0.99999), static int8 by a step of its scale at most. Dynamic int8 takes its scales from the
        whole batch: alone and in company a text has vectors of cosine 0.993 on average, 0.978 at least, on average as
        far apart as they are from float32.

        Args:
            texts: The texts, in any iterable. A long one is truncated to the model's ``max_length`` tokens.
            max_tokens: Padded tokens a batch; None: as many as suit this machine.

        Raises:
            UsageError: ``texts`` is a single str, or an element is not a str.
            ProviderError: ONNX Runtime failed.
        """
        items = check_texts(texts, method="embed")
        result: NDArray[np.float32] | None = None
        for batch, outputs in self._batches(items, max_tokens=max_tokens):
            vectors = self._vectors(batch, outputs)
            if result is None:
                result = np.empty((len(items), vectors.shape[1]), np.float32)
            result[list(batch.indices)] = vectors
        return np.empty((0, self._width()), np.float32) if result is None else result

    def embed_iter(self, texts: Iterable[str], *, max_tokens: int | None = None) -> Iterator[NDArray[np.float32]]:
        """The vectors of `embed`, float32 [d] each, one after another in the order given, at constant memory.

        ``texts`` may be endless. It is read on the caller's thread, some thousands of texts ahead of what is yielded.

        Args:
            texts: The texts.
            max_tokens: Padded tokens a batch; None: as many as suit this machine.

        Raises:
            UsageError: At once: ``texts`` is a single str. When it is read: an element is not a str.
            ProviderError: ONNX Runtime failed.
        """
        found = self._batches(read_texts(texts, method="embed_iter"), max_tokens=max_tokens)
        # Copies: a vector that the caller keeps must not keep its whole batch.
        return in_order((batch.indices, map(np.copy, self._vectors(batch, outputs))) for batch, outputs in found)

    def rows(self, records: Sequence[Record], *, max_tokens: int | None = None) -> list[dict[str, object]]:
        """``{"embedding": [...]}`` for each ``text``."""
        vectors = self.embed([text_field(record, "text") for record in records], max_tokens=max_tokens)
        return [{"embedding": vector.tolist()} for vector in vectors]

    def _vectors(self, batch: Batch, outputs: Arrays) -> NDArray[np.float32]:
        found = self._output(outputs, "sentence_embedding", "last_hidden_state")
        if found.ndim == 3:
            attended = np.zeros(found.shape[:2], np.int64)
            for index, row in enumerate(batch.rows):
                attended[index, : max(1, len(row))] = 1
            return masked_mean(found, attended)
        return found.astype(np.float32, copy=False)

    def _width(self) -> int:
        shapes = {spec.name: spec.shape for spec in self.bundle.manifest.outputs}
        shape = shapes.get("sentence_embedding") or shapes.get("last_hidden_state") or (0,)
        if isinstance(shape[-1], int):
            return shape[-1]
        # The graph leaves its width symbolic: one empty text tells it.
        return int(self.embed([""]).shape[1])
