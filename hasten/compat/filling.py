"""transformers' fill-mask pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from artifacts.errors import UsageError
from runtimes.tasks.numbers import softmax
from runtimes.text import Tokens

from .calls import Pipeline, check_truncation, texts_of
from .source import count_of


class FillMask(Pipeline):
    """Tokens for the mask of a text: a list of ``score``, ``token``, ``token_str``, ``sequence``; one a mask."""

    task: ClassVar[str] = "fill-mask"
    options: ClassVar[tuple[str, ...]] = ("top_k", "targets", "tokenizer_kwargs")

    def read(self, options: Mapping[str, Any]) -> tuple[int, NDArray[np.int64] | None]:
        """``top_k`` tokens, of ``targets`` only; of ``tokenizer_kwargs`` only ``truncation``."""
        inner = options.get("tokenizer_kwargs") or {}
        if others := [name for name in inner if name != "truncation"]:
            raise UsageError(f"hasten has no {others[0]!r} in tokenizer_kwargs", "Leave it out")
        check_truncation(inner)
        top = options.get("top_k")
        targets = options.get("targets")
        return 5 if top is None else count_of(top, "top_k"), None if targets is None else self._ids(targets)

    def answers(self, inputs: Sequence[Any], options: Any) -> list[Any]:
        """The likeliest tokens for each mask, from the best down; a list a mask where a text has several."""
        count, targets = options
        texts = texts_of(inputs)
        mask_id = self.source.encoder.mask_id
        found: dict[int, Any] = {}
        for place, row, (logits,) in self.source.logits(texts, "logits"):
            masks = np.flatnonzero(row.ids == mask_id)
            if not len(masks):
                raise UsageError(f"text {place} has no mask", f"Write {self.source.processor.mask_token} in it")
            filled = [self._best(row, int(mask), logits[mask], count, targets, len(masks) == 1) for mask in masks]
            found[place] = filled[0] if len(masks) == 1 else filled
        return [found[index] for index in range(len(texts))]

    def __call__(self, inputs: Any, **options: Any) -> Any:
        """As `Pipeline.__call__`; for a list of one text, the result of that text: what transformers does."""
        answer = super().__call__(inputs, **options)
        return answer[0] if isinstance(inputs, list) and len(inputs) == 1 else answer

    def _best(
        self,
        row: Tokens,
        mask: int,
        logits: NDArray[Any],
        count: int,
        targets: NDArray[np.int64] | None,
        single: bool,
    ) -> list[dict[str, object]]:
        tokenizer = self.source.encoder.tokenizer
        scores = softmax(logits)
        possible = np.arange(len(scores)) if targets is None else targets
        order = possible[np.argsort(-scores[possible], kind="stable")[:count]]
        found: list[dict[str, object]] = []
        for token in order.tolist():
            ids = row.ids.copy()
            ids[mask] = token
            kept = ids[ids != self.source.processor.pad_id]
            sequence = tokenizer.decode(kept.tolist(), skip_special_tokens=single)
            text = tokenizer.decode([token], skip_special_tokens=False)
            found.append({"score": float(scores[token]), "token": token, "token_str": text, "sequence": sequence})
        return found

    def _ids(self, targets: object) -> NDArray[np.int64]:
        words = texts_of([targets] if isinstance(targets, str) else list(targets))  # type: ignore[call-overload]
        tokenizer = self.source.encoder.tokenizer
        ids: set[int] = set()
        for word in words:
            known = tokenizer.token_to_id(word)
            # As transformers: of a word that is no token, the first of its tokens.
            tokens = [known] if known is not None else tokenizer.encode(word, add_special_tokens=False).ids
            ids.update(tokens[:1])
        if not ids:
            raise UsageError("no target is a token", "Pass words")
        return np.array(sorted(ids), np.int64)
