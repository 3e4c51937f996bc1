"""Frames between an engine and its workers: a JSON object and raw arrays, no pickle.

    bytes   what
    8       length of what follows, little-endian
    4       length of the header
    ...     header: UTF-8 JSON, ``{"message": {...}, "arrays": [[name, dtype, [shape]]...]}``, then spaces
            up to a multiple of 8
    ...     each array, C order, little-endian, padded with zeros to a multiple of 8

An array of texts (dtype ``str``) stands in the header: ``[name, "str", [shape], [text...]]``.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

import artifacts.errors
from artifacts.errors import HastenError, UsageError, WorkerError

Arrays = dict[str, NDArray[Any]]
Message = dict[str, Any]

MAX_FRAME = 8 << 30
"""Most bytes of a frame."""
MAX_HEADER = 1 << 30
"""Most bytes of its header."""
_PREFIX = struct.Struct("<QI")
_SIZE = struct.Struct("<Q")
_DTYPES = {
    name: np.dtype(name).newbyteorder("<")
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64"),
    )
}
_EMPTY: Mapping[str, NDArray[Any]] = {}


class WireError(WorkerError):
    """What came is no frame: the two ends do not understand each other any more."""


def encode(message: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]] = _EMPTY) -> bytes:
    """One frame.

    Raises:
        UsageError: The message holds something that JSON has no form for, or an array is of a type that has no form.
    """
    told, parts = [], []
    for name, array in arrays.items():
        if array.dtype.kind in "OUST" or array.dtype.name not in _DTYPES:
            told.append(_texts(name, array))
            continue
        told.append([name, array.dtype.name, list(array.shape)])
        data = np.ascontiguousarray(array, _DTYPES[array.dtype.name]).tobytes()
        parts += [data, bytes(-len(data) % 8)]
    try:
        header = json.dumps({"message": message, "arrays": told}, separators=(",", ":"), default=_plain).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"that cannot be sent to a worker: {error}", "Pass texts, numbers, lists and objects"
        ) from None
    header += b" " * (-(len(header) + 4) % 8)
    size = 4 + len(header) + sum(map(len, parts))
    if size > MAX_FRAME or len(header) > MAX_HEADER:
        raise UsageError(f"{size} bytes are too many for one request", "Pass it in parts")
    return b"".join([_PREFIX.pack(size, len(header)), header, *parts])


def decode(frame: bytes | bytearray | memoryview) -> tuple[Message, Arrays]:
    """Message and arrays of one whole frame; the arrays are views into it.

    Raises:
        WireError: It is no frame.
    """
    view = memoryview(frame)
    if len(view) < _PREFIX.size:
        raise WireError("a frame is too short")
    size, length = _PREFIX.unpack_from(view)
    if size != len(view) - _SIZE.size or length > size - 4:
        raise WireError("the lengths of a frame contradict each other")
    start = _PREFIX.size + length
    try:
        header = json.loads(bytes(view[_PREFIX.size : start]))
        message, told = header["message"], header["arrays"]
        if not isinstance(message, dict) or not isinstance(told, list):
            raise WireError("a frame's header is no object")
        arrays, end = {}, start
        for one in told:
            array, end = _array(one, view, end)
            arrays[str(one[0])] = array
    except (ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise WireError(f"a frame cannot be read: {error}") from None
    if end != len(view):
        raise WireError("a frame is longer than its arrays")
    return message, arrays


class Frames:
    """Puts frames together from the pieces that come through a pipe."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._frame: bytearray | None = None
        self._filled = 0

    def feed(self, data: bytes | memoryview) -> Iterator[bytearray]:
        """The frames that are complete with these bytes.

        Raises:
            WireError: A length is absurd.
        """
        left = memoryview(data)
        while left:
            if self._frame is None:
                wanted = _SIZE.size - len(self._head)
                self._head += left[:wanted]
                left = left[wanted:]
                if len(self._head) < _SIZE.size:
                    return
                size = _SIZE.unpack(self._head)[0]
                if not 4 <= size <= MAX_FRAME:
                    raise WireError(f"a frame says that it has {size} bytes")
                self._frame, self._filled = bytearray(_SIZE.size + size), _SIZE.size
                self._frame[: _SIZE.size] = self._head
                self._head.clear()
            taken = left[: len(self._frame) - self._filled]
            self._frame[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            left = left[len(taken) :]
            if self._filled == len(self._frame):
                frame, self._frame = self._frame, None
                yield frame


def told_error(error: HastenError) -> Message:
    """An error as a message."""
    return {"kind": type(error).__name__, "what": error.what, "remedy": error.remedy}


def read_error(told: object) -> HastenError:
    """The error of a message; one whose kind is unknown is a WorkerError."""
    if not isinstance(told, Mapping):
        return WireError("a worker told an error that cannot be read")
    kind = getattr(artifacts.errors, str(told.get("kind")), None)
    if not (isinstance(kind, type) and issubclass(kind, HastenError)):
        kind = WorkerError
    return kind(str(told.get("what", "")), str(told.get("remedy", "")))


def _texts(name: str, array: NDArray[Any]) -> list[Any]:
    values = array.ravel().tolist()
    if array.dtype.kind not in "OUT" or not all(isinstance(value, str) for value in values):
        raise UsageError(f"array {name!r} is {array.dtype}, which cannot be sent to a worker", "Pass numbers or texts")
    return [name, "str", list(array.shape), values]


def _array(told: Any, view: memoryview, start: int) -> tuple[NDArray[Any], int]:
    """The array that starts there, and where it ends, padding included."""
    name, dtype, shape = told[0], told[1], tuple(told[2])
    if not isinstance(name, str) or not all(type(size) is int and size >= 0 for size in shape):
        raise WireError("a frame names an array that cannot be")
    if dtype == "str":
        texts = told[3]
        if not all(isinstance(text, str) for text in texts) or len(texts) != math.prod(shape):
            raise WireError("an array of texts holds something else, or too much of it")
        array = np.empty(len(texts), object)
        array[:] = texts
        return array.reshape(shape), start
    kind = _DTYPES.get(dtype)
    if kind is None:
        raise WireError(f"a frame has an array of type {str(dtype)[:40]!r}")
    count = math.prod(shape)
    end = start + count * kind.itemsize
    if end > len(view):
        raise WireError("an array is longer than its frame")
    array = np.frombuffer(view[start:end], kind) if count else np.empty(0, kind)
    return array.reshape(shape), end + (start - end) % 8


def _plain(value: object) -> object:
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} has no form in JSON")
