"""Tensors of the Open Inference Protocol (v2), in JSON and in binary: what lies is refused before it is allocated.

The protocol is kserve/open-inference-protocol's ``inference_rest.md``, the binary form Triton's
``extension_binary_data.md``: little-endian, row-major, no padding; an element of BYTES is its length in 4 bytes, then
its bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import orjson
from numpy.typing import NDArray

from artifacts.constraints import shown
from artifacts.errors import UsageError
from artifacts.manifest import TensorSpec

DATATYPES = {
    "bool": "BOOL",
    **{f"{sign}int{bits}": f"{sign.upper()}INT{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
    **{"float16": "FP16", "float32": "FP32", "float64": "FP64", "bfloat16": "BF16", "str": "BYTES"},
}
"""Name of a numpy dtype -> name of the protocol's datatype."""
NUMPY = {name: dtype for dtype, name in DATATYPES.items() if name not in ("BF16", "BYTES")}
"""Datatype -> numpy dtype, of those that numpy has."""
MOST_TENSORS = 1024
MOST_AXES = 32
_MOST_EXTENT = 1 << 40
_FIELDS = ("id", "parameters", "inputs", "outputs", "model_name", "model_version")
_INPUT_FIELDS = ("name", "shape", "datatype", "parameters", "data")
_TYPES: dict[str, frozenset[type]] = {"b": frozenset({bool}), "i": frozenset({int}), "f": frozenset({int, float})}
_TYPES["u"] = _TYPES["i"]
_CALLED = {"b": "true or false", "i": "whole numbers", "u": "whole numbers", "f": "numbers"}

Array = NDArray[Any]
Output = Array | list[str]
"""A tensor of numbers, or BYTES [n]: one text each."""


@dataclass(frozen=True)
class Tensor:
    """An input as it was sent: checked against itself, not against any model.

    Attributes:
        name: Its name.
        datatype: One of the protocol's.
        shape: Extents, each at least 1; () is a scalar.
        data: Its elements in row-major order, from JSON, or its bytes.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: list[object] | memoryview

    @property
    def elements(self) -> int:
        """How many the shape says there are."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Wanted:
    """An output that was asked for, and whether as binary data."""

    name: str
    binary: bool


@dataclass(frozen=True)
class InferRequest:
    """What a body of ``/infer`` asks.

    Attributes:
        id: The caller's name for it, which the answer repeats; empty: none.
        inputs: By name, in the order given.
        outputs: What was asked for; empty: everything.
        binary: Whether everything not named in ``outputs`` is to be binary data.
        parameters: Of the request.
    """

    id: str
    inputs: dict[str, Tensor]
    outputs: tuple[Wanted, ...]
    binary: bool
    parameters: Mapping[str, object]


def read_request(body: bytes, header_length: str | None = None) -> InferRequest:
    """The request that a body holds.

    Args:
        body: All of it.
        header_length: The header Inference-Header-Content-Length: bytes of the JSON that stands before the binary data;
            None: all of it is JSON.

    Raises:
        UsageError: It is not JSON, not such a request, or shapes, sizes and bytes contradict each other.
    """
    size = _header_size(header_length, len(body))
    try:
        document = orjson.loads(memoryview(body)[:size])
    except orjson.JSONDecodeError as error:
        raise UsageError(f"the request is not JSON: {error}", "Send one JSON object") from error
    if not isinstance(document, dict):
        raise UsageError("the request is not a JSON object", 'Send {"inputs": [...]}')
    if unknown := [key for key in document if key not in _FIELDS]:
        raise UsageError(f"a request has no field {shown(unknown[0])}", f"It has {', '.join(_FIELDS[:4])}")
    name = document.get("id", "")
    if not isinstance(name, str):
        raise UsageError(f"id is {shown(name)}", "Send a string")
    parameters = _parameters(document, "the request")
    if parameters.get("sequence_id"):
        raise UsageError("sequences are not kept: every request stands alone", "Leave out sequence_id")
    binary = _flag(parameters, "binary_data_output", "the request") or False
    return InferRequest(
        name,
        _inputs(document.get("inputs"), memoryview(body)[size:]),
        _outputs(document.get("outputs"), binary),
        binary,
        parameters,
    )


