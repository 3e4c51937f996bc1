from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from task_builders import bytelevel, minilm_tokenizer, processor, wordlevel, wordpiece
from tokenizers import Tokenizer, models

from artifacts.errors import BundleError, UsageError
from runtimes.items import check_text, check_texts
from runtimes.settings import MAX_TOKENS
from runtimes.text import MADE, Batch, Chunk, TextEncoder, pad

PROSE = "It was the best of times, it was the worst of times; the epoch of belief and of incredulity. "


def minilm(max_length: int = 256, inputs: tuple[str, ...] = MADE) -> TextEncoder:
    return TextEncoder(processor(max_length=max_length), minilm_tokenizer(), inputs)


def plain(path: Path, max_length: int) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length)
    return tokenizer


# --- what a user gives


def test_one_text_instead_of_a_list_is_refused() -> None:
    with pytest.raises(UsageError, match=r"embed takes a list of texts, got one str\. Pass \[text\]"):
        check_texts("hello", method="embed")


@pytest.mark.parametrize("texts", [b"hello", None, 3, {"a": "b"}])
def test_what_is_no_list_is_refused(texts: object) -> None:
    with pytest.raises(UsageError, match="takes a list of texts"):
        check_texts(texts)


@pytest.mark.parametrize("bad", [None, 1, b"x", ["a"], float("nan")])
def test_an_element_that_is_no_text_is_named_by_index(bad: object) -> None:
    with pytest.raises(UsageError, match="element 2 is"):
        check_texts(["a", "b", bad])


def test_pairs_are_texts_only_where_pairs_are_taken() -> None:
    assert check_texts([("a", "b"), ["c", "d"], "e"], pairs=True) == [("a", "b"), ("c", "d"), "e"]
    with pytest.raises(UsageError, match="element 0 is tuple, not a str"):
        check_texts([("a", "b")])
    with pytest.raises(UsageError, match="element 1 is tuple, not a str or a pair"):
        check_texts(["x", ("a", 1)], pairs=True)


def test_generators_and_tuples_are_lists() -> None:
    assert check_texts(word for word in ("a", "b")) == ["a", "b"]
    assert check_texts(("a",)) == ["a"]


def test_lone_surrogates_become_one_replacement_each() -> None:
    assert check_texts(["a\ud800b\udfff"]) == ["a\ufffdb\ufffd"]
    assert check_text("😀", "x") == "😀"
    assert len(minilm().encode(check_texts(["a\ud800b"]))[0]) >= 3


def test_a_text_that_is_none_is_named() -> None:
    with pytest.raises(UsageError, match="the question is int, not a str"):
        check_text(3, "the question")


# --- ids


def test_ids_are_those_of_the_tokenizer_without_its_padding_and_truncation() -> None:
    text = PROSE * 20
    row = minilm(256).encode([text])[0]
    assert row.ids.tolist() == plain(minilm_tokenizer(), 256).encode(text).ids
    assert len(row) == 256  # tokenizer.json says 128
    assert row.ids[0] == 101
    assert row.ids[-1] == 102
    assert len(minilm(256).encode(["hello"])[0]) == 3  # tokenizer.json pads to 128


@pytest.mark.parametrize("text", ["", " ", "😀😀😀", "\x00\x01", "e\u0301" * 5, "日本語", "[MASK] [CLS]", "a" * 5000])
def test_odd_texts_are_tokenized_as_the_tokenizer_does(text: str) -> None:
    row = minilm(64).encode([text])[0]
    assert row.ids.tolist() == plain(minilm_tokenizer(), 64).encode(text).ids


def test_pairs_lose_tokens_from_the_longer_text_first() -> None:
    short, long_ = "hello world", PROSE * 10
    for first, second in ((short, long_), (long_, short), (long_, long_)):
        row = minilm(32).encode([(first, second)])[0]
        wanted = plain(minilm_tokenizer(), 32).encode(first, second)
        assert row.ids.tolist() == wanted.ids
        assert row.types.tolist() == wanted.type_ids


# --- cutting by characters


