"""What the three sentence-transformers peers share: its own tokenizing, sorting and pooling, by ``encode``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from protocol import Ids, Setting, Vectors


class Encoder(Setting):
    """A SentenceTransformer on any backend."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def vectors(self, ids: Ids, mask: Ids) -> Vectors:
        """See `Setting.vectors`."""
        features = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        features["token_type_ids"] = torch.zeros_like(features["input_ids"])
        with torch.inference_mode():
            found: Vectors = self._model(features)["sentence_embedding"].float().numpy()
        return found

    def embed(self, texts: Sequence[str], batch: int) -> Vectors:
        """See `Setting.embed`."""
        found = self._model.encode(
            list(texts), batch_size=batch, normalize_embeddings=True, convert_to_numpy=True, show_progress_bar=False
        )
        return np.asarray(found, np.float32)