def to_array(tensor: Tensor, spec: TensorSpec) -> Array:
    """The tensor as the graph takes it; of binary data a view, read-only.

    Raises:
        UsageError: Its datatype or shape is another one, a value does not fit the datatype, or one is NaN.
    """
    if tensor.datatype != DATATYPES[spec.dtype]:
        raise UsageError(f"input {spec.name!r} is {tensor.datatype}", f"The model takes {DATATYPES[spec.dtype]}")
    if tensor.datatype not in NUMPY:
        raise UsageError(f"input {spec.name!r} is {tensor.datatype}, which numpy does not have", "Use another variant")
    wanted = [-1 if isinstance(extent, str) else extent for extent in spec.shape]
    fits = len(wanted) == len(tensor.shape) and all(a in (-1, b) for a, b in zip(wanted, tensor.shape, strict=True))
    if not fits:
        raise UsageError(f"input {spec.name!r} has the shape {list(tensor.shape)}", f"The model takes {wanted}")
    dtype = np.dtype(NUMPY[tensor.datatype]).newbyteorder("<")
    read = _from_json if isinstance(tensor.data, list) else _from_binary
    array = read(tensor, dtype)
    if dtype.kind == "f" and np.isnan(array).any():
        raise UsageError(f"input {spec.name!r} has NaN in it", "Send numbers")
    return array.reshape(tensor.shape)


def to_texts(tensor: Tensor) -> list[str]:
    """The texts of a BYTES tensor [n] or [n, 1].

    Raises:
        UsageError: It is no such tensor, or a text is not UTF-8.
    """
    if tensor.datatype != "BYTES":
        raise UsageError(f"input {tensor.name!r} is {tensor.datatype}", "It takes BYTES")
    if not (len(tensor.shape) == 1 or (len(tensor.shape) == 2 and tensor.shape[1] == 1)):
        raise UsageError(f"input {tensor.name!r} has the shape {list(tensor.shape)}", "It takes [-1], a text each")
    if isinstance(tensor.data, list):
        if set(map(type, tensor.data)) != {str}:
            raise UsageError(f"input {tensor.name!r} holds other things than texts", "Send strings")
        return cast("list[str]", tensor.data)
    return [_text(raw, tensor.name, index) for index, raw in enumerate(_elements(tensor, tensor.data))]


def write_answer(
    head: Mapping[str, object], outputs: Mapping[str, Output], binary: frozenset[str]
) -> tuple[bytes, int]:
    """The body of an answer.

    Args:
        head: What stands beside the outputs, such as ``model_name``.
        outputs: By name, in order.
        binary: Which of them are sent as binary data.

    Returns:
        The body, and the bytes of JSON that it begins with; 0 if it is JSON altogether.

    Raises:
        UsageError: An output has NaN or infinity in it, which JSON has no word for.
    """
    described, parts = [], []
    for name, output in outputs.items():
        told: dict[str, object] = {"name": name, "datatype": _datatype(output), "shape": list(_shape(output))}
        if name in binary:
            raw = _to_bytes(output)
            told["parameters"] = {"binary_data_size": len(raw)}
            parts.append(raw)
        else:
            told["data"] = _to_json(name, output)
        described.append(told)
    text = orjson.dumps({**head, "outputs": described}, option=orjson.OPT_SERIALIZE_NUMPY)
    return (b"".join((text, *parts)), len(text)) if parts else (text, 0)


def _header_size(told: str | None, size: int) -> int:
    if told is None:
        return size
    if not (told.isascii() and told.isdigit() and len(told) < 20 and int(told) <= size):
        raise UsageError(
            f"Inference-Header-Content-Length is {shown(told)}", f"Send a number of bytes up to {size}, the body's"
        )
    return int(told)


