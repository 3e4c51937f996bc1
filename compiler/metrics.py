"""How well a model still does its task, next to the original: pure array functions, no graph and no tokenizer.

Outputs are condensed batch by batch (`condense`) to what the metrics look at, so that no logits of a whole vocabulary
are ever kept for a whole data set; condensed arrays are joined along axis 0 (`join`) and compared (`measure`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from artifacts.errors import DataError
from artifacts.manifest import TextProcessor

from .data import Row

Array = NDArray[np.generic]
Floats = NDArray[np.float64]
Arrays = dict[str, Array]

_LARGEST_EXPONENT = 700.0
_UNDECIDED = -1  # the choice of a model whose scores are not finite: it agrees with nothing


@dataclass(frozen=True)
class Metric:
    """One figure of a model next to the original's.

    Attributes:
        name: ``cosine_mean``, ``cosine_min``, ``spearman``, ``accuracy``, ``agreement``, ``correlation``,
            ``perplexity`` or ``relative_l2``.
        value: Of the compiled model.
        reference_value: Of the original.
        drop: What was lost: relative to the original for spearman, accuracy and perplexity, absolute for the rest;
            negative for a gain.
        higher_is_better: False for errors and perplexity.
    """

    name: str
    value: float
    reference_value: float
    drop: float
    higher_is_better: bool = True


@dataclass(frozen=True)
class Budget:
    """The metric that decides, and how much of it may be lost.

    Attributes:
        metric: Name of the metric.
        limit: Largest drop allowed, as `Metric.drop` counts it.
    """

    metric: str
    limit: float

    def allowing(self, drop: float) -> Budget:
        """The same metric with another limit."""
        return replace(self, limit=drop)


def default_budget(task: str, labelled: bool, *, problem: str = "") -> Budget:
    """1 % of the task's metric (perplexity for decoders); without labels mean cosine, agreement or correlation of 0.99.

    Args:
        task: The task.
        labelled: The rows have labels that the task can be scored with.
        problem: Kind of classification, as in `TextProcessor.problem`.
    """
    if task == "feature-extraction":
        return Budget("spearman" if labelled else "cosine_mean", 0.01)
    if task == "tensors":
        return Budget("relative_l2", 0.01)
    if task == "text-generation":
        return Budget("perplexity", 0.01)
    if task == "text-classification" and problem == "regression":
        return Budget("spearman" if labelled else "correlation", 0.01)
    scored = labelled and task == "text-classification" and problem != "multi_label_classification"
    return Budget("accuracy" if scored else "agreement", 0.01)


def condense(
    task: str, outputs: Mapping[str, Array], feeds: Mapping[str, Array], *, mask_id: int | None = None
) -> Arrays:
    """What the metrics need of one batch.

    Args:
        task: The task.
        outputs: Of the model, by name.
        feeds: What it was given; ``attention_mask`` says which positions count, for decoders ``seqlens_k``.
        mask_id: Id of the mask token, for fill-mask; positions with it count, or all if there are none.

    Returns:
        ``vectors [rows, width]``, ``logits [rows, classes]``, ``labels [tokens]``, ``spans [rows, 2]``,
        ``tokens [masks]``, for decoders ``log_probabilities`` (float32, of each token but the first of its row) and
        ``tokens`` (int64, the likeliest in its place), both ``[tokens]``; or the outputs themselves for plain tensors.
    """
    if task == "text-generation":
        return _next_tokens(outputs["logits"], feeds["input_ids"], feeds["seqlens_k"])
    return dict(outputs) if task == "tensors" else _of_attended(task, outputs, feeds, mask_id)


def _of_attended(task: str, outputs: Mapping[str, Array], feeds: Mapping[str, Array], mask_id: int | None) -> Arrays:
    mask = np.asarray(feeds["attention_mask"]).astype(bool)
    if task == "feature-extraction":
        return {"vectors": _vectors(outputs, mask)}
    if task == "text-classification":
        return {"logits": np.asarray(outputs["logits"])}
    if task == "question-answering":
        ends = [np.where(mask, outputs[name], -math.inf) for name in ("start_logits", "end_logits")]
        return {"spans": np.stack([_choice(end) for end in ends], axis=1)}
    logits = np.asarray(outputs["logits"])
    if task == "token-classification":
        return {"labels": _choice(logits[mask])}
    masked = mask & (np.asarray(feeds["input_ids"]) == mask_id) if mask_id is not None else mask
    return {"tokens": _choice(logits[masked if masked.any() else mask])}


def join(batches: Sequence[Mapping[str, Array]]) -> Arrays:
    """Condensed batches, one after the other along axis 0."""
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]} if batches else {}


def measure(
    task: str,
    reference: Mapping[str, Array],
    outputs: Mapping[str, Array],
    rows: Sequence[Row],
    processor: TextProcessor | None,
    feeds: Mapping[str, Array] | None = None,
    *,
    mask_id: int | None = None,
) -> tuple[Metric, ...]:
    """The figures of the task.

    Args:
        task: The task.
        reference: Outputs of the original: condensed, or whole where ``feeds`` is given.
        outputs: Outputs of the compiled model, likewise.
        rows: What they were computed from, in the order of the arrays; embeddings of pairs are ``2 n``: all first
            texts, then all second ones (`compiler.data.items`).
        processor: Names and kind of the labels.
        feeds: What both were given; with it whole outputs are condensed here.
        mask_id: Id of the mask token, as for `condense`.

    Raises:
        DataError: A label is none of the model's.
    """
    if feeds is not None:
        reference = condense(task, reference, feeds, mask_id=mask_id)
        outputs = condense(task, outputs, feeds, mask_id=mask_id)
    if task == "tensors":
        error = max((_relative_l2(outputs[name], reference[name]) for name in reference), default=0.0)
        return (Metric("relative_l2", error, 0.0, error, higher_is_better=False),)
    if task == "feature-extraction":
        return _embedding_metrics(_floats(reference["vectors"]), _floats(outputs["vectors"]), rows)
    if task == "text-classification":
        return _class_metrics(_floats(reference["logits"]), _floats(outputs["logits"]), rows, processor)
    if task == "text-generation":
        return _generation_metrics(reference, outputs)
    name = next(iter(reference))
    return (_agreement(np.asarray(reference[name]), np.asarray(outputs[name])),)


def spearman(one: Sequence[float] | Floats, other: Sequence[float] | Floats) -> float:
    """Rank correlation of two series, equal values at their mean rank; 0 where one is constant or not finite."""
    a, b = np.asarray(one, np.float64), np.asarray(other, np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return 0.0
    return pearson(_ranks(a), _ranks(b))


def pearson(one: Floats, other: Floats) -> float:
    """Linear correlation of two series; 0 where one is constant or not finite."""
    a, b = one - one.mean(), other - other.mean()
    scale = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / scale if scale > 0.0 and math.isfinite(scale) else 0.0


def cosine(one: Floats, other: Floats) -> Floats:
    """Cosine of each row of ``one`` with that of ``other`` ``[n, d]``: 1 for two zero rows, 0 for one, or for NaN."""
    norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
    products = np.einsum("nd,nd->n", one, other)
    both_zero = ~one.any(axis=1) & ~other.any(axis=1)
    usable = np.isfinite(products) & np.isfinite(norms) & (norms > 0.0)
    return np.where(usable, products / np.where(usable, norms, 1.0), both_zero.astype(np.float64))


def _embedding_metrics(reference: Floats, outputs: Floats, rows: Sequence[Row]) -> tuple[Metric, ...]:
    similar = cosine(reference, outputs)
    mean, lowest = float(similar.mean()), float(similar.min())
    metrics = [Metric("cosine_mean", mean, 1.0, 1.0 - mean), Metric("cosine_min", lowest, 1.0, 1.0 - lowest)]
    scores = [row.label for row in rows if isinstance(row.label, int | float)]
    if len(scores) == len(rows) and len(reference) == 2 * len(rows) and len(rows) > 1:
        half = len(rows)
        before = spearman(cosine(reference[:half], reference[half:]), scores)
        after = spearman(cosine(outputs[:half], outputs[half:]), scores)
        metrics.insert(0, _task_metric("spearman", after, before))
    return tuple(metrics)


def _class_metrics(
    reference: Floats, outputs: Floats, rows: Sequence[Row], processor: TextProcessor | None
) -> tuple[Metric, ...]:
    problem = processor.problem if processor is not None else ""
    labels = [row.label for row in rows if row.label is not None]
    labelled = len(labels) == len(rows)
    if problem == "regression":
        before, after = reference[:, 0], outputs[:, 0]
        same = pearson(before, after)
        metrics = [Metric("correlation", same, 1.0, 1.0 - same)]
        if labelled:
            scores = [_score(label) for label in labels]
            metrics.insert(0, _task_metric("spearman", spearman(after, scores), spearman(before, scores)))
        return tuple(metrics)
    if problem == "multi_label_classification":
        decided = np.where(np.isfinite(outputs), outputs > 0.0, _UNDECIDED)
        return (_agreement((reference > 0.0).astype(np.int64), decided.astype(np.int64)),)
    before_class, after_class = _choice(reference), _choice(outputs)
    agreement = _agreement(before_class, after_class)
    if not labelled:
        return (agreement,)
    names = processor.labels if processor is not None else ()
    truth = np.array([_class(label, names, reference.shape[1]) for label in labels])
    accuracies = (float((after_class == truth).mean()), float((before_class == truth).mean()))
    return (_task_metric("accuracy", *accuracies), agreement)


def _class(label: str | float, names: Sequence[str], classes: int) -> int:
    text = str(label).strip()
    lower = [name.lower() for name in names]
    if text.lower() in lower:
        return lower.index(text.lower())
    number = text.removesuffix(".0")
    if number.isdecimal() and int(number) < classes:
        return int(number)
    raise DataError(
        f"the data has the label {text!r}, which the model does not know",
        f"Its labels are {', '.join(names) or f'0 to {classes - 1}'}; or name another column with --columns",
    )


def _score(label: str | float) -> float:
    try:
        value = float(label)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"the data has the score {label!r}", "The model gives a number: scores must be finite numbers")
    return value


def perplexity(log_probabilities: Array) -> float:
    """``exp(-mean log p)`` of natural logarithms ``[tokens]``; infinite where one is not finite, 1 for no tokens."""
    values = _floats(log_probabilities)
    if not np.isfinite(values).all():
        return math.inf
    mean = float(values.mean()) if values.size else 0.0
    return math.exp(-mean) if -mean < _LARGEST_EXPONENT else math.inf


def log_probabilities(logits: Array, tokens: Array) -> NDArray[np.float32]:
    """Natural log-probability of one token at each position: ``logits [n, vocabulary]``, ``tokens [n]`` -> [n].

    ``logits[t] - max - log Σ exp(logits - max)``, row by row, so that no second array of the logits' size is made.
    """
    found = np.empty(len(tokens), np.float32)
    for index, (row, token) in enumerate(zip(logits, tokens, strict=True)):
        with np.errstate(invalid="ignore"):  # of infinite logits: the result is not a number, and told as such
            shifted = np.asarray(row, np.float32) - np.float32(np.max(row))
        found[index] = shifted[token] - math.log(float(np.exp(shifted).sum(dtype=np.float64)))
    return found


def _next_tokens(logits: Array, ids: Array, seqlens_k: Array) -> Arrays:
    """What a decoder says of each next token: ``logits [rows, columns, vocabulary]`` of all columns."""
    likely, chosen = [], []
    for row, tokens, last in zip(logits, ids, seqlens_k, strict=True):
        said = row[: int(last)]  # the last token has no successor, and what follows it is padding
        likely.append(log_probabilities(said, tokens[1 : int(last) + 1]))
        chosen.append(said.argmax(axis=-1).astype(np.int64))
    return {"log_probabilities": np.concatenate(likely), "tokens": np.concatenate(chosen)}


def _generation_metrics(reference: Mapping[str, Array], outputs: Mapping[str, Array]) -> tuple[Metric, ...]:
    before, after = (perplexity(one["log_probabilities"]) for one in (reference, outputs))
    rise = after / before - 1.0 if math.isfinite(after) else math.inf
    agreement = _agreement(np.asarray(reference["tokens"]), np.asarray(outputs["tokens"]))
    return (Metric("perplexity", after, before, rise, higher_is_better=False), agreement)


def _agreement(reference: Array, outputs: Array) -> Metric:
    """Share of equal choices; those of one row count as one where there are several (spans)."""
    same = reference == outputs if reference.shape == outputs.shape else np.zeros(1, bool)
    if same.ndim == 2:
        same = same.all(axis=1)
    share = float(same.mean()) if same.size else 1.0
    return Metric("agreement", share, 1.0, 1.0 - share)


def _task_metric(name: str, value: float, reference: float) -> Metric:
    return Metric(name, value, reference, (reference - value) / abs(reference) if reference else max(-value, 0.0))


def _vectors(outputs: Mapping[str, Array], mask: NDArray[np.bool_]) -> Array:
    if "sentence_embedding" in outputs:
        return outputs["sentence_embedding"]
    hidden = _floats(outputs["last_hidden_state"])
    counts = np.maximum(mask.sum(axis=1, keepdims=True), 1)
    pooled: Floats = np.where(mask[:, :, None], hidden, 0.0).sum(axis=1) / counts
    return pooled


def _choice(scores: Array) -> NDArray[np.int64]:
    """Index of the largest score along the last axis; `_UNDECIDED` where one is not a number or infinite."""
    values = _floats(scores)
    broken = ~(np.isfinite(values) | np.isneginf(values)).all(axis=-1)
    return np.where(broken, _UNDECIDED, values.argmax(axis=-1)).astype(np.int64)


def _relative_l2(values: Array, reference: Array) -> float:
    if values.shape != reference.shape:
        return math.inf
    y, r = _floats(values).ravel(), _floats(reference).ravel()
    distance, norm = float(np.linalg.norm(y - r)), float(np.linalg.norm(r))
    if not math.isfinite(distance):
        return math.inf
    return distance / norm if norm > 0.0 else (math.inf if distance > 0.0 else 0.0)


def _ranks(values: Floats) -> Floats:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    ranks: Floats = (ends - (counts - 1) / 2.0)[inverse]
    return ranks


def _floats(array: Array) -> Floats:
    return np.asarray(array).astype(np.float64)
