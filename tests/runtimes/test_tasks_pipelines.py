"""Task results equal those of transformers' pipelines, both fed by the same tiny torch models with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from task_builders import VOCABULARY, bytelevel, processor, wordpiece
from torch_tasks import NAMES, TEXTS, build, make_task, peer_tokenizer
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    pipeline,
)
from transformers.pipelines.document_question_answering import select_starts_ends

from runtimes.tasks import Answer

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC")


# --- text-classification


@pytest.mark.parametrize(
    ("problem", "classes"),
    [
        ("single_label_classification", 3),
        ("multi_label_classification", 4),
        ("regression", 1),
        ("regression", 2),
        ("", 1),
        ("", 5),
    ],
)
def test_classify_equals_the_pipeline(tmp_path: Path, problem: str, classes: int) -> None:
    model = build(BertForSequenceClassification, num_labels=classes, problem_type=problem or None)
    labels = tuple(f"class {i}" for i in range(classes))
    model.config.id2label = dict(enumerate(labels))
    text = processor(labels=labels, problem=problem)
    task = make_task(tmp_path, "text-classification", model, wordpiece, text)
    tokenizer = peer_tokenizer(task)
    peer = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    for found, text_ in zip(task.classify(TEXTS, max_tokens=40), TEXTS, strict=True):
        wanted = {one["label"]: one["score"] for one in peer(text_, top_k=None)}
        assert found.scores == pytest.approx(wanted, abs=1e-5)
        best = peer(text_)[0]
        assert (found.label, found.score) == (best["label"], pytest.approx(best["score"], abs=1e-5))


def test_classified_pairs_equal_the_pipeline(tmp_path: Path) -> None:
    model = build(BertForSequenceClassification, num_labels=3)
    task = make_task(tmp_path, "text-classification", model, wordpiece, processor(labels=("a", "b", "c")))
    model.config.id2label = {0: "a", 1: "b", 2: "c"}
    tokenizer = peer_tokenizer(task)
    peer = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    (found,) = task.classify([(TEXTS[0], TEXTS[1])])
    wanted = {one["label"]: one["score"] for one in peer({"text": TEXTS[0], "text_pair": TEXTS[1]}, top_k=None)}
    assert found.scores == pytest.approx(wanted, abs=1e-5)


# --- token-classification


@pytest.mark.parametrize("kind", ["wordpiece", "bytelevel"])
def test_tag_equals_the_pipeline(tmp_path: Path, kind: str) -> None:
    model = build(BertForTokenClassification, num_labels=len(TAGS))
    with torch.no_grad():  # or random weights would give every token the same label
        ids = torch.arange(5, 60)[None]
        model.classifier.bias -= model(input_ids=ids).logits.mean(dim=(0, 1))
    model.config.id2label = dict(enumerate(TAGS))
    text = processor(labels=TAGS, pad_id=0 if kind == "wordpiece" else 1)
    task = make_task(tmp_path, "token-classification", model, wordpiece if kind == "wordpiece" else bytelevel, text)
    tokenizer = peer_tokenizer(task, bert=kind == "wordpiece")
    peer = pipeline(
        "token-classification", model=model, tokenizer=tokenizer, aggregation_strategy="simple", device="cpu"
    )
    seen = 0
    for found, text_ in zip(task.tag(TEXTS, max_tokens=40), TEXTS, strict=True):
        wanted = peer(text_)
        assert [(e.label, e.start, e.end) for e in found] == [
            (one["entity_group"], one["start"], one["end"]) for one in wanted
        ]
        assert [e.score for e in found] == pytest.approx([float(one["score"]) for one in wanted], abs=1e-5)
        seen += len(found)
    assert seen > 10


# --- fill-mask


@pytest.mark.parametrize("text", ["Mary went to [MASK] .", "[MASK]", "the [MASK] and the [MASK], in [MASK]"])
def test_fill_equals_the_pipeline(tmp_path: Path, text: str) -> None:
    model = build(BertForMaskedLM)
    # Only ids that the small tokenizer knows can be decoded.
    with torch.no_grad():
        model.cls.predictions.bias[len(VOCABULARY) :] = -1e4
    task = make_task(tmp_path, "fill-mask", model, wordpiece, processor(mask_token="[MASK]"))
    tokenizer = peer_tokenizer(task)
    peer = pipeline("fill-mask", model=model, tokenizer=tokenizer, device="cpu")
    wanted = peer(text, top_k=4)
    nested = wanted if isinstance(wanted[0], list) else [wanted]
    found = task.fill(text, top_k=4)
    assert [(one.mask, one.id, one.token) for one in found] == [
        (mask, one["token"], one["token_str"]) for mask, row in enumerate(nested) for one in row
    ]
    flat = [one for row in nested for one in row]
    assert [one.score for one in found] == pytest.approx([one["score"] for one in flat], abs=1e-5)
    for mine, its in zip(found, flat, strict=True):
        bare = its["sequence"].removeprefix("[CLS] ").removesuffix(" [SEP]")
        assert mine.text == bare


# --- question-answering: transformers 5 has no pipeline for it, but kept its scoring; the rest is that of 4.x


def pipeline_of_4x(
    model: Any, tokenizer: Any, question: str, context: str, *, no_answer: bool, longest: int, size: int
) -> dict[str, Any]:
    """transformers 4.48 QuestionAnsweringPipeline, for one question and top_k=1."""
    encoded = tokenizer(
        question,
        context,
        truncation="only_second",
        max_length=size,
        stride=min(size // 2, 128),
        return_token_type_ids=True,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    null = 1_000_000.0
    answers: list[dict[str, Any]] = []
    for window in range(len(encoded["input_ids"])):
        ids = np.array(encoded["input_ids"][window])
        p_mask = np.array([sequence != 1 for sequence in encoded.sequence_ids(window)], np.int64)
        p_mask[ids == tokenizer.cls_token_id] = 0
        feeds = {name: torch.tensor([encoded[name][window]]) for name in NAMES}
        with torch.no_grad():
            output = model(**feeds)
        starts, ends, scores, null = select_starts_ends(
            output["start_logits"].numpy(),
            output["end_logits"].numpy(),
            p_mask[None],
            feeds["attention_mask"].numpy(),
            null,
            12,
            no_answer,
            longest,
        )
        encoding = encoded.encodings[window]
        for start, end, score in zip(starts, ends, scores, strict=True):
            first, last = encoding.token_to_word(int(start)), encoding.token_to_word(int(end))
            if first is None or last is None:
                continue  # [CLS], with a score of 0
            span = encoding.word_to_chars(first, sequence_index=1)[0], encoding.word_to_chars(last, sequence_index=1)[1]
            answers.append({"score": float(score), "start": span[0], "end": span[1]})
    if no_answer:
        answers.append({"score": null, "start": 0, "end": 0})
    return max(answers, key=lambda answer: answer["score"])


CONTEXT = "Mary was playing in the green city of Paris, on a river. John lived in London! The cats' house is red. "


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("repeats", [1, 40])
@pytest.mark.parametrize("longest", [1, 15])
@pytest.mark.parametrize("no_answer", [False, True])
def test_answer_equals_the_pipeline(tmp_path: Path, seed: int, repeats: int, longest: int, no_answer: bool) -> None:
    model = build(BertForQuestionAnswering)
    torch.manual_seed(seed)
    torch.nn.init.normal_(model.qa_outputs.weight, std=1.0)
    task = make_task(tmp_path, "question-answering", model, wordpiece, processor(max_length=100))
    tokenizer = peer_tokenizer(task)
    question = "who lived in the red house ?"
    context = CONTEXT * repeats
    wanted = pipeline_of_4x(model, tokenizer, question, context, no_answer=no_answer, longest=longest, size=100)
    found = task.answer(question, context, no_answer=no_answer, max_answer_tokens=longest, max_tokens=300)
    assert isinstance(found, Answer)
    assert found.score == pytest.approx(wanted["score"], rel=2e-3)
    assert (found.start, found.end) == (wanted["start"], wanted["end"])
    assert found.text == context[found.start : found.end]
