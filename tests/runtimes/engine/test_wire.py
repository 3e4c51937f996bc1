from __future__ import annotations

import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from artifacts.errors import OverloadError, UsageError, WorkerError
from runtimes.engine.wire import Frames, WireError, decode, encode, read_error, told_error

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
KINDS = st.sampled_from(["bool", "int8", "uint16", "int64", "float16", "float32", "float64"])
ARRAYS = st.dictionaries(
    st.text(max_size=5), KINDS.flatmap(lambda kind: arrays.arrays(kind, arrays.array_shapes(min_dims=0, min_side=0)))
)


@given(st.dictionaries(st.text(), JSON), ARRAYS)
def test_a_frame_comes_back_as_it_was(message, told):
    found, values = decode(encode(message, told))
    assert found == message
    assert list(values) == list(told)
    for name, array in told.items():
        assert values[name].dtype == array.dtype
        np.testing.assert_array_equal(values[name], array)


@given(st.lists(st.tuples(st.dictionaries(st.text(), JSON), ARRAYS), max_size=3), st.integers(1, 50))
def test_frames_may_come_in_pieces_of_any_size(sent, size):
    stream = b"".join(encode(*one) for one in sent)
    frames = Frames()
    found = [frame for start in range(0, len(stream), size) for frame in frames.feed(stream[start : start + size])]
    assert [decode(frame)[0] for frame in found] == [message for message, _ in sent]


@given(st.binary(max_size=200))
def test_any_bytes_are_a_frame_or_an_error(data):
    for frame in (data, struct.pack("<QI", len(data) + 4, min(len(data), 20)) + data):
        with pytest.raises(WireError):
            decode(frame)


@given(st.data())
def test_a_damaged_frame_is_read_or_refused_and_nothing_else(data):
    frame = bytearray(encode({"op": "x", "n": [1, 2]}, {"a": np.arange(6.0).reshape(2, 3), "b": np.array(["x"])}))
    place = data.draw(st.integers(0, len(frame) - 1))
    frame[place] = data.draw(st.integers(0, 255))
    try:
        _, values = decode(frame)
    except WireError:
        return
    assert all(isinstance(value, np.ndarray) for value in values.values())


@pytest.mark.parametrize(
    "told",
    [
        ["a", "float32", [1 << 60]],
        ["a", "float32", [-1]],
        ["a", "float32", [1 << 40, 1 << 40]],
        ["a", "float32", [0.5]],
        ["a", "object", [1]],
        ["a", "str", [2], ["x"]],
        ["a", "str", [1], [3]],
        ["a", "str", [1]],
        [3, "float32", [0]],
        "a",
        None,
    ],
)
def test_arrays_that_lie_are_refused(told):
    header = json.dumps({"message": {}, "arrays": [told]}).encode()
    with pytest.raises(WireError):
        decode(struct.pack("<QI", 4 + len(header), len(header)) + header)


@pytest.mark.parametrize("size", [0, 3, (8 << 30) + 1, (1 << 64) - 1])
def test_an_absurd_length_is_refused_before_memory_is_taken(size):
    with pytest.raises(WireError, match=f"{size} bytes"):
        list(Frames().feed(struct.pack("<Q", size)))


def test_texts_travel_and_other_objects_do_not():
    texts = np.array([["a", "ä\ud800"], ["", "日"]], object)
    np.testing.assert_array_equal(decode(encode({}, {"t": texts}))[1]["t"], texts)
    for bad in (np.array([object()]), np.array([1 + 2j]), np.array(["2020-01-01"], "datetime64[D]")):
        with pytest.raises(UsageError, match="cannot be sent"):
            encode({}, {"bad": bad})


def test_messages_hold_what_json_holds_and_numpy_numbers():
    assert decode(encode({"a": np.float32(0.5), "b": np.arange(2)}))[0] == {"a": 0.5, "b": [0, 1]}
    with pytest.raises(UsageError, match="cannot be sent"):
        encode({"a": {1, 2}})


def test_arrays_of_a_frame_lie_at_multiples_of_eight():
    frame = bytearray(encode({"odd": "x"}, {"a": np.ones(3, np.int8), "b": np.ones(2)}))
    assert decode(frame)[1]["b"].flags.aligned


def test_errors_travel():
    found = read_error(told_error(UsageError("that is wrong", "Do this")))
    assert (type(found), found.what, found.remedy) == (UsageError, "that is wrong", "Do this")
    assert isinstance(read_error(told_error(OverloadError("full"))), OverloadError)
    assert isinstance(read_error({"kind": "Ellipsis", "what": "x"}), WorkerError)
    assert isinstance(read_error({"kind": "annotations", "what": "x"}), WorkerError)
    assert isinstance(read_error("nonsense"), WorkerError)
