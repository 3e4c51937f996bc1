"""Ranges kept in the user's cache, each value by itself under a key of what it depends on."""

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


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HASTEN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "calibration"


def activation(seed: int = 0, rows: int = 700, channels: int = 6) -> Activation:
    accumulator = ActivationAccumulator("x")
    accumulator.update(random(seed, rows, channels))
    return accumulator.result()


def same(one: Activation, other: Activation) -> bool:
    arrays = [
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("low", "high", "mean", "histogram", "sample")
    ]
    return (one.rows, one.reach) == (other.rows, other.reach) and all(arrays)


@pytest.mark.parametrize(("rows", "channels"), [(700, 6), (3, 1)])
def test_what_is_kept_is_found(rows: int, channels: int) -> None:
    kept = activation(rows=rows, channels=channels)
    assert store.recall("key") is None
    store.remember("key", kept)
    found = store.recall("key")
    assert found is not None
    assert same(found, kept)
    assert isinstance(found.rows, int)
    assert isinstance(found.reach, float)
    assert store.recall("other") is None


def test_nothing_half_written_is_left(folder: Path) -> None:
    store.remember("key", activation())
    assert [path.name for path in folder.iterdir()] == ["key.npz"]


@pytest.mark.parametrize("damage", ["empty", "text", "short", "flipped", "folder", "pickle", "header"])
def test_a_damaged_file_is_a_miss(folder: Path, damage: str) -> None:
    store.remember("key", activation())
    path = folder / "key.npz"
    data = bytearray(path.read_bytes())
    if damage == "folder":
        path.unlink()
        path.mkdir()
    elif damage == "pickle":
        arrays = dict(np.load(path))
        np.savez(path, **(arrays | {"low": np.array([{}], object)}))
    else:
        if damage == "flipped":
            data[len(data) // 2] ^= 0x40
        if damage == "header":
            place = data.index(b"(512")
            data[place : place + 4] = b"(9e9"
        path.write_bytes({"empty": b"", "text": b"no archive", "short": bytes(data[:-200])}.get(damage, bytes(data)))
    assert store.recall("key") is None


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("low", np.zeros(5, np.float32)),
        ("low", np.zeros(6, np.float64)),
        ("mean", np.full(6, np.nan)),
        ("sample", np.zeros((3, 6), np.float32)),
        ("histogram", np.zeros(2048, np.int64)),
        ("rows", np.array(0)),
        ("reach", np.array(np.inf)),
        ("reach", np.array(-1.0)),
    ],
)
def test_arrays_that_do_not_fit_together_are_a_miss(folder: Path, name: str, array: np.ndarray) -> None:
    store.remember("key", activation())
    arrays = dict(np.load(folder / "key.npz"))
    assert name in arrays
    np.savez(folder / "key.npz", **(arrays | {name: array}))
    assert store.recall("key") is None


def test_a_file_without_an_array_is_a_miss(folder: Path) -> None:
    store.remember("key", activation())
    arrays = dict(np.load(folder / "key.npz"))
    del arrays["mean"]
    np.savez(folder / "key.npz", **arrays)
    assert store.recall("key") is None


