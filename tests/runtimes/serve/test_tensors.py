"""Tensors of the Open Inference Protocol: what is true is read, and what lies is refused in one line."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import orjson
import pytest

from artifacts.errors import UsageError
from artifacts.manifest import TensorSpec
from runtimes.serve.tensors import DATATYPES, NUMPY, read_request, to_array, to_texts, write_answer

GRID = TensorSpec("x", "float32", ("n", 2))


def one(shape: object = (2, 2), datatype: object = "FP32", data: object = (1.0, 2.0, 3.0, 4.0), **more: object) -> Any:
    told = {"name": "x", "shape": shape, "datatype": datatype, **more}
    return told if data is None else {**told, "data": data}


def body(*inputs: object, raw: bytes = b"", **more: object) -> tuple[bytes, str]:
    text = json.dumps({"inputs": inputs, **more}).encode()
    return text + raw, str(len(text))


def read(*inputs: object, raw: bytes = b"", **more: object) -> Any:
    return read_request(*body(*inputs, raw=raw, **more))


def binary(shape: object, datatype: str, size: object) -> Any:
    return one(shape, datatype, None, parameters={"binary_data_size": size})


def texts(*values: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


@pytest.mark.parametrize("datatype", sorted(NUMPY))
def test_every_datatype_comes_and_goes_in_both_forms(datatype: str) -> None:
    array = np.array([[0, 1], [1, 1]]).astype(NUMPY[datatype])
    spec = TensorSpec("x", NUMPY[datatype], ("n", 2))
    for told, raw in (
        (one((2, 2), datatype, array.reshape(-1).tolist()), b""),
        (one((2, 2), datatype, array.tolist()), b""),
        (binary((2, 2), datatype, array.nbytes), array.tobytes()),
    ):
        found = to_array(read(told, raw=raw).inputs["x"], spec)
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)
    text, size = write_answer({}, {"y": array}, frozenset())
    assert size == 0
    assert orjson.loads(text)["outputs"] == [
        {"name": "y", "datatype": datatype, "shape": [2, 2], "data": array.reshape(-1).tolist()}
    ]
    text, size = write_answer({"id": "7"}, {"y": array}, frozenset({"y"}))
    assert orjson.loads(text[:size])["outputs"][0]["parameters"] == {"binary_data_size": array.nbytes}
    np.testing.assert_array_equal(np.frombuffer(text[size:], array.dtype).reshape(2, 2), array)


def test_binary_data_is_not_copied() -> None:
    array = np.arange(6, dtype=np.float32).reshape(3, 2)
    found = to_array(read(binary((3, 2), "FP32", 24), raw=array.tobytes()).inputs["x"], GRID)
    assert not found.flags.owndata
    assert not found.flags.writeable


def test_several_tensors_lie_one_after_another() -> None:
    first, second = np.arange(4, dtype=np.int64), np.ones(2, np.uint8)
    request = read(
        {"name": "a", "shape": [4], "datatype": "INT64", "parameters": {"binary_data_size": 32}},
        {"name": "b", "shape": [1], "datatype": "FP32", "data": [0.5]},
        {"name": "c", "shape": [2], "datatype": "BOOL", "parameters": {"binary_data_size": 2}},
        raw=first.tobytes() + second.tobytes(),
    )
    assert to_array(request.inputs["a"], TensorSpec("a", "int64", ("n",))).tolist() == [0, 1, 2, 3]
    assert to_array(request.inputs["b"], TensorSpec("b", "float32", (1,))).tolist() == [0.5]
    assert to_array(request.inputs["c"], TensorSpec("c", "bool", (2,))).tolist() == [True, True]


def test_a_scalar_has_no_extents() -> None:
    spec = TensorSpec("x", "int32", ())
    assert to_array(read(one([], "INT32", [7])).inputs["x"], spec).shape == ()
    assert to_array(read(binary([], "INT32", 4), raw=b"\x07\0\0\0").inputs["x"], spec) == 7


def test_texts_come_in_both_forms_and_go_in_both() -> None:
    for told, raw in (
        (one([2], "BYTES", ["schön", ""]), b""),
        (one([2, 1], "BYTES", [["schön"], [""]]), b""),
        (binary([2], "BYTES", 14), texts("schön".encode(), b"")),
    ):
        assert to_texts(read(told, raw=raw).inputs["x"]) == ["schön", ""]
    text, size = write_answer({}, {"y": ["schön", ""]}, frozenset({"y"}))
    assert text[size:] == texts("schön".encode(), b"")
    assert orjson.loads(write_answer({}, {"y": ["schön"]}, frozenset())[0])["outputs"][0]["data"] == ["schön"]


def test_outputs_say_for_themselves_whether_they_are_binary() -> None:
    told = [{"name": "a"}, {"name": "b", "parameters": {"binary_data": False}}]
    request = read(one(), outputs=told, parameters={"binary_data_output": True}, id="7")
    assert [(wanted.name, wanted.binary) for wanted in request.outputs] == [("a", True), ("b", False)]
    assert (request.binary, request.id) == (True, "7")
    assert read(one()).outputs == ()


LIES: dict[str, tuple[object, bytes, str]] = {
    "too few elements": (one(data=[1.0]), b"", "has 1 elements. Its shape [2, 2] takes 4"),
    "too many elements": (one(data=[1.0] * 5), b"", "has 5 elements"),
    "ragged": (one(data=[[1.0, 2.0], [3.0]]), b"", "nested in another way"),
    "nested too flat": (one(data=[[1.0, 2.0, 3.0, 4.0]]), b"", "nested in another way"),
    "nested too deep": (one(data=[[[1.0], [2.0]], [[3.0], [4.0]]]), b"", "other things than numbers"),
    "a list among numbers": (one(data=[1.0, [2.0], 3.0, 4.0]), b"", "other things than numbers"),
    "a text for a number": (one(data=["1", 2, 3, 4]), b"", "other things than numbers"),
    "true for a number": (one(data=[True, 2, 3, 4]), b"", "other things than numbers"),
    "null for a number": (one(data=[None, 2, 3, 4]), b"", "other things than numbers"),
    "too large": (one(data=[1e39, 2, 3, 4]), b"", "numbers too large for FP32"),
    "no data": (one(data=None), b"", "has no data"),
    "data is an object": (one(data={"a": 1}), b"", "has no data"),
    "negative extent": (one([-1, 2]), b"", "has the extent -1"),
    "zero extent": (one([0, 2], data=[]), b"", "has the extent 0"),
    "huge extent": (one([1 << 62, 2]), b"", "has the extent"),
    "huge product": (one([1 << 40] * 32), b"", "more than 1099511627776 elements"),
    "extent of another type": (one([2.0, 2]), b"", "has the extent 2.0"),
    "extent is true": (one([True, 4]), b"", "has the extent True"),
    "too many axes": (one([1] * 33, data=[1.0]), b"", "has no shape"),
    "no shape": (one(None), b"", "has no shape"),
    "another shape": (one([4]), b"", "has the shape [4]. The model takes [-1, 2]"),
    "another width": (one([1, 4]), b"", "has the shape [1, 4]"),
    "another datatype": (one(datatype="FP64"), b"", "is FP64. The model takes FP32"),
    "unknown datatype": (one(datatype="FP33"), b"", "has the datatype 'FP33'"),
    "datatype of another type": (one(datatype=["FP32"]), b"", "has the datatype an array"),
    "unknown field": (one(dtype="FP32"), b"", "unknown field 'dtype'"),
    "both forms": (one(parameters={"binary_data_size": 16}), b"\0" * 16, "both data and binary_data_size"),
    "fewer bytes than stated": (binary([2, 2], "FP32", 16), b"\0" * 15, "15 bytes are left"),
    "fewer bytes than the shape": (binary([2, 2], "FP32", 12), b"\0" * 12, "FP32 [2, 2] takes 16"),
    "more bytes than the shape": (binary([2, 2], "FP32", 20), b"\0" * 20, "FP32 [2, 2] takes 16"),
    "bytes at the end": (binary([2, 2], "FP32", 16), b"\0" * 17, "1 bytes at the end belong to no input"),
    "bytes after JSON": (one(), b"\0", "1 bytes at the end belong to no input"),
    "negative size": (binary([2, 2], "FP32", -16), b"\0" * 16, "binary_data_size -16"),
    "size is true": (binary([1, 1], "INT8", True), b"\0", "binary_data_size True"),
    "size is a text": (binary([2, 2], "FP32", "16"), b"\0" * 16, "binary_data_size '16'"),
    "huge shape of bytes": (binary([1 << 20, 1 << 20], "INT8", 4), b"\0" * 4, "has 4 bytes"),
    "NaN": (binary([1, 2], "FP32", 8), np.array([1.0, np.nan], np.float32).tobytes(), "has NaN in it"),
    "shared memory": (one(parameters={"shared_memory_region": "r"}), b"", "shared memory"),
    "no name": ({"shape": [1], "datatype": "FP32", "data": [1.0]}, b"", "has no name"),
    "no object": (7, b"", "has no name"),
    "parameters are a list": (one(parameters=[]), b"", "are an array"),
}  # fmt: skip


@pytest.mark.parametrize("name", LIES)
def test_what_lies_is_refused_in_one_line(name: str) -> None:
    told, raw, text = LIES[name]
    with pytest.raises(UsageError) as caught:
        to_array(read(told, raw=raw).inputs["x"], GRID)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


TEXTS: dict[str, tuple[object, bytes, str]] = {
    "numbers": (one([2], "BYTES", [1, 2]), b"", "other things than texts"),
    "no texts": (one([2], "INT8", [1, 2]), b"", "is INT8"),
    "a grid": (one([2, 2], "BYTES", ["a"] * 4), b"", "has the shape [2, 2]"),
    "not UTF-8": (binary([1], "BYTES", 6), texts(b"\xff\xfe"), "element 0 is not UTF-8"),
    "a length beyond the end": (binary([1], "BYTES", 6), struct.pack("<I", 1 << 31) + b"ab", "ends within its texts"),
    "too few": (binary([2], "BYTES", 9), texts(b"abcde"), "ends within its texts"),
    "too many": (binary([1], "BYTES", 8), texts(b"", b""), "4 bytes after its last text"),
    "far too few": (binary([1 << 40], "BYTES", 4), texts(b""), "take at least"),
}


@pytest.mark.parametrize("name", TEXTS)
def test_texts_that_lie_are_refused(name: str) -> None:
    told, raw, text = TEXTS[name]
    with pytest.raises(UsageError) as caught:
        to_texts(read(told, raw=raw).inputs["x"])
    assert text in str(caught.value)


NUMBERS = {
    "INT8": [128], "UINT8": [-1], "INT64": [1 << 63], "UINT64": [1 << 64], "INT32": [1.0], "BOOL": [1], "FP16": [7e4],
}  # fmt: skip


@pytest.mark.parametrize("datatype", NUMBERS)
def test_numbers_outside_their_datatype_are_refused(datatype: str) -> None:
    with pytest.raises(UsageError, match=r"too large|other things"):
        to_array(read(one([1], datatype, NUMBERS[datatype])).inputs["x"], TensorSpec("x", NUMPY[datatype], (1,)))


def test_a_bool_is_a_zero_or_a_one() -> None:
    with pytest.raises(UsageError, match="other than 0 and 1"):
        to_array(read(binary([1], "BOOL", 1), raw=b"\x02").inputs["x"], TensorSpec("x", "bool", (1,)))


BODIES: dict[str, tuple[bytes, str | None, str]] = {
    "nothing": (b"", None, "not JSON"),
    "half": (b'{"inputs": [', None, "not JSON"),
    "not UTF-8": (b'{"id": "\xff"}', None, "not JSON"),
    "NaN": (b'{"inputs": [{"name": "x", "shape": [1], "datatype": "FP32", "data": [NaN]}]}', None, "not JSON"),
    "deep": (b"[" * 100_000, None, "not JSON"),
    "a list": (b"[]", None, "not a JSON object"),
    "no inputs": (b"{}", None, "inputs is no list"),
    "inputs are empty": (b'{"inputs": []}', None, "inputs is no list"),
    "unknown field": (b'{"instances": []}', None, "no field 'instances'"),
    "id is a number": (b'{"id": 7, "inputs": []}', None, "id is 7"),
    "header too long": (b"{}", "3", "Inference-Header-Content-Length is '3'"),
    "header negative": (b"{}", "-1", "Inference-Header-Content-Length"),
    "header is no number": (b"{}", "two", "Inference-Header-Content-Length"),
    "header in other digits": (b"{}", "²", "Inference-Header-Content-Length"),
    "header huge": (b"{}", "9" * 5000, "Inference-Header-Content-Length"),
    "header empty": (b"{}", "", "Inference-Header-Content-Length"),
    "sequence": (b'{"parameters": {"sequence_id": 3}, "inputs": []}', None, "sequences are not kept"),
    "flag": (b'{"parameters": {"binary_data_output": 1}, "inputs": []}', None, "binary_data_output"),
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies_that_are_no_request_are_refused(name: str) -> None:
    told, header, text = BODIES[name]
    with pytest.raises(UsageError) as caught:
        read_request(told, header)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "outputs",
    [
        [{}],
        7,
        [{"name": "a"}, {"name": "a"}],
        [{"name": "a", "parameters": {"classification": 2}}],
        [{"name": "a", "parameters": {"shared_memory_region": "r"}}],
        [{"name": "a", "parameters": {"binary_data": "yes"}}],
    ],
)
def test_outputs_that_make_no_sense_are_refused(outputs: object) -> None:
    with pytest.raises(UsageError):
        read(one(), outputs=outputs)


def test_an_input_stands_once() -> None:
    with pytest.raises(UsageError, match="stands twice"):
        read(one(), one())


def test_what_json_cannot_say_is_not_said_wrongly() -> None:
    array = np.array([1.0, np.inf], np.float32)
    with pytest.raises(UsageError, match="NaN or infinity"):
        write_answer({}, {"y": array}, frozenset())
    text, size = write_answer({}, {"y": array}, frozenset({"y"}))
    assert text[size:] == array.tobytes()


def test_every_dtype_of_a_manifest_has_a_datatype() -> None:
    from artifacts.manifest import DTYPES

    assert set(DTYPES) < set(DATATYPES)
