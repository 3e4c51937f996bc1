from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from artifacts.errors import DataError
from artifacts.manifest import TensorSpec, TextProcessor
from artifacts.signature import STEP_INPUTS, cache_names
from compiler.calibrate import Batch, Batches, tensor_batches, text_batches, token_batches
from compiler.calibrate.batches import check, survey
from compiler.shorten import LONGEST, shortened
from runtimes.text import Tokens

NAMES = ("input_ids", "attention_mask", "token_type_ids")
PROCESSOR = TextProcessor(
    tokenizer="processor/tokenizer.json",
    max_length=512,
    pad_id=99,
    pad_token="[PAD]",
    pad_type_id=7,
    pairs=True,
    labels=(),
    mask_token="",
    problem="",
)


def tokens(length: int, first: int = 0) -> Tokens:
    ids = np.arange(first, first + length, dtype=np.int64)
    flags = np.zeros(length, np.bool_)
    return Tokens(ids, ids % 2, flags, np.zeros((0, 2), np.int64), flags, np.zeros((0, 2), np.int64))


def decoder_specs(layers: int = 2, dtype: str = "float32") -> tuple[TensorSpec, ...]:
    pasts = [past for layer in range(layers) for past, _ in cache_names(layer)]
    caches = (TensorSpec(past, dtype, ("batch", 2, "capacity", 8)) for past in pasts)
    return (*(TensorSpec(*one) for one in STEP_INPUTS), *caches)


def value(name: str, dtype: ir.DataType, *shape: int | str) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))


IDS = value("ids", ir.DataType.INT64, "batch", "sequence")
X = value("x", ir.DataType.FLOAT, "batch", 3)
PAIR = {"ids": np.zeros((2, 5), np.int64), "x": np.zeros((2, 3), np.float32)}


def test_rows_of_one_length_go_together_and_none_is_padded() -> None:
    lengths = [5, 3, 5, 12, 3, 5, 1, 5]
    rows = [tokens(length, 100 * number) for number, length in enumerate(lengths)]
    batches = text_batches(rows, NAMES, PROCESSOR, most_tokens=10)
    found = list(batches)
    assert [batch.examples for batch in found] == [(6,), (1, 4), (0, 2), (5, 7), (3,)]
    for batch in found:
        assert set(batch.feeds) == set(NAMES)
        assert (batch.feeds["attention_mask"] == 1).all()
        for number, row in zip(batch.examples, batch.feeds["input_ids"], strict=True):
            np.testing.assert_array_equal(row, rows[number].ids, strict=True)
    assert batches.rows_apart
    assert batches.notes == ()
    again = [batch.feeds["input_ids"].tolist() for batch in batches]
    assert again == [batch.feeds["input_ids"].tolist() for batch in found]


def test_long_rows_are_cut_and_it_is_said() -> None:
    rows = [tokens(LONGEST + 1), tokens(LONGEST), tokens(100_000), tokens(4)]
    batches = text_batches(rows, NAMES, PROCESSOR)
    assert batches.notes == ("2 of 4 texts were cut to 128 tokens for calibration",)
    widest = list(batches)[-1]
    assert widest.feeds["input_ids"].shape == (3, LONGEST)
    assert widest.feeds["input_ids"][:, -1].tolist() == [LONGEST, LONGEST - 1, 99_999], "the closing token stays"
    narrow = text_batches(rows, NAMES, PROCESSOR, longest=3)
    assert [batch.feeds["input_ids"].shape for batch in narrow] == [(4, 3)]


def test_a_short_row_is_left_as_it_is() -> None:
    row = tokens(6)
    assert shortened(row, 6) is row
    assert shortened(row, 4).ids.tolist() == [0, 1, 2, 5]


def test_an_empty_text_is_one_attended_token() -> None:
    (batch,) = text_batches([tokens(0), tokens(0)], NAMES, PROCESSOR)
    assert batch.feeds["attention_mask"].tolist() == [[1], [1]]


def test_tensors_are_one_example_a_batch_unless_their_rows_are_apart() -> None:
    feeds = [PAIR, PAIR]
    assert [batch.examples for batch in tensor_batches(feeds)] == [(0,), (1,)]
    apart = tensor_batches(feeds, rows_apart=True)
    assert [batch.examples for batch in apart] == [(0, 1), (2, 3)]
    lazy = tensor_batches(lambda: (dict(one) for one in feeds), rows_apart=True)
    assert [batch.examples for batch in lazy] == [batch.examples for batch in lazy] == [(0, 1), (2, 3)]