@pytest.mark.parametrize("max_length", [8, 128, 512])
@pytest.mark.parametrize("make", [wordpiece, wordlevel, bytelevel])
def test_cutting_long_texts_changes_no_token(tmp_path: Path, max_length: int, make: object) -> None:
    path = make(tmp_path / "tokenizer.json")  # type: ignore[operator]
    encoder = TextEncoder(processor(max_length=max_length), path, ("input_ids",))
    rng = np.random.default_rng(0)
    for pieces in (("hello ", "cats, ", "  ", "é😀"), ("a",), (" " * 50, "tree"), ("[MASK]",), ("playing",)):
        text = "".join(rng.choice(pieces, 12_000))
        assert encoder.encode([text])[0].ids.tolist() == plain(path, max_length).encode(text).ids


def test_a_megabyte_of_prose_is_cut_before_it_is_tokenized() -> None:
    encoder = minilm(128)
    text = (PROSE * 12_000)[:1_000_000]
    assert len(encoder.shorten(text)) < 20_000
    assert encoder.encode([text])[0].ids.tolist() == plain(minilm_tokenizer(), 128).encode(text[:50_000]).ids


@pytest.mark.parametrize("text", ["a" * 1_000_000, " " * 1_000_000, "x" + " " * 999_998 + "y", "😀" * 250_000])
def test_a_megabyte_that_cannot_be_cut_is_still_quick(text: str) -> None:
    start = time.perf_counter()
    row = minilm(128).encode([text])[0]
    assert time.perf_counter() - start < 30.0
    assert row.ids.tolist() == plain(minilm_tokenizer(), 128).encode(text).ids


def test_short_texts_are_not_cut() -> None:
    assert minilm(512).shorten("x" * 4096) == "x" * 4096


# --- padding and batches


def test_padding_uses_what_the_manifest_says_and_only_the_graphs_inputs() -> None:
    encoder = TextEncoder(replace(processor(), pad_id=7, pad_type_id=3), minilm_tokenizer(), MADE)
    rows = encoder.encode(["hello", "hello there my friend"])
    feeds = pad(rows, MADE, encoder.processor)
    assert feeds["input_ids"].tolist()[0][3:] == [7, 7, 7]
    assert feeds["attention_mask"].tolist() == [[1, 1, 1, 0, 0, 0], [1] * 6]
    assert feeds["token_type_ids"].tolist()[0] == [0, 0, 0, 3, 3, 3]
    for array in feeds.values():
        assert array.dtype == np.int64
        assert array.flags.c_contiguous
    assert set(pad(rows, ("input_ids",), encoder.processor)) == {"input_ids"}


def test_an_empty_encoding_is_one_attended_pad_token(tmp_path: Path) -> None:
    encoder = TextEncoder(processor(), wordlevel(tmp_path / "t.json"), MADE)
    (batch,) = encoder.batches(["", "  "])
    assert batch.feeds["input_ids"].tolist() == [[0], [0]]
    assert batch.feeds["attention_mask"].tolist() == [[1], [1]]


def test_batches_hold_at_most_max_tokens_and_every_row_once() -> None:
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(["hello", "world"], n)) for n in rng.integers(0, 60, 500)]
    batches = list(minilm().batches(texts, max_tokens=256))
    places = [place for batch in batches for place in batch.spread({})[0].indices]
    assert sorted(places) == list(range(500))
    for batch in batches:
        assert batch.feeds["input_ids"].size <= 256
        for index, row, ids in zip(batch.indices, batch.rows, batch.feeds["input_ids"], strict=True):
            assert len(row) == len(texts[index].split()) + 2
            assert ids[: len(row)].tolist() == row.ids.tolist()
    padded = sum(batch.feeds["input_ids"].size for batch in batches)
    assert padded < 1.1 * sum(len(row) for batch in batches for row in batch.rows)


def prepared(lengths: list[int], padding: int | None) -> list[Batch]:
    words = [["world"] * (index % 2) + ["hello"] * length for index, length in enumerate(lengths)]
    texts = [" ".join(row[: length - 2]) for row, length in zip(words, lengths, strict=True)]
    return minilm().prepare(Chunk(0, texts), padding=padding)


def test_a_batch_ends_where_its_padding_would_cost_another_run() -> None:
    rng = np.random.default_rng(2)
    lengths = [int(length) for length in rng.choice(np.arange(3, 60), 40, replace=False)]
    batches = prepared(lengths, 24)
    places = [place for batch in batches for place in batch.indices]
    assert sorted(places) == list(range(40))
    for batch in batches:
        assert batch.feeds["input_ids"].size - sum(map(len, batch.rows)) <= 24
    # Another row would have been too much for each batch but the last.
    ascending = batches[::-1]
    for batch, following in pairwise(ascending):
        wider = len(following.rows[0])
        assert sum(wider - len(row) for row in batch.rows) > 24


