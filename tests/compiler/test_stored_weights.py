"""Weights of a checkpoint are read one by one, as float32, wherever and however they are stored."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save_file

from artifacts.errors import SourceError
from compiler import stored_weights
from compiler.stored_weights import StoredWeights, WeightTensor, open_weights

KINDS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def tensors(kind: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"wide": (96, 256), "narrow": (5, 7), "vector": (33,), "number": (), "nothing": (0, 4)}
    return {name: torch.randn(shape, generator=generator).to(kind) for name, shape in shapes.items()}


def write(folder: Path, content: dict[str, torch.Tensor], shards: int = 1) -> StoredWeights | None:
    """A checkpoint of so many shards, opened."""
    folder.mkdir(exist_ok=True)
    if shards == 1:
        save_file(content, folder / "model.safetensors")
        return open_weights(folder)
    names = list(content)
    table = {}
    for index in range(shards):
        file = f"model-{index}.safetensors"
        save_file({name: content[name] for name in names[index::shards]}, folder / file)
        table |= dict.fromkeys(names[index::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    return open_weights(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shards", [1, 3])
def test_every_kind_becomes_float32(kind: str, shards: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_weights, "_CHUNK", 1000)  # so that the wide one is read in parts
    content = tensors(KINDS[kind])
    weights = write(tmp_path, content, shards)
    assert weights is not None
    assert set(weights) == set(content)
    assert weights.size == sum(tensor.numel() for tensor in content.values())
    for name, tensor in content.items():
        floats = weights.floats(name)
        assert (weights[name].dtype, weights[name].shape) == (kind, tuple(tensor.shape))
        assert floats.dtype == np.float32
        assert np.array_equal(floats, tensor.float().numpy())


def test_tensors_of_a_graph(tmp_path: Path) -> None:
    content = tensors(torch.bfloat16)
    weights = write(tmp_path, content)
    assert weights is not None
    wide = content["wide"].float().numpy()
    plain, turned = (weights.tensor("wide", "w", transposed=flag) for flag in (False, True))
    for tensor, array in ((plain, wide), (turned, wide.T)):
        assert isinstance(tensor, WeightTensor)
        assert (tensor.name, tensor.dtype, tuple(tensor.shape)) == ("w", ir.DataType.FLOAT, array.shape)
        assert np.array_equal(tensor.numpy(), array)
    assert isinstance(plain, WeightTensor)
    assert isinstance(turned, WeightTensor)
    assert plain.key != turned.key
    small = weights.tensor("vector", "v")
    assert isinstance(small, ir.Tensor)  # held in memory
    assert np.array_equal(small.numpy(), content["vector"].float().numpy())


def test_integers_are_not_streamed(tmp_path: Path) -> None:
    assert write(tmp_path, {"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.int64)}) is None


def test_a_file_that_shrinks_on_the_way(tmp_path: Path) -> None:
    weights = write(tmp_path, tensors(torch.bfloat16))
    assert weights is not None
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-40000])
    with pytest.raises(SourceError, match=r"wide cannot be read .* truncated"):
        weights.floats("wide")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]},
        {"dtype": "F32", "shape": [2.0], "data_offsets": [0, 8]},
        {"dtype": 4, "shape": "ab", "data_offsets": [0, 8]},
        {"shape": [2], "data_offsets": [0, 8]},
    ],
)
def test_headers_that_contradict_themselves(entry: dict[str, object], tmp_path: Path) -> None:
    header = json.dumps({"a": entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(SourceError, match="corrupt safetensors header"):
        open_weights(tmp_path)
