"""transformers' feature-extraction pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from artifacts.errors import UsageError

from .calls import Pipeline, as_tensor, check_truncation, texts_of


class FeatureExtraction(Pipeline):
    """A vector for each token: nested lists [1, tokens, d] for each text, special tokens included."""

    task: ClassVar[str] = "feature-extraction"
    options: ClassVar[tuple[str, ...]] = ("return_tensors", "truncation", "tokenize_kwargs")

    def read(self, options: Mapping[str, Any]) -> bool:
        """``return_tensors``: a torch tensor for each text instead. Of ``tokenize_kwargs`` only ``truncation``."""
        inner = options.get("tokenize_kwargs") or {}
        if others := [name for name in inner if name != "truncation"]:
            raise UsageError(f"hasten has no {others[0]!r} in tokenize_kwargs", "Leave it out")
        check_truncation({**inner, **options} if options.get("truncation") is not None else inner)
        outputs = [spec.name for spec in self.source.bundle.manifest.outputs]
        if "last_hidden_state" not in outputs:
            raise UsageError(
                "this bundle gives one vector for a text, and the pipeline one for each token",
                "Use SentenceTransformer.encode, or compile the model with pooling none",
            )
        return bool(options.get("return_tensors"))

    def answers(self, inputs: Sequence[Any], options: Any) -> list[Any]:
        """The token vectors of each text."""
        found: dict[int, Any] = {}
        for place, row, (states,) in self.source.logits(texts_of(inputs), "last_hidden_state"):
            vectors = np.ascontiguousarray(states[None, : max(1, len(row))], np.float32)
            found[place] = as_tensor(vectors) if options else vectors.tolist()
        return [found[index] for index in range(len(inputs))]
