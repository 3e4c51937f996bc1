"""What tasks compute from the outputs of a graph: pure functions of arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]


def softmax(logits: Floats) -> NDArray[np.float64]:
    """Softmax over the last axis, in float64, shifted by the maximum so that it never overflows."""
    shifted = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    result: NDArray[np.float64] = shifted / shifted.sum(axis=-1, keepdims=True)
    return result


def sigmoid(logits: Floats) -> NDArray[np.float64]:
    """Logistic function of each element, in float64, without overflow on either side."""
    result: NDArray[np.float64] = 0.5 * (1.0 + np.tanh(0.5 * logits.astype(np.float64)))
    return result


def class_scores(logits: Floats, problem: str) -> NDArray[np.float64]:
    """Scores of the classes, [n, c] -> float64 [n, c].

    The raw value for ``regression``, a sigmoid a class for ``multi_label_classification`` or a single class, else the
    softmax: as transformers' text classification does when asked for nothing else.
    """
    if problem == "regression":
        return logits.astype(np.float64)
    if problem == "multi_label_classification" or logits.shape[-1] == 1:
        return sigmoid(logits)
    return softmax(logits)


def masked_mean(states: Floats, mask: NDArray[np.integer]) -> NDArray[np.float32]:
    """Mean of the token vectors that the mask keeps: [n, s, d], [n, s] -> float32 [n, d]; zeros for an empty row."""
    weights = mask[..., None].astype(np.float32)
    total = (states.astype(np.float32) * weights).sum(axis=1)
    result: NDArray[np.float32] = total / np.maximum(weights.sum(axis=1), 1e-9)
    return result


def best_spans(
    start: Floats, end: Floats, allowed: NDArray[np.bool_], *, no_answer: int | None, longest: int, count: int
) -> tuple[list[tuple[int, int, float]], float]:
    """The likeliest answer spans of one window, as transformers' question answering scores them.

    The score of a span is the product of two softmaxes, of the start and the end logits, each taken over the allowed
    tokens and the no-answer token.

    Args:
        start: Start logits [n].
        end: End logits [n].
        allowed: Tokens that may be part of an answer, bool [n].
        no_answer: Index of the token that stands for "no answer" ([CLS]); None if there is none.
        longest: Most tokens of a span.
        count: Most spans.

    Returns:
        (first token, last token, score) from the best down, ties in reading order; and the score of "no answer", 0.0 if
        there is no such token.
    """
    counted = allowed.copy()
    if no_answer is not None:
        counted[no_answer] = True
    if not counted.any():
        return [], 0.0
    first = softmax(np.where(counted, start.astype(np.float64), -np.inf))
    last = softmax(np.where(counted, end.astype(np.float64), -np.inf))
    null = 0.0 if no_answer is None else float(first[no_answer] * last[no_answer])
    first, last = np.where(allowed, first, 0.0), np.where(allowed, last, 0.0)
    # Row s, column k: the span s .. s + k. A band instead of [n, n]: answers are short.
    padded = np.concatenate([last, np.zeros(longest - 1)])
    band = first[:, None] * np.lib.stride_tricks.sliding_window_view(padded, longest)
    ends = np.arange(len(first))[:, None] + np.arange(longest)
    possible = allowed[:, None] & np.concatenate([allowed, np.zeros(longest, np.bool_)])[ends]
    flat = np.where(possible, band, -1.0).ravel()
    order = np.argsort(-flat, kind="stable")[:count]
    found = [(int(i // longest), int(i // longest + i % longest), float(flat[i])) for i in order if flat[i] >= 0.0]
    return found, null
