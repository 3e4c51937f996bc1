"""Tokens for the masks of a text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from artifacts.errors import DataError, UsageError

from ..items import check_text
from ..text import Int64, Tokens
from .base import Record, TextTask, text_field
from .numbers import Floats, softmax


@dataclass(frozen=True)
class Filling:
    """One token for one mask.

    Attributes:
        token: The token as text.
        score: Its probability at the mask.
        text: The input with this mask filled; other masks stay.
        mask: Which mask of the text, from 0.
        id: Id of the token.
    """

    token: str
    score: float
    text: str
    mask: int = 0
    id: int = 0

    def to_dict(self) -> dict[str, object]:
        """As JSON."""
        return {"token": self.token, "score": self.score, "text": self.text, "mask": self.mask, "id": self.id}


class Filler(TextTask):
    """A masked language model."""

    task: ClassVar[str] = "fill-mask"
    method: ClassVar[str] = "fill(text)"

    def fill(self, text: str, top_k: int = 5) -> list[Filling]:
        """The likeliest tokens for each mask, from the best down; with several masks, mask after mask.

        As transformers' fill-mask pipeline: each mask on its own, the text decoded from tokens without special tokens
        (with several masks: without those the template added).

        Args:
            text: A text with at least one mask token.
            top_k: Tokens a mask; at most the vocabulary.

        Raises:
            UsageError: ``text`` is not a str, holds no mask within ``max_length`` tokens, or ``top_k`` < 1.
            ProviderError: ONNX Runtime failed.
        """
        text = check_text(text, "the text")
        if top_k < 1:
            raise UsageError(f"top_k is {top_k}", "Pass a positive number")
        mask_id = self.encoder.mask_id
        row = self.encoder.encode([text], offsets=True)[0]
        masks = np.flatnonzero(row.ids == mask_id)
        if not len(masks):
            token = self.processor.mask_token
            where = f" in its first {self.processor.max_length} tokens" if token in text else ""
            raise UsageError(f"the text has no mask{where}", f"Write {token} where a token is to be filled in")
        batch = next(self.encoder.group([row], [(0,)]))
        logits = self._output(self.run(batch.feeds), "logits")[0]
        return list(self._fillings(row, masks, logits, top_k))

    def rows(self, records: Sequence[Record], *, max_tokens: int | None = None) -> list[dict[str, object]]:
        """``{"fillings": [...]}`` for each ``text``; a record may say how many in ``top_k``."""
        rows: list[dict[str, object]] = []
        for record in records:
            top_k = record.get("top_k", 5) if isinstance(record, Mapping) else 5
            if not isinstance(top_k, int):
                raise DataError('field "top_k" is not a whole number', 'Leave "top_k" out, or give a positive number')
            rows.append({"fillings": [found.to_dict() for found in self.fill(text_field(record, "text"), top_k)]})
        return rows

    def _fillings(self, row: Tokens, masks: Int64, logits: Floats, top_k: int) -> Iterator[Filling]:
        tokenizer = self.encoder.tokenizer
        single = len(masks) == 1
        for number, position in enumerate(masks):
            scores = softmax(logits[position])
            for token in np.argsort(-scores, kind="stable")[:top_k]:
                ids = row.ids.copy()
                ids[position] = token
                kept = ids if single else ids[~row.special]
                text = tokenizer.decode(kept.tolist(), skip_special_tokens=single)
                name = tokenizer.decode([int(token)], skip_special_tokens=False)
                yield Filling(name, float(scores[token]), text, number, int(token))