def test_what_padding_costs_is_counted_over_the_whole_batch() -> None:
    assert [len(batch.rows) for batch in prepared([10, 11, 12, 30], 3)] == [1, 3]
    assert [len(batch.rows) for batch in prepared([10, 11, 12, 30], 2)] == [1, 1, 2]
    assert [len(batch.rows) for batch in prepared([10, 11, 12, 30], None)] == [4]
    assert [len(batch.rows) for batch in prepared([10] * 2 + [40], 0)] == [1, 2]


def test_a_row_longer_than_max_tokens_goes_alone() -> None:
    batches = list(minilm().batches(["a", PROSE, "b"], max_tokens=4))
    assert [len(batch.indices) for batch in batches] == [1, 1, 1]


def test_no_texts_give_no_batches() -> None:
    assert list(minilm().batches([])) == []


@pytest.mark.parametrize("max_tokens", [0, -1])
def test_max_tokens_must_be_positive(max_tokens: int) -> None:
    with pytest.raises(UsageError, match="max_tokens"):
        next(minilm().batches(["a"], max_tokens=max_tokens))


def test_an_endless_generator_is_read_lazily() -> None:
    read = itertools.count()
    texts = (f"text {next(read)}" for _ in itertools.repeat(None))
    first = list(itertools.islice(minilm().batches(texts), 3))
    assert all(batch.feeds["input_ids"].size <= MAX_TOKENS for batch in first)
    assert next(read) <= 1024


def test_chunks_are_bounded_in_characters() -> None:
    read = itertools.count()
    texts = (PROSE * 30 for _ in iter(lambda: next(read), -1))
    next(minilm().batches(texts))
    assert next(read) < 300


# --- windows


def test_windows_are_those_of_transformers(tmp_path: Path) -> None:
    encoder = TextEncoder(processor(max_length=384), minilm_tokenizer(), MADE)
    context = PROSE * 60
    tokenizer = Tokenizer.from_file(str(minilm_tokenizer()))
    tokenizer.no_padding()
    tokenizer.enable_truncation(384, stride=128, strategy="only_second")
    wanted = tokenizer.encode("what was it?", context)
    rows = list(encoder.windows("what was it?", context))
    assert [row.ids.tolist() for row in rows] == [e.ids for e in (wanted, *wanted.overflowing)]
    assert len(rows) > 3
    for row, encoding in zip(rows, (wanted, *wanted.overflowing), strict=True):
        assert row.context.tolist() == [sequence == 1 for sequence in encoding.sequence_ids]
        assert row.offsets.tolist() == [list(span) for span in encoding.offsets]
        for index in np.flatnonzero(row.context):
            word = encoding.token_to_word(int(index))
            assert tuple(row.words[index]) == encoding.word_to_chars(word, sequence_index=1)


def test_windows_cover_the_whole_context() -> None:
    context = PROSE * 60
    covered = np.zeros(len(context), bool)
    for row in minilm(64).windows("who?", context):
        assert len(row) <= 64
        for start, end in row.offsets[row.context]:
            covered[start:end] = True
    assert all(covered[i] or context[i] == " " for i in range(len(context)))


@pytest.mark.parametrize("max_length", [5, 6, 7, 8, 9, 10, 16, 33, 100, 512])
def test_a_long_question_leaves_room_for_the_context(max_length: int) -> None:
    rows = list(minilm(max_length).windows(PROSE * 50, PROSE * 3))
    assert all(row.context.any() and len(row) <= max_length for row in rows)
    kept = int((~rows[0].context & ~rows[0].special).sum())
    assert kept <= 64
    assert max_length < 200 or kept >= 60


def test_a_context_without_tokens_is_one_window() -> None:
    for context in ("", "   "):
        (row,) = minilm().windows("who?", context)
        assert not row.context.any()


def test_a_megabyte_of_context_is_windowed_quickly() -> None:
    start = time.perf_counter()
    rows = sum(1 for _ in minilm(384).windows("who?", (PROSE * 12_000)[:1_000_000]))
    assert rows > 500
    assert time.perf_counter() - start < 60.0


