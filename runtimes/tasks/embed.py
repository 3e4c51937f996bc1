"""Texts to vectors."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..text import MAX_TOKENS, Batch, check_texts
from .base import Record, TextTask, text_field
from .numbers import masked_mean


class Embedder(TextTask):
    """A sentence encoder."""

    task: ClassVar[str] = "feature-extraction"
    method: ClassVar[str] = "embed(texts)"

    def embed(self, texts: Iterable[str], *, max_tokens: int = MAX_TOKENS) -> NDArray[np.float32]:
        """A vector for each text: float32 [n, d], C-contiguous, in the order given; [0, d] for no texts.

        Pooling and normalisation are part of the graph. A graph that gives token vectors only (``last_hidden_state``)
        is pooled here by the mean over the attended tokens.

        Args:
            texts: The texts. A long one is truncated to the model's ``max_length`` tokens.
            max_tokens: Padded tokens a batch.

        Raises:
            UsageError: ``texts`` is a single str, or an element is not a str.
            ProviderError: ONNX Runtime failed.
        """
        items = check_texts(texts, method="embed")
        result: NDArray[np.float32] | None = None
        for batch in self.encoder.batches(items, max_tokens=max_tokens):
            vectors = self._vectors(batch)
            if result is None:
                result = np.empty((len(items), vectors.shape[1]), np.float32)
            result[list(batch.indices)] = vectors
        return np.empty((0, self._width()), np.float32) if result is None else result

    def rows(self, records: Sequence[Record], *, max_tokens: int = MAX_TOKENS) -> list[dict[str, object]]:
        """``{"embedding": [...]}`` for each ``text``."""
        vectors = self.embed([text_field(record, "text") for record in records], max_tokens=max_tokens)
        return [{"embedding": vector.tolist()} for vector in vectors]

    def _vectors(self, batch: Batch) -> NDArray[np.float32]:
        outputs = self.run(batch.feeds)
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