def test_a_part_is_a_view() -> None:
    feeds = {"x": np.arange(12, dtype=np.float32).reshape(4, 3)}
    batch = Batch(feeds, (7, 8, 9, 10))
    part = batch.part(1, 3)
    assert part.examples == (8, 9)
    assert part.feeds["x"].base is not None
    np.testing.assert_array_equal(part.feeds["x"], feeds["x"][1:3])
    assert batch.part(0, 4) is batch
    assert batch.elements == part.elements == 3


def test_a_survey_finds_the_smallest_and_the_largest_example() -> None:
    batches = tensor_batches(
        [{"ids": np.zeros((n, k), np.int64)} for n, k in ((3, 4), (5, 2), (2, 9))], rows_apart=True
    )
    found = survey(batches, [IDS])
    assert found.examples == 10
    assert found.shapes == {(3, 4), (5, 2), (2, 9)}
    assert (found.smallest.examples, found.smallest.elements) == ((3,), 2)
    assert (found.largest.examples, found.largest.elements) == ((8,), 9)


def test_the_digest_is_of_the_content() -> None:
    def digest(array: np.ndarray, name: str = "ids") -> str:
        return survey(tensor_batches([{name: array}]), [value(name, ir.DataType.INT64, "n", "m")]).digest

    array = np.arange(6, dtype=np.int64).reshape(2, 3)
    assert digest(array) == digest(array.copy(order="F"))
    assert len({digest(array), digest(array + 1), digest(array.reshape(3, 2)), digest(array, "other")}) == 4


BAD = [
    ({"ids": PAIR["ids"]}, "lacks x, which the model takes"),
    (PAIR | {"z": PAIR["x"]}, "has 'z'; the model takes ids, x"),
    (PAIR | {"ids": PAIR["ids"].astype(np.int32)}, r"ids is int32 in examples 0 to 1 of .*, and the model takes int64"),
    (PAIR | {"x": PAIR["x"].astype(np.float64)}, "x is float64 in .* and the model takes float32"),
    (PAIR | {"x": np.array([["a"], ["b"]])}, "x is <U1 in .* and the model takes float32"),
    (PAIR | {"ids": PAIR["ids"][0]}, r"ids is \[5\] in .*, and the model takes \[batch, sequence\]"),
    (PAIR | {"x": np.zeros((2, 4), np.float32)}, r"x is \[2, 4\] in .*, and the model takes \[batch, 3\]"),
    (PAIR | {"x": np.array([[0, 1, 2], [3, np.nan, 5]], np.float32)}, "x is nan in example 1 of the calibration data"),
    (
        PAIR | {"x": np.array([[-np.inf, 1, 2], [3, 4, 5]], np.float32)},
        "x is -inf in example 0 of the calibration data",
    ),
]


@pytest.mark.parametrize(("feeds", "text"), BAD)
def test_feeds_that_do_not_fit_the_graph(feeds: dict[str, np.ndarray], text: str) -> None:
    with pytest.raises(DataError, match=text) as caught:
        survey(Batches(lambda: [Batch(feeds, (0, 1))], rows_apart=True), [IDS, X])
    assert "\n" not in str(caught.value)


def test_inputs_of_unequal_length_cannot_be_apart() -> None:
    feeds = PAIR | {"x": np.zeros((3, 3), np.float32)}
    with pytest.raises(DataError, match="must be as long"):
        survey(tensor_batches([feeds], rows_apart=True), [IDS, X])
    assert survey(tensor_batches([feeds]), [IDS, X]).examples == 1


@pytest.mark.parametrize("feeds", [[], [{"ids": np.zeros((0, 4), np.int64)}], [{"ids": np.zeros((2, 0), np.int64)}]])
def test_no_data(feeds: list[dict[str, np.ndarray]]) -> None:
    with pytest.raises(DataError, match="there is no calibration data"):
        survey(tensor_batches(feeds, rows_apart=True), [IDS])


def test_a_graph_that_states_nothing_takes_anything() -> None:
    silent = ir.Value(name="ids")
    check(Batch({"ids": np.zeros((2, 5, 1), np.float32)}, (0, 1)), [silent], rows_apart=True)


def test_an_input_without_axes() -> None:
    batches = tensor_batches([{"s": np.array(1.5, np.float32)}, {"s": np.array(np.nan, np.float32)}])
    with pytest.raises(DataError, match="s is nan in example 1 of"):
        survey(batches, [value("s", ir.DataType.FLOAT)])


