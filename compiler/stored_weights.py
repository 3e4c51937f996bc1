"""The weights of a checkpoint where they lie: read one by one, as float32, and never mapped.

A mapped page that was touched counts as memory of the process until the kernel wants it back; what is read into a
buffer is gone with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from artifacts.errors import SourceError
from passes.deferred import DeferredTensor

from .checkpoint import StoredTensor, check_safetensors, check_weights

Floats = NDArray[np.float32]

FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""Types that are read, and what torch calls them."""
_CHUNK = 8 << 20
"""Elements that are converted at a time."""
_KEPT = 64 << 10
"""Bytes of float32 up to which a tensor of a graph is held in memory: norms and biases, which passes read often."""


class WeightTensor(DeferredTensor):
    """A weight of a checkpoint in a graph.

    Attributes:
        weight: Its name in the checkpoint.
        transposed: Whether it is the transposed matrix.
    """

    def __init__(self, weights: StoredWeights, weight: str, name: str, *, transposed: bool) -> None:
        """``name``: in the graph."""
        shape = weights[weight].shape[:: -1 if transposed else 1]
        super().__init__(self._make, ir.DataType.FLOAT, shape, (str(weights[weight].path), weight, transposed), name)
        self._weights = weights
        self.weight = weight
        self.transposed = transposed

    def _make(self) -> Floats:
        floats = self._weights.floats(self.weight)
        return floats.T if self.transposed else floats


class StoredWeights(Mapping[str, StoredTensor]):
    """The tensors of the safetensors files of a folder, by name."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self._tensors = dict(tensors)

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def size(self) -> int:
        """Elements of all of them."""
        return sum(int(np.prod(tensor.shape, dtype=np.int64)) for tensor in self._tensors.values())

    def floats(self, name: str) -> Floats:
        """A tensor in float32, in memory of its own.

        Raises:
            SourceError: The file has become shorter or unreadable.
        """
        floats = np.empty(self._tensors[name].shape, np.float32)
        self.read_into(name, floats)
        return floats

    def read_into(self, name: str, floats: Floats) -> None:
        """Fill an array of the tensor's shape, in C order; raises what `floats` does."""
        import torch

        stored = self._tensors[name]
        kind = getattr(torch, FLOATS[stored.dtype])
        flat = torch.from_numpy(floats.reshape(-1))
        buffer = torch.empty(min(_CHUNK, len(flat)), dtype=kind)
        raw = buffer.view(torch.uint8).numpy().data
        try:
            with stored.path.open("rb", buffering=0) as file:
                file.seek(stored.offset)
                for start in range(0, len(flat), _CHUNK):
                    count = min(_CHUNK, len(flat) - start)
                    _fill(file, raw[: count * kind.itemsize])
                    flat[start : start + count] = buffer[:count]
        except (OSError, EOFError) as error:
            what = f"{name} cannot be read from {stored.path}: {error}"
            raise SourceError(what, "The file changed while it was compiled: download the model again") from error

    def tensor(self, weight: str, name: str, *, transposed: bool = False) -> ir.TensorProtocol:
        """A weight for a graph: small ones in memory, large ones read each time."""
        tensor = WeightTensor(self, weight, name, transposed=transposed)
        return tensor if tensor.nbytes > _KEPT else ir.Tensor(np.ascontiguousarray(tensor.numpy()), name=name)


def open_weights(folder: Path) -> StoredWeights | None:
    """The weights of a Hugging Face folder; None where they are not all safetensors of floats.

    Raises:
        SourceError: A file is missing or not whole.
    """
    files = [path for path in check_weights(folder) if path.suffix == ".safetensors"]
    tensors = {name: tensor for path in files for name, tensor in check_safetensors(path).items()}
    fit = bool(tensors) and all(tensor.dtype in FLOATS for tensor in tensors.values())
    return StoredWeights(tensors) if fit else None


def _fill(file: Any, view: memoryview) -> None:
    """Read as many bytes as the view holds; EOFError where the file has fewer."""
    while view:
        count = file.readinto(view)
        if not count:
            raise EOFError("it is truncated")
        view = view[count:]
