"""transformers' question-answering pipeline, as it was until version 5 left it out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from artifacts.errors import UsageError
from runtimes.items import check_text
from runtimes.tasks.numbers import best_spans
from runtimes.text import Tokens

from .calls import Pipeline
from .source import count_of

_FIXED = {"doc_stride": 128, "max_seq_len": 384, "max_question_len": 64, "align_to_words": True, "padding": None}


@dataclass(frozen=True)
class _Options:
    top_k: int
    longest: int
    impossible: bool


class QuestionAnswering(Pipeline):
    """Where contexts answer questions: ``score``, ``start``, ``end``, ``answer``; with ``top_k`` > 1 a list of them."""

    task: ClassVar[str] = "question-answering"
    options: ClassVar[tuple[str, ...]] = ("top_k", "topk", "max_answer_len", "handle_impossible_answer", *_FIXED)

    def __call__(self, inputs: Any = None, *, question: Any = None, context: Any = None, **options: Any) -> Any:
        """The answer for ``question=`` and ``context=``, or for ``{"question": …, "context": …}`` or a list of these.

        Raises:
            UsageError: An option or an input makes no sense.
            ProviderError: ONNX Runtime failed.
        """
        if question is not None or context is not None:
            if inputs is not None:
                raise UsageError("a question was given twice", "Pass question= and context=, or one argument")
            inputs = _pairs(question, context)
        return super().__call__(inputs, **options)

    def alone(self, inputs: object) -> bool:
        """A mapping with a question and a context."""
        return isinstance(inputs, Mapping)

    def read(self, options: Mapping[str, Any]) -> _Options:
        """``top_k`` answers of at most ``max_answer_len`` tokens; ``handle_impossible_answer``: there may be none."""
        for name, value in _FIXED.items():
            if options.get(name) not in {None, value}:
                raise UsageError(f"hasten's {name} is {value}", f"Leave out {name}")
        return _Options(
            count_of(options.get("top_k", options.get("topk", 1)), "top_k"),
            count_of(options.get("max_answer_len", 15), "max_answer_len"),
            bool(options.get("handle_impossible_answer", False)),
        )

    def answers(self, inputs: Sequence[Any], options: Any) -> list[Any]:
        """An answer, or a list of answers from the best down, for each question."""
        found = [self._answer(one, options) for one in inputs]
        return [answers[0] if options.top_k == 1 else answers for answers in found]

    def _answer(self, one: object, options: _Options) -> list[dict[str, object]]:
        if not isinstance(one, Mapping):
            raise UsageError("an input is no question", 'Pass {"question": "…", "context": "…"}')
        question = check_text(one.get("question"), "the question")
        context = check_text(one.get("context"), "the context")
        spans: dict[tuple[int, int], float] = {}
        null = 1.0
        for row, starts, ends in self._windows(question, context):
            first = 0 if len(row) and row.special[0] else None
            best, nothing = best_spans(
                starts, ends, row.context, no_answer=first, longest=options.longest, count=options.top_k
            )
            null = min(null, nothing)
            for head, tail, score in best:
                place = int(row.words[head, 0]), int(row.words[tail, 1])
                spans[place] = max(score, spans.get(place, 0.0))
        found = [_told(context, *place, score) for place, score in spans.items()]
        if options.impossible or not found:
            found.append(_told("", 0, 0, null if options.impossible else 0.0))
        return sorted(found, key=lambda answer: -float(str(answer["score"])))[: options.top_k]

    def _windows(self, question: str, context: str) -> Iterator[tuple[Tokens, Any, Any]]:
        rows = list(self.source.encoder.windows(question, context))
        for batch in self.source.encoder.group(rows, [(index,) for index in range(len(rows))]):
            outputs = self.source.run(batch.feeds)
            if missing := {"start_logits", "end_logits"} - set(outputs):
                raise UsageError(f"the graph has no output {min(missing)}", f"It has {', '.join(outputs)}")
            for index, row in enumerate(batch.rows):
                length = len(row)
                yield row, outputs["start_logits"][index, :length], outputs["end_logits"][index, :length]


def _pairs(question: object, context: object) -> Any:
    if isinstance(question, str) or not isinstance(question, Sequence):
        return {"question": question, "context": context}
    contexts = [context] * len(question) if isinstance(context, str) else context
    if not isinstance(contexts, Sequence) or len(contexts) != len(question):
        raise UsageError("there are more questions than contexts, or fewer", "Pass as many of both, or one context")
    return [{"question": one, "context": other} for one, other in zip(question, contexts, strict=True)]


def _told(context: str, start: int, end: int, score: float) -> dict[str, object]:
    return {"score": score, "start": start, "end": end, "answer": context[start:end]}