# --- damaged or unfit tokenizers


def test_a_graph_input_that_no_tokenizer_makes_is_named() -> None:
    with pytest.raises(BundleError, match="pixel_values"):
        minilm(inputs=("input_ids", "pixel_values"))


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"model": 1}'])
def test_a_damaged_tokenizer_is_a_bundle_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(BundleError, match="is not a tokenizer"):
        TextEncoder(processor(), path, MADE).encode(["a"])


@pytest.mark.parametrize("text", ["unheard-of", "unheard-of " * 1000])
def test_a_tokenizer_that_fails_is_a_bundle_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"hello": 0}, unk_token="[NONE]")).save(str(path))
    encoder = TextEncoder(processor(), path, MADE)
    with pytest.raises(BundleError, match="the tokenizer failed"):
        encoder.encode([text])
    with pytest.raises(BundleError, match="the tokenizer failed"):
        list(encoder.windows("hello", text))


def test_a_max_length_without_room_is_a_bundle_error() -> None:
    with pytest.raises(BundleError, match="leaves no room"):
        minilm(2).encode(["hello"])
    assert len(minilm(3).encode(["hello there"])[0]) == 3


def test_the_mask_token_must_be_known() -> None:
    encoder = TextEncoder(processor(mask_token="<nope>"), minilm_tokenizer(), MADE)
    with pytest.raises(BundleError, match="no mask token '<nope>'"):
        _ = encoder.mask_id
    assert TextEncoder(processor(mask_token="[MASK]"), minilm_tokenizer(), MADE).mask_id == 103


# --- the process


@pytest.mark.parametrize("text", ["'a b ' * 250_000", "'a' * 1_000_000", "'\\U0001f600' * 1_000_000"])
def test_a_megabyte_takes_no_gigabytes(text: str) -> None:
    status = Path("/proc/self/status")  # not getrusage: a child inherits the peak of its parent there
    if not status.exists():
        pytest.skip("peak memory is read from /proc")
    code = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r}); sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from task_builders import minilm_tokenizer, processor
from runtimes.text import MADE, TextEncoder
encoder = TextEncoder(processor(max_length=384), minilm_tokenizer(), MADE)
text = {text}
encoder.encode([text])
sum(1 for _ in encoder.windows("who?", text))
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    assert int(done.stdout) << 10 < 700 << 20


def test_tokenizing_survives_a_fork_and_prints_nothing() -> None:
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r}); sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from task_builders import minilm_tokenizer, processor
from runtimes.text import TextEncoder
encoder = TextEncoder(processor(), minilm_tokenizer(), ("input_ids",))
encoder.encode(["hello world"] * 100)
child = os.fork()
if child == 0:
    encoder.encode(["hello world"] * 100)
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    clean = {key: value for key, value in os.environ.items() if key != "TOKENIZERS_PARALLELISM"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=clean)
    assert (done.stdout, done.stderr) == ("7\n", "")


def test_the_users_choice_of_parallelism_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    minilm().encode(["a"])
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


def test_equal_items_are_one_row_and_every_place_gets_its_result() -> None:
    texts = ["hello", "world hello", "hello", "world", "hello", "world hello"]
    (batch,) = minilm().batches(texts)
    assert len(batch.rows) == 3
    assert batch.feeds["input_ids"].shape == (3, 4)
    spread, outputs = batch.spread({"ids": batch.feeds["input_ids"]})
    assert sorted(spread.indices) == list(range(6))
    assert not spread.twins
    assert np.array_equal(spread.feeds["input_ids"], outputs["ids"])
    for index, row, ids in zip(spread.indices, spread.rows, outputs["ids"], strict=True):
        assert ids[: len(row)].tolist() == minilm().tokenizer.encode(texts[index]).ids


def test_equal_items_of_different_chunks_are_computed_in_each() -> None:
    texts = ["hello"] * 600
    places = [index for batch in minilm().batches(texts) for index in batch.spread({})[0].indices]
    assert sorted(places) == list(range(600))


def test_a_batch_without_equal_items_is_itself() -> None:
    (batch,) = minilm().batches(["hello", "world"])
    outputs = {"ids": batch.feeds["input_ids"]}
    assert batch.spread(outputs) == (batch, outputs)
