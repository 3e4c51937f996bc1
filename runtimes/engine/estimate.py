"""How many tokens an input has, before anything tokenized it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_FIRST_RATIO = 4.0
_MEMORY = 0.05
_SPECIAL_TOKENS = 2
_ANSWER_TOKENS = 128
_DEPTH = 8


class Lengths:
    """Characters of a token, learned from what was tokenized.

    Args:
        longest: Tokens to which an input is cut; 0: it is not.
    """

    def __init__(self, longest: int = 0) -> None:
        self._longest = longest
        self._ratio = _FIRST_RATIO

    def tokens(self, item: object) -> int:
        """Of a text, a record or a prompt, as estimated; 1 at least."""
        found = int(characters(item) / self._ratio) + _SPECIAL_TOKENS
        return min(found, self._longest) if self._longest else found

    def writing(self, prompt: object, options: Mapping[str, Any]) -> int:
        """Of a prompt and its answer."""
        most = options.get("max_new_tokens")
        answer = most if isinstance(most, int) and most > 0 else _ANSWER_TOKENS
        texts = options.get("n") or 1
        return self.tokens(prompt) + answer * (texts if isinstance(texts, int) else 1)

    def learn(self, items: Sequence[object], tokens: int) -> None:
        """These items were so many tokens."""
        count = tokens - _SPECIAL_TOKENS * len(items)
        total = sum(characters(item) for item in items)
        if count > 0 and total > 0 and not (self._longest and tokens >= self._longest * len(items)):
            self._ratio += _MEMORY * (min(max(total / count, 0.25), 16.0) - self._ratio)


def characters(item: object, depth: int = 0) -> int:
    """Characters of the texts in a text, pair, record or list; a number counts as one token."""
    if isinstance(item, str):
        return len(item)
    if isinstance(item, np.ndarray):
        return int(_FIRST_RATIO * item.size)
    parts = item.values() if isinstance(item, Mapping) else item
    if depth > _DEPTH or not isinstance(parts, Collection):
        return int(_FIRST_RATIO)
    return sum(characters(part, depth + 1) for part in parts)


def rows_of(feeds: Mapping[str, NDArray[Any]]) -> int:
    """What running plain tensors costs: token ids where the first input has some, else its rows."""
    first = next(iter(feeds.values()), None)
    if first is None or not first.ndim:
        return 1
    return max(1, first.size if first.dtype.kind in "iu" else first.shape[0])
