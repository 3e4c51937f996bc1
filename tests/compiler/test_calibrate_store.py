from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from builders import GraphBuilder, random

from compiler.calibrate import Calibrator, store, tensor_batches
from compiler.calibrate import calibrator as module
from compiler.graphs import GraphFolder
from passes.statistics import Activation, ActivationAccumulator

NAMES = ("a", "b")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HASTEN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "calibration"


def activation(seed: int = 0, rows: int = 700, channels: int = 6) -> Activation:
    accumulator = ActivationAccumulator("x")
    accumulator.update(random(seed, rows, channels))
    return accumulator.result()


def some(seed: int = 0) -> dict[str, Activation]:
    return {"a": activation(seed), "b": activation(seed + 1, rows=3, channels=1)}


def same(one: Activation, other: Activation) -> bool:
    arrays = [
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("low", "high", "mean", "histogram", "sample")
    ]
    return (one.rows, one.reach) == (other.rows, other.reach) and all(arrays)


def test_what_is_kept_is_found() -> None:
    kept = some()
    assert store.recall("key", NAMES) is None
    store.remember("key", kept)
    found = store.recall("key", NAMES)
    assert found is not None
    assert list(found) == list(NAMES)
    assert all(same(found[name], kept[name]) for name in NAMES)
    assert isinstance(found["a"].rows, int)
    assert isinstance(found["a"].reach, float)
    assert store.recall("other", NAMES) is None
    assert store.recall("key", ("b", "a")) is None
    assert store.recall("key", ("a",)) is None


def test_nothing_half_written_is_left(folder: Path) -> None:
    store.remember("key", some())
    assert [path.name for path in folder.iterdir()] == ["key.npz"]


@pytest.mark.parametrize("damage", ["empty", "text", "short", "flipped", "folder", "pickle", "header"])
def test_a_damaged_file_is_a_miss(folder: Path, damage: str) -> None:
    store.remember("key", some())
    path = folder / "key.npz"
    data = bytearray(path.read_bytes())
    if damage == "folder":
        path.unlink()
        path.mkdir()
    elif damage == "pickle":
        arrays = dict(np.load(path))
        np.savez(path, **(arrays | {"0.low": np.array([{}], object)}))
    else:
        if damage == "flipped":
            data[len(data) // 2] ^= 0x40
        if damage == "header":
            place = data.index(b"(700") if b"(700" in data else data.index(b"(512")
            data[place : place + 4] = b"(9e9"
        path.write_bytes({"empty": b"", "text": b"no archive", "short": bytes(data[:-200])}.get(damage, bytes(data)))
    assert store.recall("key", NAMES) is None


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("0.low", np.zeros(5, np.float32)),
        ("0.low", np.zeros(6, np.float64)),
        ("0.mean", np.full(6, np.nan)),
        ("0.sample", np.zeros((3, 6), np.float32)),
        ("0.histogram", np.zeros(2048, np.int64)),
        ("0.rows", np.array(0)),
        ("0.reach", np.array(np.inf)),
        ("0.reach", np.array(-1.0)),
    ],
)
def test_arrays_that_do_not_fit_together_are_a_miss(folder: Path, name: str, array: np.ndarray) -> None:
    store.remember("key", some())
    arrays = dict(np.load(folder / "key.npz"))
    assert name in arrays
    np.savez(folder / "key.npz", **(arrays | {name: array}))
    assert store.recall("key", NAMES) is None


def test_a_file_without_an_array_is_a_miss(folder: Path) -> None:
    store.remember("key", some())
    arrays = dict(np.load(folder / "key.npz"))
    del arrays["1.mean"]
    np.savez(folder / "key.npz", **arrays)
    assert store.recall("key", NAMES) is None


def test_the_oldest_goes_when_there_is_too_much(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.remember("0", some())
    size = (folder / "0.npz").stat().st_size
    monkeypatch.setattr(store, "MOST_BYTES", int(3.5 * size))
    for index in range(1, 3):
        store.remember(str(index), some())
    for index in range(3):
        os.utime(folder / f"{index}.npz", (1000 + index, 1000 + index))
    assert store.recall("0", NAMES) is not None, "which makes it the youngest"
    store.remember("3", some())
    assert sorted(path.stem for path in folder.iterdir()) == ["0", "2", "3"]


def test_what_is_larger_than_the_whole_cache_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "MOST_BYTES", 1000)
    store.remember("key", some())
    assert not folder.exists()


def test_a_cache_that_cannot_be_written_is_no_error(folder: Path) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("in the way")
    store.remember("key", some())
    assert store.recall("key", NAMES) is None


def model(seed: int = 0, *, shift: float = 1.0) -> ir.Model:
    """y = relu(x @ w + shift); w is large enough for a file of its own."""
    builder = GraphBuilder()
    product = builder.add("MatMul", builder.input("x", ["n", 64]), builder.constant(random(seed, 64, 64), "w"))
    total = builder.add("Add", product, builder.constant(shift, "shift"), name="total")
    return builder.finish(builder.add("Relu", total, name="y", shape=["n", 64]))


class Counted:
    """A calibrator, and how often it really ran a graph to see values."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs = 0
        self.folder = tmp_path / "graphs"
        self.folder.mkdir()
        measure = module.measure

        def counting(*arguments: object, **options: object) -> object:
            self.runs += 1
            return measure(*arguments, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(module, "measure", counting)

    def ran(self, graph: ir.Model, name: str = "total_out", x: int = 0, **options: object) -> bool:
        before = self.runs
        batches = tensor_batches([{"x": random(x, 5, 64)}])
        settings = {"memory": 10**9} | options
        value = next(output for node in graph.graph for output in node.outputs if output.name == name)
        found = Calibrator(batches, GraphFolder(self.folder), **settings).observe(graph, [value])  # type: ignore[arg-type]
        assert list(found) == [name]
        assert found[name].rows == 5
        return self.runs > before


def test_the_key_is_all_that_the_result_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(tmp_path, monkeypatch)
    assert counted.ran(model())
    assert not counted.ran(model())
    assert not counted.ran(model(), memory=2 * 10**9)
    assert counted.ran(model(seed=1)), "another weight in a file"
    assert counted.ran(model(shift=2.0)), "another weight in the graph"
    assert counted.ran(model(), name="y_out")
    assert counted.ran(model(), x=1)
    assert counted.ran(model(), seed=1)
    assert counted.ran(model(), cache=False)
    assert not counted.ran(model())


def test_a_damaged_file_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    counted = Counted(tmp_path, monkeypatch)
    assert counted.ran(model())
    (path,) = folder.iterdir()
    path.write_bytes(path.read_bytes()[:100])
    assert counted.ran(model())
    assert not counted.ran(model())


def test_without_a_cache_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    assert Counted(tmp_path, monkeypatch).ran(model(), cache=False)
    assert not folder.exists()
