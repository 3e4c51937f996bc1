"""Texts to the entities in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from ..items import check_texts
from ..text import Tokens
from .base import Record, TextTask, text_field
from .numbers import softmax


@dataclass(frozen=True)
class Entity:
    """A stretch of text with one label.

    Attributes:
        label: What it is, without B- or I-.
        score: Mean probability of its tokens' labels.
        text: ``text[start:end]`` of the input.
        start: First character.
        end: Character after the last.
    """

    label: str
    score: float
    text: str
    start: int
    end: int

    def to_dict(self) -> dict[str, object]:
        """As JSON."""
        return {"label": self.label, "score": self.score, "text": self.text, "start": self.start, "end": self.end}


class Tagger(TextTask):
    """A token classifier."""

    task: ClassVar[str] = "token-classification"
    method: ClassVar[str] = "tag(texts)"

    def tag(self, texts: Iterable[str], *, max_tokens: int | None = None) -> list[list[Entity]]:
        """The entities of each text in reading order, texts in the order given.

        Neighbouring tokens of one label make one entity, a B- label starts another; tokens labelled O are left out: the
        "simple" aggregation of transformers' token-classification pipeline, except that `Entity.text` is cut from the
        input instead of being put together from tokens.

        Args:
            texts: The texts. A long one is truncated to the model's ``max_length`` tokens.
            max_tokens: Padded tokens a batch; None: as many as suit this machine.

        Raises:
            UsageError: ``texts`` is a single str, or an element is not a str.
            ProviderError: ONNX Runtime failed.
        """
        items = [str(item) for item in check_texts(texts, method="tag")]
        results: dict[int, list[Entity]] = {}
        for batch, outputs in self._batches(items, max_tokens=max_tokens, offsets=True):
            logits = self._output(outputs, "logits")
            for index, row, scores in zip(batch.indices, batch.rows, softmax(logits), strict=True):
                results[index] = self._entities(items[index], row, scores[: len(row)])
        return [results[index] for index in range(len(items))]

    def rows(self, records: Sequence[Record], *, max_tokens: int | None = None) -> list[dict[str, object]]:
        """``{"entities": [...]}`` for each ``text``."""
        found = self.tag([text_field(record, "text") for record in records], max_tokens=max_tokens)
        return [{"entities": [entity.to_dict() for entity in entities]} for entities in found]

    def _entities(self, text: str, row: Tokens, scores: NDArray[np.float64]) -> list[Entity]:
        kept = np.flatnonzero(~row.special)
        labels = [self.label(int(best)) for best in scores[kept].argmax(axis=-1)]
        values = scores[kept].max(axis=-1, initial=0.0)
        offsets = row.offsets[kept]
        entities = []
        for first, last in group_labels(labels):
            start, end = int(offsets[first, 0]), int(offsets[last - 1, 1])
            name = labels[first].split("-", 1)[-1]
            if name != "O":
                entities.append(Entity(name, float(values[first:last].mean()), text[start:end], start, end))
        return entities


def group_labels(labels: Sequence[str]) -> list[tuple[int, int]]:
    """Stretches [first, last) of tokens that belong together: same type as the one before, and not starting with B-."""
    cuts = [0]
    for index, (before, label) in enumerate(pairwise(labels), start=1):
        if label.startswith("B-") or _type(label) != _type(before):
            cuts.append(index)
    return list(pairwise([*cuts, len(labels)])) if labels else []


def _type(label: str) -> str:
    return label[2:] if label.startswith(("B-", "I-")) else label
