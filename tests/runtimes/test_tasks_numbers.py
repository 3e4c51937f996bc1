from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from runtimes.tasks.numbers import best_spans, class_scores, masked_mean, sigmoid, softmax
from runtimes.tasks.tag import group_labels

LOGITS = hnp.arrays(np.float32, (3, 5), elements=st.floats(-1e4, 1e4, width=32))


@given(LOGITS)
def test_softmax_is_a_distribution_and_keeps_order(logits: np.ndarray) -> None:
    result = softmax(logits)
    np.testing.assert_allclose(result.sum(-1), 1.0, rtol=1e-12)
    for row, scores in zip(logits, result, strict=True):
        assert (np.diff(scores[np.argsort(row)]) >= 0).all()


@given(LOGITS)
def test_sigmoid_never_overflows(logits: np.ndarray) -> None:
    with np.errstate(over="raise"):
        result = sigmoid(logits)
    assert ((result >= 0) & (result <= 1)).all()
    small = np.clip(logits.astype(np.float64), -500, 500)
    np.testing.assert_allclose(result, 1 / (1 + np.exp(-small)), atol=1e-15)


@pytest.mark.parametrize("problem", ["", "single_label_classification", "multi_label_classification"])
def test_one_class_is_a_sigmoid(problem: str) -> None:
    assert class_scores(np.array([[0.0], [2.0]]), problem).tolist() == [[0.5], [pytest.approx(1 / (1 + np.exp(-2)))]]


def test_a_regression_is_left_alone() -> None:
    assert class_scores(np.array([[3.5, -2.0]], np.float16), "regression").tolist() == [[3.5, -2.0]]


def test_masked_mean_skips_padding_and_survives_an_empty_row() -> None:
    states = np.array([[[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]]], np.float32)
    result = masked_mean(states, np.array([[1, 0], [0, 0]]))
    assert result.tolist() == [[1.0, 2.0], [0.0, 0.0]]
    assert result.dtype == np.float32


def brute_force(
    start: np.ndarray, end: np.ndarray, allowed: np.ndarray, no_answer: int | None, longest: int
) -> list[tuple[int, int, float]]:
    counted = [i for i in range(len(start)) if allowed[i] or i == no_answer]
    p = {i: np.exp(start[i]) / sum(np.exp(start[j]) for j in counted) for i in counted}
    q = {i: np.exp(end[i]) / sum(np.exp(end[j]) for j in counted) for i in counted}
    pairs = itertools.product(range(len(start)), repeat=2)
    found = [(s, e, p[s] * q[e]) for s, e in pairs if allowed[s] and allowed[e] and s <= e < s + longest]
    return sorted(found, key=lambda span: -span[2])


@given(
    hnp.arrays(np.float64, (2, 7), elements=st.floats(-8, 8)),
    hnp.arrays(np.bool_, 7),
    st.sampled_from([None, 0]),
    st.integers(1, 12),
    st.integers(1, 5),
)
def test_best_spans_equal_brute_force(
    logits: np.ndarray, allowed: np.ndarray, no_answer: int | None, longest: int, count: int
) -> None:
    if no_answer is not None:
        allowed[no_answer] = False
    found, null = best_spans(logits[0], logits[1], allowed, no_answer=no_answer, longest=longest, count=count)
    wanted = brute_force(logits[0], logits[1], allowed, no_answer, longest)[:count]
    assert [score for _, _, score in found] == pytest.approx([score for _, _, score in wanted])
    for s, e, _ in found:
        assert allowed[s]
        assert allowed[e]
        assert s <= e < s + longest
    assert 0.0 <= null <= 1.0
    if no_answer is None:
        assert null == 0.0


def test_ties_are_broken_in_reading_order() -> None:
    zeros = np.zeros(4)
    found, _ = best_spans(zeros, zeros, np.ones(4, bool), no_answer=None, longest=2, count=3)
    assert [span[:2] for span in found] == [(0, 0), (0, 1), (1, 1)]


def test_nothing_allowed_gives_no_span_but_the_null_score() -> None:
    found, null = best_spans(np.ones(3), np.ones(3), np.zeros(3, bool), no_answer=0, longest=5, count=1)
    assert found == []
    assert null == 1.0
    assert best_spans(np.ones(3), np.ones(3), np.zeros(3, bool), no_answer=None, longest=5, count=1) == ([], 0.0)


@pytest.mark.parametrize(
    ("labels", "groups"),
    [
        ([], []),
        (["O"], [(0, 1)]),
        (["B-A", "I-A", "I-A"], [(0, 3)]),
        (["B-A", "B-A"], [(0, 1), (1, 2)]),
        (["I-A", "I-B"], [(0, 1), (1, 2)]),
        (["A", "A", "O", "A"], [(0, 2), (2, 3), (3, 4)]),
        (["B-A", "A"], [(0, 2)]),
    ],
)
def test_labels_are_grouped_as_the_simple_strategy_does(labels: list[str], groups: list[tuple[int, int]]) -> None:
    assert group_labels(labels) == groups