def test_the_oldest_goes_when_there_is_too_much(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.remember("0", activation())
    size = (folder / "0.npz").stat().st_size
    monkeypatch.setattr(store, "MOST_BYTES", int(3.5 * size))
    for index in range(1, 3):
        store.remember(str(index), activation())
    for index in range(3):
        os.utime(folder / f"{index}.npz", (1000 + index, 1000 + index))
    assert store.recall("0") is not None, "which makes it the youngest"
    store.remember("3", activation())
    assert sorted(path.stem for path in folder.iterdir()) == ["0", "2", "3"]


def test_what_is_larger_than_the_whole_cache_leaves_what_came_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else each would push out the one before, and nothing would be found when all are asked for again."""
    store.remember("size", activation())
    size = (folder / "size.npz").stat().st_size
    monkeypatch.setattr(store, "MOST_BYTES", int(2.5 * size))
    results = store.ActivationResults(("a", "b", "c"))
    for index, name in enumerate(("a", "b", "c")):
        results.begin(name).update(random(index, 700, 6))
        results.finish(name)
        results.remember(name, name)
    assert sorted(path.stem for path in folder.iterdir()) == ["a", "b"]
    again = store.ActivationResults(("a", "b", "c"))
    assert [again.recall(name, name) for name in ("a", "b", "c")] == [True, True, False]
    assert list(again) == ["a", "b", "c"]
    assert again.held == 2 * results.held // 3


def test_a_cache_that_cannot_be_written_is_no_error(folder: Path) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("in the way")
    store.remember("key", activation())
    assert store.recall("key") is None


def model(seed: int = 0, *, shift: float = 1.0, name: str = "total", end: str = "Relu") -> ir.Model:
    """y = end(x @ w + shift); w is large enough for a file of its own."""
    builder = GraphBuilder()
    product = builder.add("MatMul", builder.input("x", ["n", 64]), builder.constant(random(seed, 64, 64), "w"))
    total = builder.add("Add", product, builder.constant(shift, "shift"), name=name)
    return builder.finish(builder.add(end, total, name="y", shape=["n", 64]))


class Counted:
    """A calibrator, and which values it really ran a graph to see."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        self.folder = tmp_path / "graphs"
        self.folder.mkdir()
        measure = module.measure

        def counting(graph: ir.Model, values: tuple[ir.Value, ...], *arguments: object, **options: object) -> object:
            self.seen = [str(value.name) for value in values]
            return measure(graph, values, *arguments, **options)  # type: ignore[arg-type]

        monkeypatch.setattr(module, "measure", counting)

    def ran(self, graph: ir.Model, *names: str, x: int = 0, **options: object) -> list[str]:
        names = names or ("total_out",)
        self.seen = []
        batches = tensor_batches([{"x": random(x, 5, 64)}])
        settings = {"memory": 10**9} | options
        known = {output.name: output for node in graph.graph for output in node.outputs}
        values = [known[name] for name in names]
        found = Calibrator(batches, GraphFolder(self.folder), **settings).observe(graph, values)  # type: ignore[arg-type]
        assert list(found) == list(names)
        assert all(one.rows == 5 for one in found.values())
        return self.seen


def test_the_key_is_all_that_the_result_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(tmp_path, monkeypatch)
    assert counted.ran(model())
    assert not counted.ran(model())
    assert not counted.ran(model(), memory=2 * 10**9)
    assert counted.ran(model(seed=1)), "another weight in a file"
    assert counted.ran(model(shift=2.0)), "another weight in the graph"
    assert counted.ran(model(), "y_out")
    assert counted.ran(model(), x=1)
    assert counted.ran(model(), seed=1)
    assert counted.ran(model(), cache=False)
    assert not counted.ran(model())


def test_only_what_lies_upstream_of_a_value_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(tmp_path, monkeypatch)
    assert counted.ran(model(), "total_out", "y_out") == ["total_out", "y_out"]
    changed = model(end="Neg")
    assert not counted.ran(changed, "total_out"), "what comes after it is another"
    assert counted.ran(changed, "total_out", "y_out") == ["y_out"]
    assert not counted.ran(model(name="renamed"), "renamed_out")


def test_other_values_of_a_graph_add_to_what_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(tmp_path, monkeypatch)
    assert counted.ran(model(), "y_out") == ["y_out"]
    assert counted.ran(model(), "total_out", "y_out") == ["total_out"]
    assert not counted.ran(model(), "y_out", "total_out")
    assert not counted.ran(model(), "total_out")


def branching(then: str = "Neg", *, inside: float = 1.0) -> ir.Model:
    """y = If(flag): then(x + inside), else relu(x)."""
    builder = GraphBuilder()
    x, flag = builder.input("x", ["n", 64]), builder.input("flag", [], ir.DataType.BOOL)
    branches = []
    for operator in (then, "Relu"):
        inner = GraphBuilder()
        moved = inner.add("Add", x, inner.constant(inside, f"{operator}.inside"), name=f"{operator}.moved")
        inner.graph.outputs.append(inner.add(operator, moved, name=operator, shape=["n", 64]))
        branches.append(inner.graph)
    chosen = builder.add("If", flag, name="chosen", then_branch=branches[0], else_branch=branches[1], shape=["n", 64])
    return builder.finish(chosen)


def test_the_branches_of_an_operator_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[object] = []
    measure = module.measure
    monkeypatch.setattr(module, "measure", lambda *args, **options: runs.append(1) or measure(*args, **options))

    def ran(graph: ir.Model) -> bool:
        runs.clear()
        batches = tensor_batches([{"x": random(0, 5, 64), "flag": np.array(True)}])
        Calibrator(batches, GraphFolder(tmp_path), memory=10**9).observe(graph, [graph.graph.outputs[0]])
        return bool(runs)

    assert ran(branching())
    assert not ran(branching())
    assert ran(branching("Abs"))
    assert ran(branching(inside=2.0))


def test_a_damaged_file_is_made_anew_and_only_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    counted = Counted(tmp_path, monkeypatch)
    assert counted.ran(model(), "total_out")
    (path,) = folder.iterdir()
    assert counted.ran(model(), "total_out", "y_out") == ["y_out"]
    path.write_bytes(path.read_bytes()[:100])
    assert counted.ran(model(), "total_out", "y_out") == ["total_out"]
    assert not counted.ran(model(), "total_out", "y_out")


def test_without_a_cache_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    assert Counted(tmp_path, monkeypatch).ran(model(), cache=False)
    assert not folder.exists()
