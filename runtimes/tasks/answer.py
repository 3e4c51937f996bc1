"""A question and a context to the stretch of the context that answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import numpy as np

from artifacts.errors import UsageError

from ..items import check_text
from ..pipeline import in_order
from ..pool import Arrays
from ..text import Batch, Tokens
from .base import Record, TextTask, text_field
from .numbers import best_spans

_WINDOWS = 64


@dataclass(frozen=True)
class Answer:
    """Where a context answers a question.

    Attributes:
        text: ``context[start:end]``; empty if there is no answer.
        score: Probability that the answer starts here times that it ends here, within its window of the context.
        start: First character.
        end: Character after the last.
    """

    text: str
    score: float
    start: int
    end: int

    def to_dict(self) -> dict[str, object]:
        """As JSON."""
        return {"text": self.text, "score": self.score, "start": self.start, "end": self.end}


class Answerer(TextTask):
    """An extractive question answering model."""

    task: ClassVar[str] = "question-answering"
    method: ClassVar[str] = "answer(question, context)"

    def answer(
        self,
        question: str,
        context: str,
        *,
        no_answer: bool = False,
        max_answer_tokens: int = 15,
        max_tokens: int | None = None,
    ) -> Answer:
        """The best answer in the context, which may be of any length: it is read in overlapping windows.

        Scores and windows are those of transformers' question-answering pipeline (4.x; later versions have none):
        windows of at most 384 tokens which share 128, the product of the softmaxes over context tokens and [CLS],
        answers widened to whole words. The best span counts once; scores of equal texts are not added up.

        Args:
            question: The question; cut to 64 tokens.
            context: Where to look.
            no_answer: Whether "there is no answer" may win (models trained on SQuAD 2): it does where every window
                finds it likelier than the best answer.
            max_answer_tokens: Most tokens of an answer.
            max_tokens: Padded tokens a batch; None: as many as suit this machine.

        Returns:
            The answer; empty text at 0:0 where "no answer" wins or the context has no tokens.

        Raises:
            UsageError: Question or context is not a str, or a number is not positive.
            ProviderError: ONNX Runtime failed.
        """
        question, context = check_text(question, "the question"), check_text(context, "the context")
        tokens = self._opened().max_tokens if max_tokens is None else max_tokens
        if max_answer_tokens < 1 or tokens < 1:
            raise UsageError("max_answer_tokens and max_tokens are counts", "Pass positive numbers")
        best: Answer | None = None
        null = 1.0
        for row, start, end in self._logits(question, context, tokens):
            first = 0 if len(row) and row.special[0] else None
            spans, nothing = best_spans(start, end, row.context, no_answer=first, longest=max_answer_tokens, count=1)
            null = min(null, nothing)
            for head, tail, score in spans:
                if best is None or score > best.score:
                    left, right = int(row.words[head, 0]), int(row.words[tail, 1])
                    best = Answer(context[left:right], score, left, right)
        if best is None or (no_answer and null > best.score):
            return Answer("", null, 0, 0)
        return best

    def rows(self, records: Sequence[Record], *, max_tokens: int | None = None) -> list[dict[str, object]]:
        """An `Answer` for each ``question`` and ``context``."""
        pairs = [(text_field(record, "question"), text_field(record, "context")) for record in records]
        return [self.answer(question, context, max_tokens=max_tokens).to_dict() for question, context in pairs]

    def _logits(self, question: str, context: str, max_tokens: int) -> Iterator[tuple[Tokens, np.ndarray, np.ndarray]]:
        """Each window with its start and end logits, in reading order."""
        found = self._flow(self._chunks(question, context, max_tokens))
        for row, start, end in in_order((batch.indices, self._rows(batch, outputs)) for batch, outputs in found):
            yield row, start[: len(row)], end[: len(row)]

    def _rows(self, batch: Batch, outputs: Arrays) -> Iterator[tuple[Tokens, np.ndarray, np.ndarray]]:
        starts, ends = self._output(outputs, "start_logits"), self._output(outputs, "end_logits")
        return zip(batch.rows, starts, ends, strict=True)

    def _chunks(self, question: str, context: str, max_tokens: int) -> Iterator[list[Batch]]:
        """Batches of the windows, a bounded number of windows at a time."""
        windows = self.encoder.windows(question, context)
        start = 0
        while rows := list(islice(windows, _WINDOWS)):
            places = [(start + index,) for index in range(len(rows))]
            yield list(self.encoder.group(rows, places, max_tokens=max_tokens))
            start += len(rows)
