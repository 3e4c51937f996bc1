from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import tiny_models
from numpy.typing import NDArray

from artifacts.errors import DataError
from artifacts.manifest import TensorSpec
from compiler.generation import (
    FILLED,
    PROOF_SHAPES,
    continued_error,
    decode,
    golden_prompt,
    held_out,
    judged_tokens,
    prefill,
    teacher_forced,
    timed,
    windows,
)
from runtimes.generate.feeds import cache_feeds
from runtimes.golden import Golden

VOCABULARY = 11
STEP = (
    TensorSpec("input_ids", "int64", ("batch", "sequence")),
    TensorSpec("position_ids", "int64", ("batch", "sequence")),
    TensorSpec("seqlens_k", "int32", ("batch",)),
    TensorSpec("total_sequence_length", "int32", ()),
    TensorSpec("logits_index", "int64", ("batch", "positions")),
)
INPUTS = (
    *STEP,
    TensorSpec("past_key_values.0.key", "float32", ("batch", 1, "capacity", 1)),
    TensorSpec("past_key_values.0.value", "float32", ("batch", 1, "capacity", 1)),
)
OUTPUTS = (TensorSpec("logits", "float32", ("batch", "positions", VOCABULARY)),)
Arrays = dict[str, NDArray[Any]]


def decoder(feeds: Mapping[str, NDArray[Any]], *, slot: int = 0) -> Arrays:
    """A decoder of one line: its keys are the tokens, its logits a function of their running sum.

    ``slot``: how far beside its place each token is written.
    """
    keys = feeds["past_key_values.0.key"].copy()
    rows = np.arange(len(keys))[:, None]
    places = feeds["position_ids"]
    for row, last in enumerate(feeds["seqlens_k"]):
        kept = places[row] <= last
        keys[row, 0, np.minimum(places[row][kept] + slot, keys.shape[2] - 1), 0] = feeds["input_ids"][row][kept]
    sums = np.cumsum(keys[:, 0, :, 0], axis=1)
    wanted = places[rows, feeds["logits_index"]]
    logits = np.cos(sums[rows, wanted][..., None] * np.arange(1, VOCABULARY + 1)).astype(np.float32)
    return {"logits": logits, "present.0.key": keys, "present.0.value": keys}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_models.write_tokenizer(folder)
    return folder / "tokenizer.json"


def rows(*lengths: int) -> list[NDArray[np.int64]]:
    rng = np.random.default_rng(len(lengths))
    return [rng.integers(1, VOCABULARY, length) for length in lengths]


def test_windows_are_the_first_tokens_with_those_that_the_tokenizer_adds(tokenizer: Path) -> None:
    long, short = windows(["the cat " * 50, "a dog"], tokenizer, longest=9)
    assert (len(long), len(short)) == (9, 4)
    assert long[0] == short[0] == 2
    assert short[-1] == 3
    assert long.dtype == np.int64


def test_a_text_of_one_token_has_no_next_one(tokenizer: Path) -> None:
    assert windows(["the cat"], tokenizer, longest=1) == []


def test_the_text_of_a_special_token_is_text(tokenizer: Path) -> None:
    (ids,) = windows(["a [MASK] dog"], tokenizer)
    assert 4 not in ids


