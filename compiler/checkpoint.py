"""Check weights and .onnx files for being whole, reading headers only."""

from __future__ import annotations

import json
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from artifacts.errors import InstallationError, SourceError, UnsupportedError

if TYPE_CHECKING:
    import onnx

NEWEST_OPSET = 24  # what the oldest ONNX Runtime that hasten supports loads
_HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors format itself
_JSON_LIMIT = 64 << 20
_BITS = {"F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8}
_AGAIN = "Download or export the model again"


def read_json(path: Path) -> object:
    """Content of a JSON file.

    Raises:
        SourceError: It is missing, too large, not UTF-8 or not JSON.
    """
    try:
        if path.stat().st_size > _JSON_LIMIT:
            raise SourceError(f"{path} is larger than {_JSON_LIMIT >> 20} MiB", _AGAIN)
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SourceError(f"{path} is missing", _AGAIN) from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}", "Check its permissions") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise SourceError(f"{path} is not valid JSON: {error}", _AGAIN) from error


def check_weights(folder: Path) -> tuple[Path, ...]:
    """The weight files of a Hugging Face folder, each whole.

    Raises:
        SourceError: None is there, or one is empty, truncated or corrupt.
    """
    for name, check in (("model.safetensors", check_safetensors), ("pytorch_model.bin", check_torch)):
        path = folder / name
        if path.is_file():
            check(path)
            return (path,)
        index = folder / f"{name}.index.json"
        if index.is_file():
            table = _shards(index)
            for shard, tensors in table.items():
                held = check(shard)
                absent = sorted(tensors.difference(held)) if held is not None else []
                if absent:
                    raise SourceError(f"{shard} does not hold {absent[0]}, as {index.name} says", _AGAIN)
            return (index, *table)
    raise SourceError(f"{folder} holds no model.safetensors", "Pass the folder with the weights, or an .onnx file")


def _shards(index: Path) -> dict[Path, set[str]]:
    """The shards of an index, sorted, and the tensors that each is said to hold."""
    content = read_json(index)
    table = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(table, dict) or not table:
        raise SourceError(f"{index} has no weight_map", _AGAIN)
    shards: dict[str, set[str]] = {}
    for tensor, name in table.items():
        shards.setdefault(str(name), set()).add(tensor)
    for name in sorted(shards):
        if Path(name).name != name:
            raise SourceError(f"{index} points outside its folder: {name}", _AGAIN)
        if not (index.parent / name).is_file():
            raise SourceError(f"the weights file {name} that {index.name} lists is missing", _AGAIN)
    return {index.parent / name: shards[name] for name in sorted(shards)}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a safetensors file.

    Attributes:
        path: The file.
        dtype: ``BF16``, ``F32``, … as the format spells it.
        shape: Its extents.
        offset: Of its first byte in the file.
        nbytes: Its bytes, in C order, little endian.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def check_safetensors(path: Path) -> dict[str, StoredTensor]:
    """Hold the header of a safetensors file against the file's size.

    Returns:
        Its tensors by name.

    Raises:
        SourceError: The file is empty, truncated or not safetensors.
    """
    size = path.stat().st_size
    if size == 0:
        raise SourceError(f"{path} is empty", _AGAIN)
    with path.open("rb") as stream:
        prefix = stream.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > _HEADER_LIMIT:
            raise SourceError(f"{path} is not a safetensors file", _AGAIN)
        if 8 + length > size:
            raise SourceError(f"{path} is truncated: its header alone needs {8 + length} bytes, it has {size}", _AGAIN)
        raw = stream.read(length)
    try:
        header = json.loads(raw)
        tensors = {name: _stored(path, 8 + length, entry) for name, entry in header.items() if name != "__metadata__"}
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise SourceError(f"{path} has a corrupt safetensors header", _AGAIN) from error
    if not tensors:
        raise SourceError(f"{path} holds no tensors", _AGAIN)
    expected = max(tensor.offset + tensor.nbytes for tensor in tensors.values())
    if expected != size:
        state = "truncated" if size < expected else "longer than its header says"
        raise SourceError(f"{path} is {state}: {expected} bytes expected, {size} found", _AGAIN)
    return tensors


