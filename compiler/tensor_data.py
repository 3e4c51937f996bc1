"""Examples for models that take plain tensors: an .npz file with an array for each input of the graph."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from artifacts.errors import DataError, UsageError
from artifacts.manifest import TensorSpec

Arrays = dict[str, NDArray[Any]]
_BATCH = 8


@dataclass(frozen=True)
class TensorData:
    """Examples side by side.

    Attributes:
        arrays: By name of the graph's input; the first axis of each counts the examples.
        name: What to call the data in a report: the file's name.
    """

    arrays: Arrays
    name: str

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def split(self, seed: int, calibration: int, held_out: int) -> tuple[TensorData, TensorData]:
        """Two disjoint random samples of at most these many examples; a single example serves as both."""
        order = np.random.default_rng(seed).permutation(len(self))
        if len(order) == 1:
            return self, self
        held = min(held_out, max(1, len(order) // 2))
        return self._pick(order[held : held + calibration]), self._pick(order[:held])

    def batches(self, inputs: tuple[TensorSpec, ...]) -> Iterator[Arrays]:
        """Feeds of the size that the graph fixes for its first axis, else of 8 examples; what is left over is left."""
        fixed = next((spec.shape[0] for spec in inputs if spec.shape and isinstance(spec.shape[0], int)), None)
        size = fixed or min(_BATCH, len(self))
        for start in range(0, len(self) - size + 1, size):
            yield {name: array[start : start + size] for name, array in self.arrays.items()}

    def _pick(self, places: NDArray[np.int64]) -> TensorData:
        chosen = np.sort(places)
        return TensorData({name: array[chosen] for name, array in self.arrays.items()}, self.name)


def read_tensor_data(path: Path, columns: str | None) -> TensorData:
    """The arrays of an .npz file. Whether they fit the graph is seen when it is known.

    Raises:
        UsageError: ``columns`` are named, which arrays have not; or the file is no .npz.
        DataError: There is no such file, it cannot be read, holds no arrays, or different numbers of examples.
    """
    if columns is not None:
        raise UsageError(f"--columns {columns!r} is for texts, and this model takes tensors", "Name the arrays instead")
    if path.suffix != ".npz":
        raise UsageError(f"{path} is no .npz file, and this model takes tensors", "Save an array for each input")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read: {error}", "Write it with numpy.savez, without objects") from error
    if not arrays:
        raise DataError(f"{path} holds no arrays", "Save an array for each input of the model")
    counts = {name: len(array) if array.ndim else 0 for name, array in arrays.items()}
    if len(set(counts.values())) > 1 or not all(counts.values()):
        told = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise DataError(f"{path} has different numbers of examples: {told}", "Give every input as many, at least one")
    return TensorData(arrays, path.name)
