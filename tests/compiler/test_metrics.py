from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import special, stats

from artifacts.errors import DataError
from artifacts.manifest import TextProcessor
from compiler.data import Row
from compiler.metrics import Budget, Metric, condense, cosine, default_budget, join, measure, perplexity, spearman


def processor(labels: tuple[str, ...] = (), problem: str = "single_label_classification") -> TextProcessor:
    return TextProcessor("processor/tokenizer.json", 16, 0, "[PAD]", 0, pairs=False, labels=labels, problem=problem)


def by_name(metrics: tuple[Metric, ...]) -> dict[str, Metric]:
    return {metric.name: metric for metric in metrics}


@pytest.mark.parametrize("ties", [False, True])
def test_spearman_is_scipys(ties: bool) -> None:
    generator = np.random.default_rng(0)
    for _ in range(5):
        one, other = generator.standard_normal((2, 40))
        if ties:
            one, other = one.round(), other.round()
        assert spearman(one, other) == pytest.approx(stats.spearmanr(one, other).statistic, abs=1e-12)


def test_spearman_of_nothing_to_rank() -> None:
    assert spearman([1.0, 1.0], [1.0, 2.0]) == 0.0
    assert spearman([1.0, math.nan], [1.0, 2.0]) == 0.0
    assert spearman([1.0, math.inf], [1.0, 2.0]) == 0.0


def test_cosine() -> None:
    one = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 0.0], [3.0, 4.0], [1.0, math.nan]])
    other = np.array([[0.0, 1.0], [0.0, 0.0], [1.0, 0.0], [6.0, 8.0], [1.0, 1.0]])
    assert cosine(one, other).tolist() == pytest.approx([0.0, 1.0, 0.0, 1.0, 0.0])


def test_embeddings_without_labels() -> None:
    reference = {"vectors": np.eye(3)}
    turned = {"vectors": np.array([[1.0, 0, 0], [0, 1, 0], [0, 1, 1]])}
    metrics = by_name(measure("feature-extraction", reference, turned, [Row("a")] * 3, None))
    assert set(metrics) == {"cosine_mean", "cosine_min"}
    assert metrics["cosine_min"].value == pytest.approx(math.sqrt(0.5))
    assert metrics["cosine_mean"].drop == pytest.approx((1 - math.sqrt(0.5)) / 3)


def test_embeddings_of_scored_pairs() -> None:
    generator = np.random.default_rng(1)
    reference = generator.standard_normal((40, 8))
    noisy = reference + 0.5 * generator.standard_normal((40, 8))
    rows = [Row("a", "b", float(score)) for score in generator.random(20)]
    metrics = by_name(measure("feature-extraction", {"vectors": reference}, {"vectors": noisy}, rows, None))
    scores = [row.label for row in rows]
    before = stats.spearmanr(cosine(reference[:20], reference[20:]), scores).statistic
    after = stats.spearmanr(cosine(noisy[:20], noisy[20:]), scores).statistic
    assert metrics["spearman"].reference_value == pytest.approx(before)
    assert metrics["spearman"].value == pytest.approx(after)
    assert metrics["spearman"].drop == pytest.approx((before - after) / abs(before))


def test_equal_outputs_lose_nothing() -> None:
    generator = np.random.default_rng(2)
    rows = [Row("a", None, "0")] * 4
    for task, arrays in (
        ("feature-extraction", {"vectors": generator.standard_normal((4, 3))}),
        ("text-classification", {"logits": generator.standard_normal((4, 3))}),
        ("token-classification", {"labels": np.arange(9)}),
        ("question-answering", {"spans": np.arange(8).reshape(4, 2)}),
        ("fill-mask", {"tokens": np.arange(4)}),
        ("tensors", {"y": generator.standard_normal((4, 3))}),
    ):
        metrics = measure(task, arrays, arrays, rows, processor())
        assert all(abs(metric.drop) < 1e-12 for metric in metrics)
        assert default_budget(task, labelled=False).metric in by_name(metrics)


