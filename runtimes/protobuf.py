"""The little of the ONNX wire format that the runtime needs without the onnx package.

A message is a run of fields: a varint ``number << 3 | wire type``, then the value. Wire types: 0 varint, 1 eight bytes,
2 a varint length and as many bytes, 5 four bytes. Field numbers are those of onnx.proto.
"""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from artifacts.errors import ProviderError

_FLOAT = 1
_PROBE_WIDTH = 4


def probe_model() -> bytes:
    """A model of IR 10, opset 20: ``y = x @ w + x`` for x, y [n, 4] float32 and w = 2 on the diagonal, so y = 3 x.

    A product, so that a GPU provider must load its BLAS; no shape arithmetic, so that no node belongs on the CPU.
    """
    diagonal = [2.0 if row == column else 0.0 for row in range(_PROBE_WIDTH) for column in range(_PROBE_WIDTH)]
    weight = (  # TensorProto: dims = 1, data_type = 2, name = 8, raw_data = 9
        _number(1, _PROBE_WIDTH) + _number(1, _PROBE_WIDTH) + _number(2, _FLOAT) + _text(8, "w")
    ) + _bytes(9, struct.pack(f"<{len(diagonal)}f", *diagonal))
    graph = (  # GraphProto: node = 1, name = 2, initializer = 5, input = 11, output = 12
        _bytes(1, _node("product", "MatMul", ("x", "w"), "xw"))
        + _bytes(1, _node("sum", "Add", ("xw", "x"), "y"))
        + _text(2, "probe")
        + _bytes(5, weight)
        + _bytes(11, _value("x"))
        + _bytes(12, _value("y"))
    )
    opset = _text(1, "") + _number(2, 20)  # OperatorSetIdProto: domain = 1, version = 2
    # ModelProto: ir_version = 1, graph = 7, opset_import = 8
    return _number(1, 10) + _bytes(7, graph) + _bytes(8, opset)


def _node(name: str, operator: str, inputs: tuple[str, ...], output: str) -> bytes:
    # NodeProto: input = 1, output = 2, name = 3, op_type = 4
    return b"".join(_text(1, value) for value in inputs) + _text(2, output) + _text(3, name) + _text(4, operator)


def _value(name: str) -> bytes:
    # ValueInfoProto: name = 1, type = 2; TypeProto: tensor_type = 1; Tensor: elem_type = 1, shape = 2;
    # TensorShapeProto: dim = 1; Dimension: dim_value = 1, dim_param = 2
    shape = _bytes(1, _text(2, "n")) + _bytes(1, _number(1, _PROBE_WIDTH))
    return _text(1, name) + _bytes(2, _bytes(1, _number(1, _FLOAT) + _bytes(2, shape)))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, payload: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(payload)) + payload


def _text(field: int, text: str) -> bytes:
    return _bytes(field, text.encode())


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def op_types(path: Path) -> dict[str, int]:
    """How many nodes of each operator type the main graph of a model file has. Weights are skipped, not read.

    Raises:
        ProviderError: The file is not an ONNX model.
    """
    counts: Counter[str] = Counter()
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            for model_field, start, end in fields(data, 0, len(data)):
                if model_field != 7:
                    continue
                for graph_field, first, last in fields(data, start, end):
                    if graph_field == 1:
                        counts.update(
                            data[a:b].decode() for node_field, a, b in fields(data, first, last) if node_field == 4
                        )
    except (OSError, ValueError, IndexError) as error:
        raise ProviderError(f"{path.name} is not an ONNX model: {error}") from error
    return dict(sorted(counts.items()))


def fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """(field number, first byte, byte after the last) of every length-delimited field."""
    position = start
    while position < end:
        key, position = _read_varint(data, position)
        wire = key & 7
        if wire == 0:
            _, position = _read_varint(data, position)
        elif wire == 2:
            size, position = _read_varint(data, position)
            if size > end - position:
                raise ValueError("a field runs past its message")
            yield key >> 3, position, position + size
            position += size
        elif wire in (1, 5):
            position += 8 if wire == 1 else 4
        else:
            raise ValueError(f"wire type {wire}")


def _read_varint(data: mmap.mmap, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
        if shift > 63:
            raise ValueError("a number is too long")
