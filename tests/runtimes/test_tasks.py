"""Tasks on real sessions of small graphs: values against numpy, order, empty and odd input, wrong use."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from task_builders import VOCABULARY, processor
from task_graphs import CLASSES, LABELS, WIDTH, Graph, classifier, embedder, spans, token_head, write_bundle

from artifacts.errors import BundleError, DataError, UsageError
from artifacts.target import CPU_PROVIDER
from runtimes.session import Session
from runtimes.tasks import TASKS, Answer, Task
from runtimes.tasks.numbers import softmax

ODD = ["", "hello world", "😀😀", "the cat " * 400, "a", "\ud800", "hello " * 30, " ", "the cat was in the house ."]


def open_task(path: Path, task: str, graph: Graph, **options: object) -> Task:
    bundle = write_bundle(path / "bundle", task, graph, **options)  # type: ignore[arg-type]
    variant = bundle.manifest.variants[0]
    session = Session(bundle.path / variant.model, CPU_PROVIDER, options=variant.session, threads=1)
    return TASKS[task](bundle, session, explanation="because")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tasks")


@pytest.fixture(scope="module")
def models(folder: Path) -> Iterator[dict[str, Task]]:
    graphs = {
        "feature-extraction": embedder(),
        "text-classification": classifier(),
        "token-classification": token_head(),
        "question-answering": spans(),
        "fill-mask": token_head(len(VOCABULARY)),
        "tensors": embedder(),
    }
    opened = {}
    for task, graph in graphs.items():
        (folder / task).mkdir()
        opened[task] = open_task(folder / task, task, graph)
    yield opened
    for model in opened.values():
        model.close()


def ids(text: str) -> list[int]:
    return [VOCABULARY.index(word) for word in f"[CLS] {text} [SEP]".split()]


# --- the table


def test_every_task_of_a_manifest_has_a_class() -> None:
    from artifacts.manifest import TASKS as NAMES

    assert set(TASKS) == set(NAMES)
    assert all(kind.task == name for name, kind in TASKS.items())


METHODS = {
    "feature-extraction": ("embed", (["a"],)),
    "text-classification": ("classify", (["a"],)),
    "token-classification": ("tag", (["a"],)),
    "question-answering": ("answer", ("a", "b")),
    "fill-mask": ("fill", ("[MASK]",)),
}
"""Of the text tasks but text-generation: see generate/test_generate.py."""


@pytest.mark.parametrize("task", [*METHODS, "tensors"])
def test_another_tasks_method_names_the_right_one(models: dict[str, Task], task: str) -> None:
    right = f"Use .{METHODS[task][0] if task in METHODS else 'run'}("
    for other, (method, arguments) in METHODS.items():
        if other != task:
            with pytest.raises(UsageError) as caught:
                getattr(models[task], method)(*arguments)
            assert f"a {task} model: it has no .{method}()" in str(caught.value)
            assert right in str(caught.value)


# --- run, close, explain


def test_run_gives_every_output_by_name(models: dict[str, Task]) -> None:
    model = models["feature-extraction"]
    feeds = {"input_ids": [ids("hello world")], "attention_mask": np.ones((1, 4), np.int32)}
    outputs = model.run(feeds)  # type: ignore[arg-type]
    assert outputs["sentence_embedding"].shape == (1, WIDTH)


@pytest.mark.parametrize(
    ("feeds", "words"),
    [
        ({"input_ids": [[1]]}, "'attention_mask' is missing"),
        ({"input_ids": [[1]], "attention_mask": [[1]], "x": [1]}, "unknown input 'x'"),
        ({"input_ids": [1], "attention_mask": [[1]]}, "has 1 axes"),
        ({"input_ids": [[1.5]], "attention_mask": [[1]]}, "is float64"),
        ({"input_ids": [["a"]], "attention_mask": [[1]]}, "is <U1"),
        ({"input_ids": [[1], [1, 2]], "attention_mask": [[1]]}, "not an array"),
        ({"input_ids": np.array([[2**63]], np.uint64), "attention_mask": [[1]]}, "too large"),
    ],
)
def test_feeds_that_do_not_fit_are_named(models: dict[str, Task], feeds: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        models["tensors"].run(feeds)  # type: ignore[arg-type]


def test_a_closed_model_says_so(tmp_path: Path) -> None:
    with open_task(tmp_path, "feature-extraction", embedder()) as model:
        assert model.explain() == "because"
        assert "tiny" in repr(model)
    model.close()
    with pytest.raises(UsageError, match="was closed"):
        model.embed(["a"])


# --- embed


def test_embeddings_are_float32_in_the_order_given(models: dict[str, Task]) -> None:
    model = models["feature-extraction"]
    vectors = model.embed(ODD, max_tokens=64)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(ODD), WIDTH)
    assert vectors.flags.c_contiguous
    assert np.isfinite(vectors).all()
    for text, vector in zip(ODD, vectors, strict=True):
        np.testing.assert_allclose(model.embed([text])[0], vector, rtol=0, atol=1e-6)


def test_an_embedding_is_what_the_graph_computes(models: dict[str, Task]) -> None:
    oracle = embedder().oracle
    feeds = {"input_ids": np.array([ids("hello world")]), "attention_mask": np.ones((1, 4), np.int64)}
    wanted = oracle(feeds)["sentence_embedding"]
    np.testing.assert_allclose(models["feature-extraction"].embed(["Hello world"]), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["sentence_embedding", "last_hidden_state"])
@pytest.mark.parametrize("width", [WIDTH, "width"])
def test_no_texts_give_an_empty_array_of_the_right_width(tmp_path: Path, name: str, width: int | str) -> None:
    with open_task(tmp_path, "feature-extraction", embedder(name, width)) as model:
        vectors = model.embed([])
    assert vectors.shape == (0, WIDTH)
    assert vectors.dtype == np.float32


def test_token_vectors_are_pooled_over_the_attended_tokens(tmp_path: Path, models: dict[str, Task]) -> None:
    with open_task(tmp_path, "feature-extraction", embedder("last_hidden_state")) as model:
        pooled = model.embed(ODD)
    np.testing.assert_allclose(pooled, models["feature-extraction"].embed(ODD), rtol=0, atol=1e-5)


def test_a_graph_without_an_embedding_says_what_it_has(tmp_path: Path) -> None:
    with open_task(tmp_path, "feature-extraction", classifier()) as model:
        with pytest.raises(BundleError, match=r"no output sentence_embedding or last_hidden_state\. It has logits"):
            model.embed(["a"])
        assert model.embed([]).shape == (0, 0)


def test_one_text_instead_of_a_list_is_refused(models: dict[str, Task]) -> None:
    for task, (method, _) in METHODS.items():
        if method in ("embed", "classify", "tag"):
            with pytest.raises(UsageError, match=rf"{method} takes a list of texts, got one str"):
                getattr(models[task], method)("hello")


def test_any_iterable_is_embedded(models: dict[str, Task]) -> None:
    model = models["feature-extraction"]
    wanted = model.embed(ODD)
    for texts in (tuple(ODD), iter(ODD), (text for text in ODD), dict.fromkeys(ODD).keys(), np.array(ODD, object)):
        np.testing.assert_array_equal(model.embed(texts), wanted)


def test_vectors_one_after_another_are_those_of_the_list(models: dict[str, Task]) -> None:
    model = models["feature-extraction"]
    texts = ODD * 300  # several chunks
    vectors = list(model.embed_iter(iter(texts), max_tokens=64))
    np.testing.assert_allclose(np.stack(vectors), model.embed(texts), rtol=0, atol=1e-6)
    assert all(vector.base is None and vector.dtype == np.float32 for vector in vectors)
    assert list(model.embed_iter([])) == []


def test_an_endless_generator_is_embedded_at_constant_memory(models: dict[str, Task]) -> None:
    read, before = itertools.count(), {thread.name for thread in threading.enumerate()}
    vectors = models["feature-extraction"].embed_iter(
        f"cat {'dog ' * (number % 9)}" for number in iter(lambda: next(read), -1)
    )
    for taken in range(1, 20_001):
        assert next(vectors).shape == (WIDTH,)
        if taken % 5000 == 0:
            # At most: the chunk being yielded, the one being tokenized, and the one read.
            assert next(read) - taken < 3 * 4096
    vectors.close()
    found = {thread.name for thread in threading.enumerate()} - before
    assert not [name for name in found if name.startswith("hasten")]


def test_wrong_use_of_a_stream_is_told_at_once_or_when_it_is_read(models: dict[str, Task]) -> None:
    model = models["feature-extraction"]
    with pytest.raises(UsageError, match="embed_iter takes a list of texts, got one str"):
        model.embed_iter("hello")
    with pytest.raises(UsageError, match="max_tokens is 0"):
        list(model.embed_iter(["a"], max_tokens=0))
    with pytest.raises(UsageError, match="embed_iter: element 2 is int"):
        list(model.embed_iter(["a", "b", 3]))  # type: ignore[list-item]
    with pytest.raises(UsageError, match=r"no \.embed_iter\(\)\. Use \.classify"):
        models["text-classification"].embed_iter(["a"])


def test_what_the_texts_raise_reaches_the_caller(models: dict[str, Task]) -> None:
    def texts() -> Iterator[str]:
        yield from ["a"] * 3000
        raise OSError("the disk is gone")

    for method in ("embed", "embed_iter"):
        with pytest.raises(OSError, match="the disk is gone"):
            list(getattr(models["feature-extraction"], method)(texts()))


def test_several_threads_share_a_model(models: dict[str, Task]) -> None:
    model = models["feature-extraction"]
    wanted = model.embed(ODD * 200)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(model.embed, [ODD * 200] * 8):
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


# --- classify


def test_classes_are_the_softmax_of_the_logits(models: dict[str, Task]) -> None:
    model = models["text-classification"]
    found = model.classify(ODD)
    for text, one in zip(ODD, found, strict=True):
        scores = list(one.scores.values())
        assert tuple(one.scores) == LABELS["text-classification"]
        assert sum(scores) == pytest.approx(1.0)
        assert one.score == max(scores) == one.scores[one.label]
        assert model.classify([text])[0].score == pytest.approx(one.score, abs=1e-6)
    assert model.classify([]) == []
    assert json.loads(json.dumps(found[0].to_dict())) == found[0].to_dict()


@pytest.mark.parametrize(
    ("problem", "total"),
    [("single_label_classification", 1.0), ("multi_label_classification", None), ("regression", None)],
)
def test_the_problem_decides_what_a_score_is(tmp_path: Path, problem: str, total: float | None) -> None:
    with open_task(tmp_path, "text-classification", classifier(), text=processor(problem=problem)) as model:
        one = model.classify(["hello world"])[0]
        logits = model.run({"input_ids": [ids("hello world")], "attention_mask": [[1] * 4]})["logits"][0]  # type: ignore[list-item]
    scores = np.array(list(one.scores.values()))
    wanted = logits if problem == "regression" else 1 / (1 + np.exp(-logits))
    wanted = softmax(logits) if total else wanted
    np.testing.assert_allclose(scores, wanted, rtol=1e-6)
    assert list(one.scores) == [f"LABEL_{i}" for i in range(CLASSES)]


def test_pairs_are_classified_together(models: dict[str, Task]) -> None:
    pair, single = models["text-classification"].classify([("hello", "world"), "hello"])
    assert pair.scores != single.scores


# --- tag


def test_entities_lie_where_they_say(models: dict[str, Task]) -> None:
    model = models["token-classification"]
    texts = [*ODD, "Paris and London, the city of Mary on the river!"]
    found = model.tag(texts, max_tokens=32)
    assert len(found) == len(texts)
    assert any(found)
    for text, entities in zip(texts, found, strict=True):
        clean = text.replace("\ud800", "\ufffd")
        alone = model.tag([text])[0]
        assert [(e.start, e.end) for e in alone] == [(e.start, e.end) for e in entities]
        assert [e.score for e in alone] == pytest.approx([e.score for e in entities], abs=1e-6)
        for entity in entities:
            assert entity.text == clean[entity.start : entity.end] != ""
            assert entity.label == "LOC"
            assert 1 / CLASSES <= entity.score <= 1.0
    assert model.tag([]) == []


# --- answer


def test_the_answer_is_cut_from_the_context(models: dict[str, Task]) -> None:
    context = "John was in Paris , the green City on a river . Mary was in London ."
    found = models["question-answering"].answer("where was john ?", context)
    assert found.text == "Paris , the green City"
    assert context[found.start : found.end] == found.text
    assert 0.5 < found.score <= 1.0


def test_an_answer_is_found_at_the_end_of_a_megabyte(models: dict[str, Task]) -> None:
    context = "the cat was in the house . " * 37_000 + "John was in Paris , the green city . " + "a dog . " * 100
    found = models["question-answering"].answer("where was john ?", context)
    assert found.text == "Paris , the green city"
    assert found.start == context.index("Paris")


@pytest.mark.parametrize("context", ["", "  \n "])
def test_a_context_without_tokens_has_no_answer(models: dict[str, Task], context: str) -> None:
    found = models["question-answering"].answer("where ?", context)
    assert (found.text, found.start, found.end) == ("", 0, 0)


def test_no_answer_wins_only_where_it_may(models: dict[str, Task]) -> None:
    model = models["question-answering"]
    # Neither "paris" nor "city": every token and [CLS] are as likely; ties are answers.
    assert model.answer("where ?", "the cat", no_answer=True).text != ""
    context = "city of paris"  # the only start is after the only end
    likely = model.answer("where ?", context)
    assert likely.text in ("city", "paris", "city of paris")
    assert likely.score < 0.01


def test_max_answer_tokens_bounds_the_answer(models: dict[str, Task]) -> None:
    context = "paris and the red cat and the blue city"
    model = models["question-answering"]
    assert model.answer("what ?", context).text == context
    assert len(model.answer("what ?", context, max_answer_tokens=3).text.split()) <= 3
    with pytest.raises(UsageError, match="counts"):
        model.answer("what ?", context, max_answer_tokens=0)


def test_question_and_context_are_texts(models: dict[str, Task]) -> None:
    with pytest.raises(UsageError, match="the context is list, not a str"):
        models["question-answering"].answer("a", ["b"])  # type: ignore[arg-type]
    assert isinstance(models["question-answering"].answer("", "paris city"), Answer)


# --- fill


def test_a_mask_is_filled_with_the_likeliest_tokens(models: dict[str, Task]) -> None:
    model = models["fill-mask"]
    found = model.fill("hello [MASK] !", top_k=3)
    scores = softmax(model.run({"input_ids": [[VOCABULARY.index("[MASK]")]]})["logits"][0, 0])  # type: ignore[list-item]
    assert [one.id for one in found] == np.argsort(-scores)[:3].tolist()
    assert [one.score for one in found] == pytest.approx(np.sort(scores)[::-1][:3].tolist(), rel=1e-6)
    for one in found:
        assert one.mask == 0
        if one.token in ("red", "blue", "cat"):
            assert one.text == f"hello {one.token}!"


def test_several_masks_are_filled_one_after_another(models: dict[str, Task]) -> None:
    found = models["fill-mask"].fill("[MASK] was [MASK]", top_k=2)
    assert [one.mask for one in found] == [0, 0, 1, 1]
    assert all(one.text.count("[MASK]") == 1 and "[CLS]" not in one.text for one in found if one.token != "[MASK]")


def test_a_text_without_a_mask_names_the_token(models: dict[str, Task]) -> None:
    with pytest.raises(UsageError, match=r"the text has no mask. Write \[MASK\]"):
        models["fill-mask"].fill("hello")
    with pytest.raises(UsageError, match="no mask in its first 128 tokens"):
        models["fill-mask"].fill("hello " * 200 + "[MASK]")


def test_top_k_is_at_most_the_vocabulary(models: dict[str, Task]) -> None:
    assert len(models["fill-mask"].fill("[MASK]", top_k=10_000)) == len(VOCABULARY)
    with pytest.raises(UsageError, match="top_k is 0"):
        models["fill-mask"].fill("[MASK]", top_k=0)


# --- rows


@pytest.mark.parametrize(
    ("task", "record", "keys"),
    [
        ("feature-extraction", "hello", {"embedding"}),
        ("feature-extraction", {"text": "hello"}, {"embedding"}),
        ("text-classification", {"text": "a", "text_pair": "b"}, {"label", "score", "scores"}),
        ("token-classification", "paris", {"entities"}),
        ("question-answering", {"question": "a", "context": "b"}, {"text", "score", "start", "end"}),
        ("fill-mask", {"text": "[MASK]", "top_k": 2}, {"fillings"}),
        ("tensors", {"input_ids": [[1, 2]], "attention_mask": [[1, 1]]}, {"sentence_embedding"}),
    ],
)
def test_rows_are_json(models: dict[str, Task], task: str, record: object, keys: set[str]) -> None:
    (row,) = models[task].rows([record])  # type: ignore[list-item]
    assert set(row) == keys
    assert json.loads(json.dumps(row)) == row


@pytest.mark.parametrize(
    ("task", "record", "words"),
    [
        ("feature-extraction", {"txt": "a"}, 'field "text" is missing; the record has txt'),
        ("feature-extraction", {"text": 3}, 'field "text" is not a text'),
        ("question-answering", "just text", 'field "question" is missing; the record has plain text'),
        ("fill-mask", {"text": "[MASK]", "top_k": "x"}, "top_k"),
        ("tensors", "text", "a JSON object"),
        ("tensors", {"input_ids": [[1, 2]]}, "missing"),
        ("tensors", {"input_ids": [[1], [1, 2]], "attention_mask": [[1]]}, "inhomogeneous"),
    ],
)
def test_records_that_do_not_fit_are_data_errors(
    models: dict[str, Task], task: str, record: object, words: str
) -> None:
    with pytest.raises(DataError, match=words):
        models[task].rows([record])  # type: ignore[list-item]


def test_a_text_task_without_processor_is_a_bundle_error(models: dict[str, Task]) -> None:
    bundle = models["feature-extraction"].bundle
    bare = replace(bundle, manifest=replace(bundle.manifest, processor=None))
    session = Session(bundle.path / "cpu-fp32.onnx", CPU_PROVIDER, options=bundle.manifest.variants[0].session)
    with pytest.raises(BundleError, match="no text processor"):
        TASKS["feature-extraction"](bare, session)