def test_classes_with_labels() -> None:
    reference = {"logits": np.array([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0], [0.0, 9.0]])}
    outputs = {"logits": np.array([[2.0, 1.0], [1.0, 0.0], [3.0, 1.0], [0.0, 9.0]])}
    rows = [Row("", None, label) for label in ("negative", "POSITIVE", "0", 0.0)]
    metrics = by_name(measure("text-classification", reference, outputs, rows, processor(("Negative", "Positive"))))
    assert (metrics["accuracy"].value, metrics["accuracy"].reference_value) == (0.5, 0.75)
    assert metrics["accuracy"].drop == pytest.approx(1 / 3)
    assert metrics["agreement"].value == 0.75
    with pytest.raises(DataError, match=r"label 'maybe'.*Negative, Positive"):
        measure(
            "text-classification", reference, outputs, [Row("", None, "maybe")] * 4, processor(("Negative", "Positive"))
        )


def test_regression() -> None:
    reference = {"logits": np.array([[0.0], [1.0], [2.0], [3.0]])}
    outputs = {"logits": np.array([[0.0], [1.0], [3.0], [2.0]])}
    rows = [Row("", None, score) for score in ("0", "1.5", "2", 4.0)]
    metrics = by_name(measure("text-classification", reference, outputs, rows, processor(problem="regression")))
    assert (metrics["spearman"].value, metrics["spearman"].reference_value) == (pytest.approx(0.8), pytest.approx(1.0))
    assert metrics["correlation"].value == pytest.approx(0.8)
    with pytest.raises(DataError, match="score 'high'"):
        measure("text-classification", reference, outputs, [Row("", None, "high")] * 4, processor(problem="regression"))


def test_several_labels() -> None:
    reference = {"logits": np.array([[1.0, -1.0], [1.0, 1.0]])}
    outputs = {"logits": np.array([[1.0, -2.0], [1.0, -1.0]])}
    metric = by_name(
        measure(
            "text-classification", reference, outputs, [Row("")] * 2, processor(problem="multi_label_classification")
        )
    )["agreement"]
    assert metric.value == 0.5


def test_tokens_count_only_where_attended() -> None:
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    logits = np.zeros((2, 3, 2))
    logits[:, :, 1] = [[1, -1, 5], [1, 5, 5]]
    feeds = {"attention_mask": mask}
    assert condense("token-classification", {"logits": logits}, feeds)["labels"].tolist() == [1, 0, 1]


def test_spans_never_end_in_padding() -> None:
    outputs = {"start_logits": np.array([[1.0, 2.0, 9.0]]), "end_logits": np.array([[3.0, 2.0, 9.0]])}
    assert condense("question-answering", outputs, {"attention_mask": np.array([[1, 1, 0]])})["spans"].tolist() == [
        [1, 0]
    ]
    one, other = {"spans": np.array([[0, 1], [2, 3]])}, {"spans": np.array([[0, 1], [2, 4]])}
    assert measure("question-answering", one, other, [Row("")] * 2, processor())[0].value == 0.5


def test_only_masked_tokens_count() -> None:
    ids = np.array([[2, 4, 3], [2, 5, 4]])
    logits = np.zeros((2, 3, 9))
    logits[0, 1, 7] = logits[1, 2, 8] = 1.0
    feeds = {"input_ids": ids, "attention_mask": np.ones((2, 3))}
    assert condense("fill-mask", {"logits": logits}, feeds, mask_id=4)["tokens"].tolist() == [7, 8]
    assert len(condense("fill-mask", {"logits": logits}, feeds)["tokens"]) == 6


def test_numbers_that_are_none_agree_with_nothing() -> None:
    good = {"logits": np.array([[1.0, 0.0]])}
    bad = {"logits": np.array([[math.nan, 0.0]])}
    assert measure("text-classification", good, bad, [Row("")], processor())[0].value == 0.0
    assert measure("tensors", {"y": np.ones(3)}, {"y": np.array([1, 1, math.nan])}, [], None)[0].value == math.inf
    assert measure("tensors", {"y": np.ones(3)}, {"y": np.ones(4)}, [], None)[0].drop == math.inf
    assert measure("tensors", {"y": np.ones(4)}, {"y": np.full(4, 1.5)}, [], None)[0].drop == 0.5


def test_vectors_of_token_vectors() -> None:
    hidden = np.array([[[1.0], [3.0], [99.0]], [[4.0], [0.0], [0.0]]])
    feeds = {"attention_mask": np.array([[1, 1, 0], [1, 0, 0]])}
    assert condense("feature-extraction", {"last_hidden_state": hidden}, feeds)["vectors"].tolist() == [[2.0], [4.0]]


