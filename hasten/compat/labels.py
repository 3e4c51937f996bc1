"""transformers' text-classification pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from artifacts.errors import UsageError
from runtimes.items import Item
from runtimes.tasks.numbers import class_scores, sigmoid, softmax

from .calls import Pipeline, check_truncation
from .source import count_of

_FUNCTIONS = ("default", "softmax", "sigmoid", "none")


@dataclass(frozen=True)
class _Options:
    function: str
    best: bool
    count: int | None


class TextClassification(Pipeline):
    """The classes of texts, or of pairs of texts: ``{"label": …, "score": …}``, or with ``top_k`` a list of them."""

    task: ClassVar[str] = "text-classification"
    options: ClassVar[tuple[str, ...]] = ("top_k", "function_to_apply", "truncation")

    def alone(self, inputs: object) -> bool:
        """A text, or ``{"text": …, "text_pair": …}``."""
        return isinstance(inputs, str | Mapping)

    def shape_alone(self, answer: Any, inputs: object, options: Mapping[str, object]) -> Any:
        """A text's in a list, unless the call names ``top_k``: what transformers does."""
        return [answer] if isinstance(inputs, str) and "top_k" not in options else answer

    def read(self, options: Mapping[str, Any]) -> _Options:
        """``top_k``: so many classes, None: all; ``function_to_apply``: softmax, sigmoid, none or default."""
        check_truncation(options)
        name = options.get("function_to_apply") or "default"
        if not isinstance(name, str) or name.lower() not in _FUNCTIONS:
            raise UsageError(f"function_to_apply is {name!r}", f"Pass one of {', '.join(_FUNCTIONS)}")
        top = options.get("top_k", "")
        count = None if top in {None, ""} else count_of(top, "top_k")
        return _Options(name.lower(), "top_k" not in options or top == "", count)

    def answers(self, inputs: Sequence[Any], options: Any) -> list[Any]:
        """A class, or a list of classes from the best down, for each text."""
        items = [_item(one, index) for index, one in enumerate(inputs)]
        if options.function == "default":
            # What an engine batches and caches; below, tensors are run as they are.
            records = [{"text": one[0], "text_pair": one[1]} if isinstance(one, tuple) else one for one in items]
            rows = self.source.model.rows(records)
            found = {index: row["scores"] for index, row in enumerate(rows)}
        else:
            found = {
                place: {
                    self.source.label(index): float(score) for index, score in enumerate(self._scores(row, options))
                }
                for place, _, (row,) in self.source.logits(items, "logits")
            }
        return [_shaped(found[index], options) for index in range(len(items))]

    def _scores(self, logits: NDArray[Any], options: _Options) -> NDArray[np.float64]:
        if options.function == "softmax":
            return softmax(logits)
        if options.function == "sigmoid":
            return sigmoid(logits)
        return class_scores(logits, "regression")


def _item(one: object, index: int) -> Item:
    if isinstance(one, str):
        return one
    if isinstance(one, Mapping) and set(one) <= {"text", "text_pair"}:
        first, second = one.get("text"), one.get("text_pair")
        if isinstance(first, str) and second is None:
            return first
        if isinstance(first, str) and isinstance(second, str):
            return first, second
    raise UsageError(f"input {index} is no text", 'Pass a text, or {"text": "…", "text_pair": "…"}')


def _shaped(scores: Mapping[str, float], options: _Options) -> Any:
    order = sorted(scores.items(), key=lambda item: -item[1])
    classes = [{"label": label, "score": score} for label, score in order]
    return classes[0] if options.best else classes[: options.count]
