from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from artifacts.errors import DataError
from artifacts.manifest import TextProcessor
from compiler.calibrate import Batch, Batches, tensor_batches, text_batches
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
