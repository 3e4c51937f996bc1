"""Texts to classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..items import Item, check_texts
from .base import Record, TextTask, text_field
from .numbers import class_scores


@dataclass(frozen=True)
class Classification:
    """The class of a text.

    Attributes:
        label: Name of the best class.
        score: Its score: a probability, or the raw value of a regression.
        scores: Score of every class, in the model's order.
    """

    label: str
    score: float
    scores: Mapping[str, float]

    def to_dict(self) -> dict[str, object]:
        """As JSON."""
        return {"label": self.label, "score": self.score, "scores": dict(self.scores)}


class Classifier(TextTask):
    """A sequence classifier."""

    task: ClassVar[str] = "text-classification"
    method: ClassVar[str] = "classify(texts)"

    def classify(self, texts: Iterable[Item], *, max_tokens: int | None = None) -> list[Classification]:
        """The class of each text, in the order given.

        Scores are the softmax over the classes; a sigmoid a class for multi-label models and models of one class; the
        raw value for regressions: as transformers' text-classification pipeline does.

        Args:
            texts: The texts; (text, text) for models of pairs, such as entailment. Long ones are truncated.
            max_tokens: Padded tokens a batch; None: as many as suit this machine.

        Raises:
            UsageError: ``texts`` is a single str, or an element is not a text.
            ProviderError: ONNX Runtime failed.
        """
        items = check_texts(texts, method="classify", pairs=True)
        results: dict[int, Classification] = {}
        for batch, outputs in self._batches(items, max_tokens=max_tokens):
            scores = class_scores(self._output(outputs, "logits"), self.processor.problem)
            results.update(zip(batch.indices, map(self._result, scores), strict=True))
        return [results[index] for index in range(len(items))]

    def rows(self, records: Sequence[Record], *, max_tokens: int | None = None) -> list[dict[str, object]]:
        """A `Classification` for each ``text``, or ``text`` and ``text_pair``."""
        items: list[Item] = [
            (text_field(record, "text"), text_field(record, "text_pair"))
            if isinstance(record, Mapping) and "text_pair" in record
            else text_field(record, "text")
            for record in records
        ]
        return [found.to_dict() for found in self.classify(items, max_tokens=max_tokens)]

    def _result(self, scores: NDArray[np.float64]) -> Classification:
        best = int(scores.argmax())
        named = {self.label(index): float(score) for index, score in enumerate(scores)}
        return Classification(self.label(best), float(scores[best]), named)
