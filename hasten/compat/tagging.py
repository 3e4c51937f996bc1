"""transformers' token-classification pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from artifacts.errors import UsageError
from runtimes.tasks.numbers import softmax
from runtimes.tasks.tag import group_labels
from runtimes.text import Tokens

from .calls import Pipeline, texts_of

_STRATEGIES = ("none", "simple", "first", "average", "max")
Scores = NDArray[np.float64]


@dataclass(frozen=True)
class _Token:
    """A token, or the tokens of a word, with the scores of the labels [c]."""

    word: str
    scores: Scores
    start: int
    end: int
    index: int
    continues: bool


@dataclass(frozen=True)
class _Labelled:
    label: str
    score: float
    word: str
    start: int
    end: int


class TokenClassification(Pipeline):
    """The entities of texts: a list of ``entity`` or ``entity_group``, ``score``, ``word``, ``start``, ``end``."""

    task: ClassVar[str] = "token-classification"
    options: ClassVar[tuple[str, ...]] = ("aggregation_strategy", "ignore_labels")

    def read(self, options: Mapping[str, Any]) -> tuple[str, frozenset[str]]:
        """``aggregation_strategy``: none, simple, first, average or max; ``ignore_labels``: ``["O"]`` by default."""
        strategy = options.get("aggregation_strategy") or "none"
        name = str(getattr(strategy, "value", strategy)).lower()
        if name not in _STRATEGIES:
            raise UsageError(f"aggregation_strategy is {strategy!r}", f"Pass one of {', '.join(_STRATEGIES)}")
        ignored = options.get("ignore_labels")
        return name, frozenset({"O"} if ignored is None else ignored)

    def answers(self, inputs: Sequence[Any], options: Any) -> list[Any]:
        """The entities of each text, in reading order."""
        strategy, ignored = options
        texts = texts_of(inputs)
        found: dict[int, Any] = {}
        for place, row, (logits,) in self.source.logits(texts, "logits", offsets=True):
            tokens = self._tokens(texts[place], row, softmax(logits[: len(row)]) if len(row) else logits[:0])
            if strategy == "none":
                entities = [self._entity(token) for token in tokens]
            else:
                grouped = self._labelled(tokens, strategy)
                entities = [
                    self._group(grouped[first:last]) for first, last in group_labels([g.label for g in grouped])
                ]
            found[place] = [one for one in entities if ignored.isdisjoint({one.get("entity"), one.get("entity_group")})]
        return [found[index] for index in range(len(texts))]

    def _tokens(self, text: str, row: Tokens, scores: Scores) -> list[_Token]:
        tokenizer = self.source.encoder.tokenizer
        prefixed = bool(getattr(tokenizer.model, "continuing_subword_prefix", None))
        unknown = self._unknown()
        found = []
        for index in np.flatnonzero(~row.special).tolist():
            start, end = (int(place) for place in row.offsets[index])
            word = tokenizer.id_to_token(int(row.ids[index])) or ""
            # As transformers: a token that is written with a prefix continues a word; without prefixes, one that does
            # not stand after a space.
            continues = len(word) != end - start if prefixed else start > 0 and " " not in text[start - 1 : start + 1]
            if int(row.ids[index]) == unknown:
                word, continues = text[start:end], False
            found.append(_Token(word, scores[index], start, end, index, continues))
        return found

    def _unknown(self) -> int | None:
        tokenizer = self.source.encoder.tokenizer
        names = (getattr(tokenizer.model, "unk_token", None), "[UNK]", "<unk>")
        return next((found for name in names if name and (found := tokenizer.token_to_id(name)) is not None), None)

    def _entity(self, token: _Token) -> dict[str, object]:
        best = int(token.scores.argmax())
        return {
            "entity": self.source.label(best),
            "score": float(token.scores[best]),
            "index": token.index,
            "word": token.word,
            "start": token.start,
            "end": token.end,
        }

    def _labelled(self, tokens: list[_Token], strategy: str) -> list[_Labelled]:
        """Tokens, or with a strategy for words the words, each with its label."""
        words: list[list[_Token]] = []
        for token in tokens:
            if words and token.continues and strategy != "simple":
                words[-1].append(token)
            else:
                words.append([token])
        return [self._word(word, strategy) for word in words]

    def _word(self, tokens: list[_Token], strategy: str) -> _Labelled:
        scores = tokens[0].scores
        if strategy == "max":
            scores = max(tokens, key=lambda token: float(token.scores.max())).scores
        elif strategy == "average":
            scores = np.stack([token.scores for token in tokens]).mean(axis=0)
        best = int(scores.argmax())
        word = tokens[0].word if strategy == "simple" else self._spell([token.word for token in tokens])
        return _Labelled(self.source.label(best), float(scores[best]), word, tokens[0].start, tokens[-1].end)

    def _group(self, parts: list[_Labelled]) -> dict[str, object]:
        return {
            "entity_group": parts[0].label.split("-", 1)[-1],
            "score": float(np.mean([part.score for part in parts])),
            "word": self._spell([part.word for part in parts]),
            "start": parts[0].start,
            "end": parts[-1].end,
        }

    def _spell(self, words: list[str]) -> str:
        decoder = self.source.encoder.tokenizer.decoder
        return " ".join(words) if decoder is None else str(decoder.decode(words))
