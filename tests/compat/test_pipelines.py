"""Our pipelines give what transformers' give, over the same tiny models with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from task_builders import VOCABULARY, bytelevel, processor, wordpiece
from torch_tasks import TEXTS, build, make_task, peer_tokenizer
from transformers import (
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)
from transformers import pipeline as peer_pipeline

from artifacts.errors import UsageError
from hasten.compat import pipeline
from runtimes.tasks import Task

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC")
TOLERANCE = 2e-5
"""Float32 through two layers, batched here and one by one there."""


def same(found: Any, wanted: Any) -> None:
    """Equal in shape, types as JSON has them, and numbers to rounding."""
    if isinstance(wanted, dict):
        assert list(found) == list(wanted)
        for name, value in wanted.items():
            same(found[name], value)
    elif isinstance(wanted, list | tuple):
        assert isinstance(found, list)
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            same(one, other)
    elif isinstance(wanted, float | np.floating):
        assert type(found) is float
        assert found == pytest.approx(float(wanted), abs=TOLERANCE)
    else:
        assert found == wanted
        assert type(found) is type(wanted)


# --- text-classification


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Task, Any]:
    model = build(BertForSequenceClassification, num_labels=3)
    model.config.id2label = {0: "a", 1: "b", 2: "c"}
    folder = tmp_path_factory.mktemp("classifier")
    task = make_task(folder, "text-classification", model, wordpiece, processor(labels=("a", "b", "c")))
    return task, peer_pipeline("text-classification", model=model, tokenizer=peer_tokenizer(task), device="cpu")


PAIR = {"text": TEXTS[0], "text_pair": TEXTS[1]}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 1},
        {"top_k": 2},
        {"top_k": None},
        {"function_to_apply": "none", "top_k": None},
        {"function_to_apply": "sigmoid"},
        {"function_to_apply": "softmax", "top_k": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("inputs", [TEXTS[0], TEXTS, [TEXTS[1]], PAIR, [PAIR, PAIR], []], ids=repr)
def test_classification(classifier: tuple[Task, Any], inputs: Any, options: dict[str, Any]) -> None:
    task, peer = classifier
    if inputs == []:  # which transformers does not take
        assert pipeline("text-classification", model=task)(inputs, **options) == []
        return
    same(pipeline("text-classification", model=task)(inputs, **options), peer(inputs, **options))


def test_options_of_all_calls(classifier: tuple[Task, Any]) -> None:
    task, peer = classifier
    whole = peer_pipeline("text-classification", model=peer.model, tokenizer=peer.tokenizer, device="cpu", top_k=None)
    mine = pipeline("sentiment-analysis", model=task, top_k=None)
    for inputs in (TEXTS[0], TEXTS):
        same(mine(inputs), whole(inputs))
        same(mine(inputs, top_k=1), whole(inputs, top_k=1))


def test_iterators_give_iterators(classifier: tuple[Task, Any]) -> None:
    task, peer = classifier
    mine = pipeline("text-classification", model=task)
    read: list[int] = []

    def texts() -> Any:
        for index in range(10):
            read.append(index)
            yield TEXTS[index % len(TEXTS)]

    found = mine(texts(), batch_size=2)
    assert not isinstance(found, list)
    same(next(found), peer(TEXTS[0])[0])
    assert len(read) == 2
    assert len(list(found)) == 9


# --- token-classification


@pytest.fixture(scope="module", params=["wordpiece", "bytelevel"])
def tagger(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Task, Any]:
    bert = request.param == "wordpiece"
    model = build(BertForTokenClassification, num_labels=len(TAGS))
    with torch.no_grad():  # or random weights would give every token the same label
        model.classifier.bias -= model(input_ids=torch.arange(5, 60)[None]).logits.mean(dim=(0, 1))
    model.config.id2label = dict(enumerate(TAGS))
    folder = tmp_path_factory.mktemp("tagger")
    text = processor(labels=TAGS, pad_id=0 if bert else 1)
    task = make_task(folder, "token-classification", model, wordpiece if bert else bytelevel, text)
    tokenizer = peer_tokenizer(task, bert=bert)
    return task, peer_pipeline("token-classification", model=model, tokenizer=tokenizer, device="cpu")


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
@pytest.mark.parametrize("strategy", ["none", "simple", "first", "average", "max"])
def test_tagging(tagger: tuple[Task, Any], strategy: str) -> None:
    task, peer = tagger
    mine = pipeline("ner", model=task, aggregation_strategy=strategy)
    texts = [text for text in TEXTS if text]
    wanted = [peer(text, aggregation_strategy=strategy) for text in texts]
    same(mine(texts), wanted)
    same(mine(texts[0]), wanted[0])
    same(mine(texts[0], ignore_labels=[]), peer(texts[0], aggregation_strategy=strategy, ignore_labels=[]))
    assert sum(map(len, wanted)) > 8
    assert mine("") == []


# --- fill-mask


@pytest.fixture(scope="module")
def filler(tmp_path_factory: pytest.TempPathFactory) -> tuple[Task, Any]:
    model = build(BertForMaskedLM)
    with torch.no_grad():  # only ids that the small tokenizer knows can be decoded
        model.cls.predictions.bias[len(VOCABULARY) :] = -1e4
    task = make_task(tmp_path_factory.mktemp("filler"), "fill-mask", model, wordpiece, processor(mask_token="[MASK]"))
    return task, peer_pipeline("fill-mask", model=model, tokenizer=peer_tokenizer(task), device="cpu")


MASKED = ["Mary went to [MASK] .", "[MASK]", "the [MASK] and the [MASK], in [MASK]"]


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"targets": ["paris", "london", "nowhere"]}, {"targets": "cat"}])
@pytest.mark.parametrize("inputs", [*MASKED, MASKED[:2], MASKED[:1]])
def test_filling(filler: tuple[Task, Any], inputs: Any, options: dict[str, Any]) -> None:
    task, peer = filler
    same(pipeline("fill-mask", model=task)(inputs, **options), peer(inputs, **options))


def test_a_text_without_a_mask(filler: tuple[Task, Any]) -> None:
    with pytest.raises(UsageError, match=r"text 1 has no mask. Write \[MASK\] in it"):
        pipeline("fill-mask", model=filler[0])(["a [MASK]", "nothing"])


# --- feature-extraction


def test_features(tmp_path: Path) -> None:
    model = build(BertModel, num_labels=2)
    task = make_task(tmp_path, "feature-extraction", model, wordpiece, processor())
    peer = peer_pipeline("feature-extraction", model=model, tokenizer=peer_tokenizer(task), device="cpu")
    mine = pipeline("feature-extraction", model=task)
    same(mine(TEXTS[0]), peer(TEXTS[0]))
    same(mine(TEXTS), peer(TEXTS))
    tensor = mine(TEXTS[0], return_tensors=True)
    assert isinstance(tensor, torch.Tensor)
    torch.testing.assert_close(tensor, peer(TEXTS[0], return_tensors=True), atol=TOLERANCE, rtol=0)


# --- question-answering, whose pipeline transformers 5 left out: shapes and names are those of version 4


@pytest.fixture(scope="module")
def answerer(tmp_path_factory: pytest.TempPathFactory) -> Task:
    model = build(BertForQuestionAnswering)
    return make_task(
        tmp_path_factory.mktemp("answers"), "question-answering", model, wordpiece, processor(max_length=64)
    )


CONTEXT = " ".join(TEXTS) * 4


def test_answers_are_those_of_the_task(answerer: Task) -> None:
    mine = pipeline("question-answering", model=answerer)
    wanted = answerer.answer("Where did Mary go?", CONTEXT)
    found = mine(question="Where did Mary go?", context=CONTEXT)
    assert list(found) == ["score", "start", "end", "answer"]
    assert (found["answer"], found["start"], found["end"]) == (wanted.text, wanted.start, wanted.end)
    assert found["score"] == pytest.approx(wanted.score, abs=1e-6)
    record = {"question": "Where did Mary go?", "context": CONTEXT}
    assert mine(record) == found
    assert mine([record, record]) == [found, found]
    assert mine(question=["Where did Mary go?"] * 2, context=CONTEXT) == [found, found]
    assert mine(question=["Where did Mary go?"] * 2, context=[CONTEXT] * 2) == [found, found]


def test_several_answers(answerer: Task) -> None:
    mine = pipeline("question-answering", model=answerer)
    found = mine(question="Who?", context=CONTEXT, top_k=5)
    assert len(found) == 5
    assert len({(one["start"], one["end"]) for one in found}) == 5
    assert [one["score"] for one in found] == sorted((one["score"] for one in found), reverse=True)
    assert all(CONTEXT[one["start"] : one["end"]] == one["answer"] for one in found)
    assert found[0] == mine(question="Who?", context=CONTEXT)
    short = mine(question="Who?", context=CONTEXT, max_answer_len=1, top_k=3)
    assert all(" " not in one["answer"].strip() for one in short)


def test_no_answer(answerer: Task) -> None:
    mine = pipeline("question-answering", model=answerer)
    assert mine(question="Who?", context="") == {"score": 0.0, "start": 0, "end": 0, "answer": ""}
    wanted = answerer.answer("Who?", "the cat", no_answer=True)
    found = mine(question="Who?", context="the cat", handle_impossible_answer=True)
    assert (found["answer"], found["score"]) == (wanted.text, pytest.approx(wanted.score, abs=1e-6))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"question": "Who?"}, "the context is NoneType"),
        ({"inputs": "Who?", "question": "Who?", "context": "x"}, "given twice"),
        ({"inputs": "Who?"}, "the input is a str"),
        ({"question": ["a", "b"], "context": ["x"]}, "more questions than contexts"),
        ({"question": "Who?", "context": "x", "doc_stride": 64}, "doc_stride is 128"),
        ({"question": "Who?", "context": "x", "top_k": 0}, "top_k is 0"),
    ],
)
def test_questions_that_are_none(answerer: Task, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pipeline("question-answering", model=answerer)(**arguments)


# --- what is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "translation"}, "no pipeline 'translation'"),
        ({"task": "fill-mask"}, "this is a text-classification model, and fill-mask was asked for"),
        ({"tokenizer": "bert"}, "does not support tokenizer"),
        ({"device": 0}, "loaded already"),
        ({"num_workers": 2}, "no option 'num_workers'"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_k": True}, "top_k is True"),
        ({"function_to_apply": "exp"}, "function_to_apply is 'exp'"),
        ({"truncation": False}, "always truncates"),
        ({"model": None}, "no model was named"),
        ({"model": 3}, "the model is a int"),
    ],
)
def test_what_a_pipeline_refuses(classifier: tuple[Task, Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pipeline(**{"model": classifier[0], **arguments})


@pytest.mark.parametrize(
    ("inputs", "options", "message"),
    [
        (3, {}, "the input is a int"),
        ([3], {}, "input 0 is no text"),
        ([["a", "b"]], {}, "input 0 is no text"),
        ({"text": "a", "other": "b"}, {}, "input 0 is no text"),
        ("a", {"wrong": 1}, "no option 'wrong'"),
        ("a", {"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_what_a_call_refuses(classifier: tuple[Task, Any], inputs: Any, options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pipeline("text-classification", model=classifier[0])(inputs, **options)


def test_the_task_is_the_bundles_where_none_is_named(classifier: tuple[Task, Any]) -> None:
    found = pipeline(model=classifier[0])
    assert found.task == "text-classification"
    assert repr(found) == "<TextClassification 'tiny'>"
    with found as opened:
        opened("a")
    # What was loaded before stays so.
    assert found("a")