def test_held_out_windows_are_spread_over_the_data_and_sorted() -> None:
    given = [np.full(length, index) for index, length in enumerate([10, 30, 20] * 10)]
    taken = held_out(given, 200, "x.txt")
    assert sum(len(row) for row in taken) == pytest.approx(200, abs=40)
    assert [len(row) for row in taken] == sorted((len(row) for row in taken), reverse=True)
    assert {int(row[0]) // 10 for row in taken} == {0, 1, 2}
    assert len(held_out(given, 10**6, "x.txt")) == 30
    assert len(held_out(given, 1, "x.txt")) == 1


def test_no_window_at_all() -> None:
    with pytest.raises(DataError, match=r"x\.txt has no text of two tokens"):
        held_out([], 100, "x.txt")


def test_larger_models_are_judged_on_fewer_tokens() -> None:
    def of(parameters: int) -> int:
        weight = ir.Value(name="w", const_value=ir.LazyTensor(lambda: None, ir.DataType.FLOAT, ir.Shape([parameters])))  # type: ignore[arg-type,return-value]
        return judged_tokens(ir.Model(ir.Graph([], [], nodes=[], initializers=[weight]), ir_version=10))

    assert (of(10**6), of(10**8), of(10**10)) == (16384, 10000, 4096)


def test_feeds_of_a_prompt() -> None:
    feeds = prefill(rows(3, 5), INPUTS, np.array([[2], [4]]), capacity=8)
    assert {spec.name: (feeds[spec.name].dtype.name, feeds[spec.name].ndim) for spec in INPUTS} == {
        spec.name: (spec.dtype, len(spec.shape)) for spec in INPUTS
    }
    assert list(feeds) == [spec.name for spec in INPUTS]
    assert feeds["input_ids"].shape == (2, 5)
    assert (feeds["input_ids"][0, 3:] == 0).all()
    assert feeds["position_ids"].tolist() == [[0, 1, 2, 3, 4]] * 2
    assert feeds["seqlens_k"].tolist() == [2, 4]
    assert feeds["total_sequence_length"] == 5
    assert feeds["past_key_values.0.key"].shape == (2, 1, 8, 1)


def test_feeds_of_a_step() -> None:
    feeds = decode(np.array([7, 8]), np.array([3, 5]), cache_feeds(INPUTS, 2, 8))
    assert list(feeds) == [spec.name for spec in INPUTS]
    assert [feeds[spec.name].dtype.name for spec in INPUTS] == [spec.dtype for spec in INPUTS]
    assert feeds["position_ids"].tolist() == [[3], [5]]
    assert feeds["seqlens_k"].tolist() == [3, 5]
    assert feeds["total_sequence_length"] == 6


def test_layers_share_an_empty_cache() -> None:
    made = cache_feeds(INPUTS, 2, 8)
    assert made["past_key_values.0.key"] is made["past_key_values.0.value"]


def test_teacher_forced_batches_ask_for_every_position_and_stay_small(monkeypatch: pytest.MonkeyPatch) -> None:
    given = rows(6, 5, 5, 2)
    (alone,) = teacher_forced(given, INPUTS, OUTPUTS)
    assert alone["logits_index"].tolist() == [[0, 1, 2, 3, 4, 5]] * 4
    monkeypatch.setattr("compiler.generation._LOGITS_BYTES", 2 * 6 * VOCABULARY * 4)
    first, second = teacher_forced(given, INPUTS, OUTPUTS)
    assert [one["input_ids"].shape for one in (first, second)] == [(2, 6), (2, 5)]


def golden(*lengths: int) -> Golden:
    feeds = golden_prompt(rows(*lengths), INPUTS, OUTPUTS)
    return Golden(feeds, {"logits": decoder(feeds)["logits"]})


def test_the_golden_prompt_is_ragged_and_asks_at_the_end_of_each_row() -> None:
    feeds, outputs = golden(40, 30)
    assert feeds["seqlens_k"].tolist() == [11, 6]
    assert feeds["logits_index"].tolist() == [[*range(5, 12)], [*range(7)]]
    assert outputs["logits"].shape == (2, 7, VOCABULARY)


def test_a_large_vocabulary_is_asked_for_less() -> None:
    wide = (TensorSpec("logits", "float32", ("batch", "positions", 150_000)),)
    assert golden_prompt(rows(40, 30), INPUTS, wide)["logits_index"].tolist() == [[9, 10, 11], [4, 5, 6]]


@pytest.mark.parametrize("lengths", [(40, 30), (3, 2), (40,), (2,)])
def test_going_on_token_by_token_gives_the_same_logits(lengths: tuple[int, ...]) -> None:
    assert continued_error(decoder, golden(*lengths)) == 0.0


def test_a_cache_written_at_the_wrong_place_is_seen() -> None:
    def wrong(feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        return decoder(feeds, slot=int(feeds["input_ids"].shape[1] == 1))

    given = golden(40, 30)
    assert np.array_equal(wrong(given.feeds)["logits"], given.outputs["logits"]), "the golden test alone does not"
    assert continued_error(wrong, given) > 0.1


def test_a_cache_that_is_not_read_is_seen() -> None:
    def forgetful(feeds: Mapping[str, NDArray[Any]]) -> Arrays:
        return decoder({**feeds, **cache_feeds(INPUTS, len(feeds["input_ids"]), 12)})

    assert continued_error(forgetful, golden(40, 30)) > 0.1


def test_what_is_timed() -> None:
    feeds = timed(INPUTS, PROOF_SHAPES, 1024, VOCABULARY)
    assert list(feeds) == list(PROOF_SHAPES)
    assert {shape: one["input_ids"].shape for shape, one in feeds.items()} == {shape: shape for shape in PROOF_SHAPES}
    step, prompt = feeds[8, 1], feeds[1, 512]
    assert step["seqlens_k"].tolist() == [FILLED] * 8
    assert step["past_key_values.0.key"].shape == (8, 1, 160, 1)
    assert step["past_key_values.0.key"].std() > 0.5
    assert prompt["seqlens_k"].tolist() == [511]
    assert prompt["logits_index"].tolist() == [[511]]
    assert all(one["input_ids"].max() < VOCABULARY for one in feeds.values())


def test_a_short_context_bounds_what_is_timed() -> None:
    feeds = timed(INPUTS, PROOF_SHAPES, 64, VOCABULARY)
    assert list(feeds) == [(1, 1), (8, 1), (1, 64)]
    assert feeds[1, 1]["position_ids"].tolist() == [[63]]