def _inputs(told: object, rest: memoryview) -> dict[str, Tensor]:
    if not isinstance(told, list) or not told:
        raise UsageError("inputs is no list of tensors", 'Send [{"name", "shape", "datatype", "data"}, …]')
    if len(told) > MOST_TENSORS:
        raise UsageError(f"{len(told)} inputs", f"At most {MOST_TENSORS} are taken")
    found: dict[str, Tensor] = {}
    for one in told:
        tensor, used = _input(one, rest)
        if tensor.name in found:
            raise UsageError(f"input {tensor.name!r} stands twice", "Send it once")
        found[tensor.name] = tensor
        rest = rest[used:]
    if len(rest):
        raise UsageError(f"{len(rest)} bytes at the end belong to no input", "Say binary_data_size of each")
    return found


def _input(told: object, rest: memoryview) -> tuple[Tensor, int]:
    """A tensor, and how many bytes of the binary data are its."""
    if not isinstance(told, dict) or not isinstance(name := told.get("name"), str):
        raise UsageError("an input has no name", 'Send {"name", "shape", "datatype", "data"}')
    here = f"input {shown(name)}"
    if unknown := [key for key in told if key not in _INPUT_FIELDS]:
        raise UsageError(f"{here} has the unknown field {shown(unknown[0])}", f"It has {', '.join(_INPUT_FIELDS)}")
    datatype = told.get("datatype")
    if datatype not in DATATYPES.values():
        raise UsageError(f"{here} has the datatype {shown(datatype)}", f"There are {', '.join(DATATYPES.values())}")
    shape = _extents(told.get("shape"), here)
    parameters = _parameters(told, here)
    if "shared_memory_region" in parameters:
        raise UsageError(f"{here} lies in shared memory, which this server does not read", "Send its data")
    size = parameters.get("binary_data_size")
    if size is None:
        data = _flat(told.get("data"), shape, here)
        return Tensor(name, str(datatype), shape, data), 0
    if "data" in told:
        raise UsageError(f"{here} has both data and binary_data_size", "Send one of them")
    if type(size) is not int or not 0 <= size <= len(rest):
        raise UsageError(f"{here} has the binary_data_size {shown(size)}", f"{len(rest)} bytes are left of the body")
    elements = math.prod(shape)
    if datatype != "BYTES":
        width = 2 if datatype == "BF16" else np.dtype(NUMPY[str(datatype)]).itemsize
        if elements * width != size:
            raise UsageError(f"{here} has {size} bytes", f"{datatype} {list(shape)} takes {elements * width}")
    elif elements * 4 > size:
        raise UsageError(f"{here} has {size} bytes", f"{elements} texts take at least {elements * 4}")
    return Tensor(name, str(datatype), shape, rest[:size]), size


def _extents(told: object, here: str) -> tuple[int, ...]:
    if not isinstance(told, list) or len(told) > MOST_AXES:
        raise UsageError(f"{here} has no shape", f"Send a list of up to {MOST_AXES} extents")
    for extent in told:
        if type(extent) is not int or not 1 <= extent <= _MOST_EXTENT:
            raise UsageError(f"{here} has the extent {shown(extent)}", "Send whole numbers above 0")
    if math.prod(told) > _MOST_EXTENT:
        raise UsageError(f"{here} has a shape of more than {_MOST_EXTENT} elements", "Send fewer")
    return tuple(told)


def _flat(data: object, shape: Sequence[int], here: str) -> list[object]:
    """Elements in row-major order, of a list that is flat already or nested as the shape says."""
    if not isinstance(data, list):
        raise UsageError(f"{here} has no data", "Send a list, or binary_data_size")
    if data and isinstance(data[0], list):
        level: list[object] = [data]
        for extent in shape:
            parts = [part for part in level if isinstance(part, list) and len(part) == extent]
            if len(parts) != len(level):
                raise UsageError(f"{here} is nested in another way than its shape says", f"Nest it as {list(shape)}")
            level = [value for part in parts for value in part]
        return level
    if len(data) != math.prod(shape):
        raise UsageError(f"{here} has {len(data)} elements", f"Its shape {list(shape)} takes {math.prod(shape)}")
    return data


