from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from artifacts.errors import DataError, UsageError
from artifacts.manifest import TensorSpec
from compiler.tensor_data import TensorData, read_tensor_data

INPUTS = (TensorSpec("x", "float32", ("batch", 4)), TensorSpec("n", "int64", ("batch",)))


def saved(folder: Path, **arrays: object) -> Path:
    np.savez(folder / "data.npz", **arrays)  # type: ignore[arg-type]
    return folder / "data.npz"


def data(rows: int) -> TensorData:
    x = np.arange(rows * 4, dtype=np.float32).reshape(rows, 4)
    return TensorData({"x": x, "n": np.arange(rows)}, "data.npz")


def test_arrays_are_read_by_name(tmp_path: Path) -> None:
    found = read_tensor_data(saved(tmp_path, x=np.zeros((3, 4), np.float32), n=np.arange(3)), None)
    assert (len(found), found.name, sorted(found.arrays)) == (3, "data.npz", ["n", "x"])


def test_the_samples_are_disjoint_and_keep_examples_together() -> None:
    calibration, held_out = data(20).split(0, 100, 5)
    assert (len(calibration), len(held_out)) == (15, 5)
    assert not set(calibration.arrays["n"]) & set(held_out.arrays["n"])
    for part in (calibration, held_out):
        assert np.array_equal(part.arrays["x"][:, 0], 4.0 * part.arrays["n"])
    assert [len(part) for part in data(1).split(0, 8, 8)] == [1, 1]


@pytest.mark.parametrize(("rows", "first", "sizes"), [(20, "batch", [8, 8]), (3, "batch", [3]), (3, 1, [1, 1, 1])])
def test_batches_are_of_the_size_that_the_graph_takes(rows: int, first: str | int, sizes: list[int]) -> None:
    inputs = tuple(TensorSpec(spec.name, spec.dtype, (first, *spec.shape[1:])) for spec in INPUTS)
    assert [len(feeds["x"]) for feeds in data(rows).batches(inputs)] == sizes


def test_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is for texts"):
        read_tensor_data(saved(tmp_path, x=np.zeros(1)), "text=0")
    with pytest.raises(UsageError, match=r"no \.npz file"):
        read_tensor_data(tmp_path / "data.csv", None)
    with pytest.raises(DataError, match="there is no file"):
        read_tensor_data(tmp_path / "none.npz", None)
    with pytest.raises(DataError, match="different numbers of examples: x 3, n 2"):
        read_tensor_data(saved(tmp_path, x=np.zeros((3, 4)), n=np.zeros(2)), None)
    with pytest.raises(DataError, match="different numbers"):
        read_tensor_data(saved(tmp_path, x=np.float32(1.0)), None)
    with pytest.raises(DataError, match="cannot be read"):
        read_tensor_data(saved(tmp_path, x=np.array([{}], dtype=object)), None)
    with pytest.raises(DataError, match="holds no arrays"):
        read_tensor_data(saved(tmp_path), None)
    (tmp_path / "data.npz").write_bytes(b"not a zip")
    with pytest.raises(DataError, match="cannot be read"):
        read_tensor_data(tmp_path / "data.npz", None)