def test_a_processor_of_another_pad_changes_nothing() -> None:
    rows = [tokens(3), tokens(7)]
    other = replace(PROCESSOR, pad_id=1)
    for one, two in zip(text_batches(rows, NAMES, PROCESSOR), text_batches(rows, NAMES, other), strict=True):
        np.testing.assert_array_equal(one.feeds["input_ids"], two.feeds["input_ids"])


def windows(*lengths: int) -> list[np.ndarray]:
    return [np.arange(100 * number, 100 * number + length) for number, length in enumerate(lengths)]


def test_windows_of_one_length_are_first_prompts_that_ask_for_every_position() -> None:
    rows, inputs = windows(5, 3, 5, 12, 3, 5), decoder_specs(dtype="float16")
    batches = token_batches(rows, inputs, most_tokens=10)
    found = list(batches)
    assert [batch.examples for batch in found] == [(1, 4), (0, 2), (5,), (3,)]
    assert batches.rows_apart
    for batch in found:
        count, length = len(batch.examples), len(rows[batch.examples[0]])
        assert list(batch.feeds) == [spec.name for spec in inputs]
        assert [str(array.dtype) for array in batch.feeds.values()] == [spec.dtype for spec in inputs]
        np.testing.assert_array_equal(batch.feeds["input_ids"], np.stack([rows[number] for number in batch.examples]))
        for name in ("position_ids", "logits_index"):
            np.testing.assert_array_equal(batch.feeds[name], np.tile(np.arange(length), (count, 1)))
        assert batch.feeds["seqlens_k"].tolist() == [length - 1] * count
        assert batch.feeds["total_sequence_length"] == length
        assert batch.feeds["total_sequence_length"].shape == ()
        for past in list(batch.feeds)[len(STEP_INPUTS) :]:
            assert batch.feeds[past].shape == (count, 2, length, 8)
            assert not batch.feeds[past].any()
    again = [batch.feeds["input_ids"].tolist() for batch in batches]
    assert again == [batch.feeds["input_ids"].tolist() for batch in found]


def test_windows_fit_a_decoder_graph() -> None:
    inputs = decoder_specs()
    values = [value(spec.name, ir.DataType.from_numpy(np.dtype(spec.dtype)), *spec.shape) for spec in inputs]
    found = survey(token_batches(windows(5, 3, 5), inputs), values)
    # A token has its id, its position twice, and 2 x 8 numbers in each of four pasts; a row has two lengths.
    assert found.shapes == {(1, 3 * (3 + 64) + 2), (2, 5 * (3 + 64) + 2)}
    assert found.bytes == 2 * (5 * (3 * 8 + 64) + 4) + 4, "the four pasts are one array"
    with pytest.raises(DataError, match="lacks other, which the model takes"):
        survey(token_batches(windows(5), inputs), [*values, value("other", ir.DataType.FLOAT)])


def test_an_empty_window_is_no_example() -> None:
    inputs = decoder_specs()
    values = [value(spec.name, ir.DataType.from_numpy(np.dtype(spec.dtype)), *spec.shape) for spec in inputs]
    assert survey(token_batches(windows(0, 4, 1, 0), inputs), values).examples == 2
    with pytest.raises(DataError, match="there is no calibration data"):
        survey(token_batches(windows(0), inputs), values)


def test_an_input_without_axes_belongs_to_all_examples() -> None:
    (batch,) = token_batches(windows(4, 4, 4), decoder_specs())
    assert batch.elements == batch.part(1, 2).elements == batch.twice().elements
    for other, count in ((batch.part(1, 3), 2), (batch.twice(), 6)):
        assert other.feeds["total_sequence_length"] is batch.feeds["total_sequence_length"]
        assert other.feeds["seqlens_k"].tolist() == [3] * count
        assert len(other.feeds["past_key_values.1.value"]) == len(other.examples) == count


def test_the_digest_tells_shared_arrays_from_others() -> None:
    inputs = [value(name, ir.DataType.FLOAT, "n") for name in ("a", "b", "c")]
    one, other = np.ones(3, np.float32), np.zeros(3, np.float32)

    def digest(*arrays: np.ndarray) -> str:
        return survey(tensor_batches([dict(zip("abc", arrays, strict=True))]), inputs).digest

    assert digest(one, one, other) == digest(one, one, other.copy())
    assert (
        len({digest(one, one, other), digest(one, other, other), digest(one, other, one), digest(one, one, one)}) == 4
    )