def _stored(path: Path, start: int, entry: Any) -> StoredTensor:
    """One entry of a header whose data begins at ``start``; ValueError where it contradicts itself."""
    (begin, end), shape, dtype = entry["data_offsets"], tuple(entry["shape"]), entry["dtype"]
    if not all(isinstance(number, int) and number >= 0 for number in (begin, end - begin, *shape)):
        raise ValueError("offsets and extents are whole numbers")
    bits = _BITS.get(dtype)
    if bits is not None and (end - begin) * 8 != math.prod(shape) * bits:
        raise ValueError(f"{end - begin} bytes are no {dtype} of {shape}")
    return StoredTensor(path, dtype, shape, start + begin, end - begin)


def check_torch(path: Path) -> None:
    """Hold a pytorch_model.bin for a whole zip archive. It is later read with ``weights_only``: no code runs.

    Raises:
        SourceError: The file is empty, truncated, or of the old format that is a bare pickle.
    """
    remedy = "Save the model again with safetensors: model.save_pretrained(folder)"
    if path.stat().st_size == 0:
        raise SourceError(f"{path} is empty", _AGAIN)
    if not zipfile.is_zipfile(path):
        raise SourceError(f"{path} is truncated or a bare pickle, which could run code when opened", remedy)
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise SourceError(f"{path} is corrupt: {error}", _AGAIN) from error
    if not any(name.endswith("/data.pkl") for name in names):
        raise SourceError(f"{path} is not a torch checkpoint", remedy)


def check_onnx(path: Path) -> tuple[Path, ...]:
    """Hold an .onnx file for a whole model of a supported opset.

    Returns:
        Its external data files.

    Raises:
        SourceError: Empty, truncated, corrupt, not ONNX, or its external data is missing or short.
        UnsupportedError: An opset newer than ONNX Runtime loads.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise InstallationError(f"{error.name} is not installed", "pip install 'hasten[compile]'") from error
    if path.stat().st_size == 0:
        raise SourceError(f"{path} is empty", _AGAIN)
    try:
        model = onnx.load(path, load_external_data=False)
    except DecodeError as error:
        raise SourceError(f"{path} is corrupt, truncated or not an ONNX file", _AGAIN) from error
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}", "Check its permissions") from error
    graph = model.graph
    if not model.ir_version or not model.opset_import or not graph.output:
        raise SourceError(f"{path} holds no ONNX graph: it is truncated or not an ONNX file", _AGAIN)
    for opset in model.opset_import:
        if opset.domain in ("", "ai.onnx") and opset.version > NEWEST_OPSET:
            raise UnsupportedError(
                f"{path} uses opset {opset.version}, newer than {NEWEST_OPSET}", "Export it with opset 17 to 24"
            )
    return _check_tensors(path, model)


def _check_tensors(path: Path, model: onnx.ModelProto) -> tuple[Path, ...]:
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    files: set[Path] = set()
    for tensor in model.graph.initializer:
        if not uses_external_data(tensor):
            continue
        info = ExternalDataInfo(tensor)
        location = Path(info.location)
        if location.is_absolute() or ".." in location.parts:
            raise SourceError(f"{path} keeps the weight {tensor.name} outside its folder: {info.location}", _AGAIN)
        data = path.parent / location
        if not data.is_file():
            raise SourceError(
                f"the external data {info.location} of {path.name} is missing", "Put it next to the .onnx file"
            )
        if (info.offset or 0) + (info.length or 0) > data.stat().st_size:
            raise SourceError(f"the external data file {data} is truncated: {tensor.name} lies past its end", _AGAIN)
        files.add(data)
    return tuple(sorted(files))