def test_whole_outputs_are_condensed_first() -> None:
    logits = np.random.default_rng(0).standard_normal((2, 3, 4))
    feeds = {"attention_mask": np.array([[1, 1, 0], [1, 0, 0]])}
    other = logits.copy()
    other[0, 2] += 100.0 * np.arange(4)  # padding
    metrics = measure("token-classification", {"logits": logits}, {"logits": other}, [Row("")] * 2, processor(), feeds)
    assert metrics[0].value == 1.0


def language() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits of two rows of four columns, the second one padded, over a vocabulary of 9."""
    generator = np.random.default_rng(3)
    logits = generator.standard_normal((2, 4, 9)).astype(np.float32)
    return logits, {"input_ids": generator.integers(0, 9, (2, 4)), "seqlens_k": np.array([3, 1], np.int32)}


def test_log_probabilities_of_the_next_tokens() -> None:
    logits, feeds = language()
    condensed = condense("text-generation", {"logits": logits}, feeds)
    wanted = special.log_softmax(logits.astype(np.float64), axis=-1)
    ids = feeds["input_ids"]
    pairs = [(0, 0), (0, 1), (0, 2), (1, 0)]
    expected = [wanted[row, column, ids[row, column + 1]] for row, column in pairs]
    # One rounding of the logits' difference and one of the result, in float32.
    np.testing.assert_allclose(condensed["log_probabilities"], expected, rtol=0, atol=4 * 2**-24 * 10)
    assert condensed["log_probabilities"].dtype == np.float32
    assert condensed["tokens"].tolist() == [int(logits[pair].argmax()) for pair in pairs]


def test_perplexity() -> None:
    assert perplexity(np.log([0.5, 0.125])) == pytest.approx(4.0)
    assert perplexity(np.array([])) == 1.0
    assert math.isinf(perplexity(np.array([-1e9])))
    assert math.isinf(perplexity(np.array([-1.0, math.nan])))


def test_a_rise_of_perplexity_counts_as_a_drop() -> None:
    logits, feeds = language()
    worse = logits * np.float32(0.5)
    metrics = measure("text-generation", {"logits": logits}, {"logits": worse}, [], None, feeds)
    assert [metric.name for metric in metrics] == ["perplexity", "agreement"]
    found, agreement = metrics
    assert not found.higher_is_better
    assert found.drop == pytest.approx(found.value / found.reference_value - 1.0)
    assert agreement.value == 1.0, "the likeliest tokens are the same"
    (same, _) = measure("text-generation", {"logits": logits}, {"logits": logits}, [], None, feeds)
    assert same.drop == 0.0


def test_logits_that_are_no_numbers_make_the_perplexity_infinite() -> None:
    logits, feeds = language()
    for wrong in (math.nan, math.inf):
        broken = logits.copy()
        broken[1, 0] = wrong
        found, _ = measure("text-generation", {"logits": logits}, {"logits": broken}, [], None, feeds)
        assert math.isinf(found.value)
        assert math.isinf(found.drop)
        padding = logits.copy()
        padding[1, 1:] = wrong
        found, _ = measure("text-generation", {"logits": logits}, {"logits": padding}, [], None, feeds)
        assert found.drop == 0.0


def test_join() -> None:
    assert join([{"a": np.ones((2, 3))}, {"a": np.zeros((1, 3))}])["a"].shape == (3, 3)


def test_budgets() -> None:
    assert default_budget("feature-extraction", labelled=True).metric == "spearman"
    assert default_budget("feature-extraction", labelled=False).metric == "cosine_mean"
    assert default_budget("text-classification", labelled=True).metric == "accuracy"
    assert default_budget("text-classification", labelled=True, problem="regression").metric == "spearman"
    assert default_budget("text-classification", labelled=False, problem="regression").metric == "correlation"
    assert (
        default_budget("text-classification", labelled=True, problem="multi_label_classification").metric == "agreement"
    )
    assert default_budget("question-answering", labelled=False).metric == "agreement"
    assert default_budget("tensors", labelled=False).metric == "relative_l2"
    assert default_budget("text-generation", labelled=False) == Budget("perplexity", 0.01)
    budget = default_budget("fill-mask", labelled=True)
    assert (budget.limit, budget.allowing(0.002).limit) == (0.01, 0.002)