def _outputs(told: object, binary: bool) -> tuple[Wanted, ...]:
    if told is None:
        return ()
    if not isinstance(told, list) or len(told) > MOST_TENSORS:
        raise UsageError("outputs is no list", 'Send [{"name": "…"}, …], or leave it out')
    found: dict[str, Wanted] = {}
    for one in told:
        if not isinstance(one, dict) or not isinstance(name := one.get("name"), str):
            raise UsageError("an output has no name", 'Send {"name": "…"}')
        here = f"output {shown(name)}"
        if name in found:
            raise UsageError(f"{here} stands twice", "Ask for it once")
        parameters = _parameters(one, here)
        if parameters.get("classification"):
            raise UsageError(f"{here} is asked for as classes", "POST the texts to /classify")
        if "shared_memory_region" in parameters:
            raise UsageError(f"{here} is asked for in shared memory, which this server does not write", "Leave it out")
        chosen = _flag(parameters, "binary_data", here)
        found[name] = Wanted(name, binary if chosen is None else chosen)
    return tuple(found.values())


def _parameters(told: Mapping[str, object], here: str) -> Mapping[str, object]:
    parameters = told.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise UsageError(f"parameters of {here} are {shown(parameters)}", "Send an object")
    return parameters


def _flag(parameters: Mapping[str, object], name: str, here: str) -> bool | None:
    value = parameters.get(name)
    if value is not None and not isinstance(value, bool):
        raise UsageError(f"{name} of {here} is {shown(value)}", "Send true or false")
    return value


def _from_json(tensor: Tensor, dtype: np.dtype[Any]) -> Array:
    data = cast("list[Any]", tensor.data)
    if not set(map(type, data)) <= _TYPES[dtype.kind]:
        raise UsageError(f"input {tensor.name!r} holds other things than {_CALLED[dtype.kind]}", f"{dtype} takes those")
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        if min(data) < limits.min or max(data) > limits.max:
            raise UsageError(f"input {tensor.name!r} has numbers too large for {tensor.datatype}", "Send smaller ones")
    with np.errstate(over="ignore"):
        array = np.array(data, dtype)
    # JSON has no infinity: one that is here was a number that the datatype cannot hold.
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise UsageError(f"input {tensor.name!r} has numbers too large for {tensor.datatype}", "Send smaller ones")
    return array


def _from_binary(tensor: Tensor, dtype: np.dtype[Any]) -> Array:
    raw = cast("memoryview", tensor.data)
    if dtype.kind == "b" and np.frombuffer(raw, np.uint8).max() > 1:
        raise UsageError(f"input {tensor.name!r} has bytes other than 0 and 1", "BOOL is one of them")
    return np.frombuffer(raw, dtype)


def _elements(tensor: Tensor, raw: memoryview) -> list[bytes]:
    found, at = [], 0
    for _ in range(tensor.elements):
        size = int.from_bytes(raw[at : at + 4], "little")
        if len(raw) - at < 4 or len(raw) - at - 4 < size:
            raise UsageError(
                f"input {tensor.name!r} ends within its texts", "Say each length in 4 bytes, then the text"
            )
        found.append(bytes(raw[at + 4 : at + 4 + size]))
        at += 4 + size
    if at != len(raw):
        raise UsageError(f"input {tensor.name!r} has {len(raw) - at} bytes after its last text", "Send none")
    return found


def _text(raw: bytes, name: str, index: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise UsageError(f"input {name!r}: element {index} is not UTF-8", "Send UTF-8") from error


def _datatype(output: Output) -> str:
    return "BYTES" if isinstance(output, list) else DATATYPES[str(output.dtype)]


def _shape(output: Output) -> tuple[int, ...]:
    return (len(output),) if isinstance(output, list) else output.shape


def _to_bytes(output: Output) -> bytes:
    if isinstance(output, list):
        raws = [text.encode() for text in output]
        return b"".join(part for raw in raws for part in (len(raw).to_bytes(4, "little"), raw))
    return output.astype(output.dtype.newbyteorder("<"), copy=False).tobytes()


def _to_json(name: str, output: Output) -> Output:
    if isinstance(output, list):
        return output
    if output.dtype.kind == "f" and not np.isfinite(output).all():
        raise UsageError(f"output {name!r} has NaN or infinity in it, which JSON has not", "Ask for it as binary data")
    return np.ascontiguousarray(output).reshape(-1)
