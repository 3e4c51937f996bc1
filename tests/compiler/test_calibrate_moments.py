"""Second moments of a decoder's values, gathered in groups under a cap, kept in files and in the cache."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from builders import GraphBuilder, evaluate, random

from artifacts.errors import DataError, OutputError, UsageError
from artifacts.manifest import TensorSpec
from artifacts.signature import STEP_INPUTS, cache_names
from compiler.calibrate import Calibrator, moments_files, tensor_batches, token_batches
from compiler.calibrate import calibrator as module
from compiler.calibrate.moments_files import MomentsFiles
from compiler.calibrate.plan import Group
from compiler.graphs import GraphFolder
from compiler.tolerance import rounding_tolerance
from passes.base import ObserveMoments
from passes.statistics import Moments, MomentsAccumulator

Array = np.ndarray
VOCABULARY, WIDTH, HEADS, KV_HEADS = 50, 32, 4, 2
SIZE = WIDTH // HEADS
LENGTHS = (7, 3, 12, 3, 7, 7, 5)
SEEN = ("model.layers.0.x", "model.layers.1.x", "model.layers.1.attended", "head.x")
MB = 10**6


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HASTEN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moments"


@pytest.fixture
def graphs(tmp_path: Path) -> GraphFolder:
    (tmp_path / "graphs").mkdir()
    return GraphFolder(tmp_path / "graphs")


def specs(layers: int = 2) -> tuple[TensorSpec, ...]:
    """Inputs of the decoder graph, as docs/format.md states them."""
    shape = ("batch", KV_HEADS, "capacity", SIZE)
    pairs = [past for layer in range(layers) for past, _ in cache_names(layer)]
    return (*(TensorSpec(*one) for one in STEP_INPUTS), *(TensorSpec(past, "float32", shape) for past in pairs))


def decoder(layers: int = 2) -> ir.Model:
    """Attention with a cache, added to what it reads, twice; logits where they are asked for."""
    builder = GraphBuilder()
    inputs = {
        spec.name: builder.input(spec.name, spec.shape, ir.DataType.from_numpy(np.dtype(spec.dtype)))
        for spec in specs(layers)
    }
    table = builder.constant(random(0, VOCABULARY, WIDTH), "embed")
    x = builder.add("Gather", table, inputs["input_ids"], name="model.layers.0.x")
    x.name = "model.layers.0.x"
    presents = []
    for layer in range(layers):
        at = f"model.layers.{layer}"
        parts = [
            builder.add("MatMul", x, builder.constant(random(10 * layer + part, WIDTH, width) / 6, f"{at}.w{part}"))
            for part, width in enumerate((WIDTH, KV_HEADS * SIZE, KV_HEADS * SIZE))
        ]
        pasts = [inputs[past] for past, _ in cache_names(layer)]
        attended = builder.add(
            "GroupQueryAttention",
            *(*parts, *pasts, inputs["seqlens_k"], inputs["total_sequence_length"]),
            domain="com.microsoft",
            outputs=3,
            num_heads=HEADS,
            kv_num_heads=KV_HEADS,
        )
        attended.name = f"{at}.attended"
        node = attended.producer()
        assert node is not None
        for output, (_, present) in zip(node.outputs[1:], cache_names(layer), strict=True):
            output.name, output.dtype = present, ir.DataType.FLOAT
            output.shape = ir.Shape(["batch", KV_HEADS, "capacity", SIZE])
            presents.append(output)
        product = builder.add("MatMul", attended, builder.constant(random(10 * layer + 5, WIDTH, WIDTH) / 6))
        x = builder.add("Add", x, product)
        x.name = f"model.layers.{layer + 1}.x"
    where = builder.add("Unsqueeze", inputs["logits_index"], builder.constant(np.array([-1])), dtype=ir.DataType.INT64)
    asked = builder.add("GatherND", x, where, batch_dims=1)
    asked.name = "head.x"
    head = builder.constant(random(99, WIDTH, VOCABULARY), "head")
    logits = builder.add("MatMul", asked, head, shape=["batch", "positions", VOCABULARY])
    logits.name = "logits"
    return builder.finish(logits, *presents)


def windows() -> list[Array]:
    generator = np.random.default_rng(5)
    return [generator.integers(0, VOCABULARY, length) for length in LENGTHS]


def values_of(model: ir.Model, names: tuple[str, ...] = SEEN) -> list[ir.Value]:
    known = {output.name: output for node in model.graph for output in node.outputs}
    return [known[name] for name in names]


def calibrator(graphs: GraphFolder, **options: Any) -> Calibrator:
    settings: dict[str, Any] = {"memory": 10**9, "cache": False, "threads": 1} | options
    return Calibrator(token_batches(windows(), specs(), most_tokens=15), graphs, **settings)


def alone(model: ir.Model, names: tuple[str, ...]) -> dict[str, Array]:
    """The rows of the values for every window by itself, float64 [tokens, K], as ONNX Runtime computes them."""
    copy = model.clone()
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(values_of(copy, names))
    rows: dict[str, list[Array]] = {name: [] for name in names}
    for window in windows():
        (batch,) = token_batches([window], specs())
        for name, array in evaluate(copy, batch.feeds).items():
            rows[name].append(array.reshape(-1, array.shape[-1]).astype(np.float64))
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def assert_equal(one: Mapping[str, Moments], other: Mapping[str, Moments]) -> None:
    assert list(one) == list(other)
    for name, found in one.items():
        assert found.rows == other[name].rows
        for part in ("second", "absmax", "mean"):
            np.testing.assert_array_equal(getattr(found, part), getattr(other[name], part), strict=True)


def test_they_are_what_numpy_says_of_every_window_alone(graphs: GraphFolder) -> None:
    model = decoder()
    observe: ObserveMoments = calibrator(graphs).moments
    found = observe(model, values_of(model))
    assert list(found) == list(SEEN)
    tolerance = rounding_tolerance(model)
    for name, data in alone(model, SEEN).items():
        seen = found[name]
        largest = np.abs(data).max()
        assert seen.rows == len(data) == sum(LENGTHS), "the head's input too is seen at every position"
        # Every batch size sums in another order: rounding, relative to the size of the value, and twice in a product.
        np.testing.assert_allclose(seen.absmax, np.abs(data).max(axis=0), rtol=0, atol=tolerance * largest)
        np.testing.assert_allclose(seen.mean, data.mean(axis=0), rtol=0, atol=tolerance * largest)
        # 44 products are summed in float32, and the mean is rounded to float32 in the file: 45 * 2^-24 of the sizes.
        bound = 2 * tolerance * largest**2 + 45 * 2.0**-24 * (np.abs(data).T @ np.abs(data)) / len(data)
        assert (np.abs(seen.second - data.T @ data / len(data)) <= bound).all()
        np.testing.assert_array_equal(seen.second, seen.second.T)


def test_what_several_products_read_is_gathered_once(graphs: GraphFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    start = MomentsAccumulator.__init__

    def counted(self: MomentsAccumulator, name: str) -> None:
        made.append(name)
        start(self, name)

    monkeypatch.setattr(MomentsAccumulator, "__init__", counted)
    model = decoder()
    weights = {f"model.layers.0.w{part}" for part in range(3)}
    readers = [node for node in model.graph if any(value and value.name in weights for value in node.inputs)]
    read = [node.inputs[0] for node in readers]
    assert len(read) == 3
    assert list(calibrator(graphs).moments(model, read)) == made == ["model.layers.0.x"]  # type: ignore[arg-type]


def test_the_model_and_the_folder_stay_as_they_were(graphs: GraphFolder) -> None:
    model = decoder()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    found = calibrator(graphs).moments(model, values_of(model))
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    (left,) = [path for path in graphs.path.iterdir() if path.name != "weights"]
    assert sorted(path.name for path in left.iterdir()) == ["0.npz", "1.npz", "2.npz", "3.npz"]
    assert "head.x" in found
    assert "logits" not in found
    del found
    assert not left.exists()


def test_several_passes_give_what_one_gives(graphs: GraphFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    model, lent = decoder(), calibrator(graphs)
    whole = lent.moments(model, values_of(model))
    monkeypatch.setattr(module, "plan", lambda *_: (Group((3, 0), 10**6), Group((2,), 10**6), Group((1,), 10**6)))
    assert_equal(lent.moments(model, values_of(model)), whole)


def test_values_seen_side_by_side_are_what_they_are_one_after_another(graphs: GraphFolder) -> None:
    model = decoder()
    one, several = (calibrator(graphs, threads=count).moments(model, values_of(model)) for count in (1, 3))
    assert_equal(one, several)


def test_batches_are_cut_where_the_scalar_is_shared(graphs: GraphFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    model, lent = decoder(), calibrator(graphs)
    monkeypatch.setattr(module, "plan", lambda *_: (Group((0, 1, 2, 3), 1),))
    found = lent.moments(model, values_of(model))
    for name, data in alone(model, SEEN).items():
        # The very same runs; only the sums and their rounding in the file differ.
        bound = 45 * 2.0**-24 * (np.abs(data).T @ np.abs(data)) / len(data)
        assert (np.abs(found[name].second - data.T @ data / len(data)) <= bound).all()


def wide(count: int = 6, channels: int = 600) -> ir.Model:
    """A chain of wide values, whose moments take far more than a run: 2.9 MB each."""
    builder = GraphBuilder()
    x = builder.input("x", ["n", channels])
    for index in range(count):
        x = builder.add("Neg", x, name=f"v{index}", shape=["n", channels])
    return builder.finish(x)


def test_values_are_divided_among_passes_and_too_small_a_cap_says_what_would_do(graphs: GraphFolder) -> None:
    model = wide()
    names = tuple(f"v{index}_out" for index in range(6))
    told: list[float] = []

    def lent(memory: int) -> Calibrator:
        batches = tensor_batches([{"x": random(seed, 3, 600)} for seed in range(4)])
        return Calibrator(batches, graphs, memory, cache=False, announce=lambda _, share: told.append(share))

    whole = lent(10**9).moments(model, values_of(model, names))
    passes = told.count(0.0)
    assert passes == 1
    with pytest.raises(UsageError, match=r"^calibration needs at least (\d+) MB, and may take 1 MB\. Pass") as caught:
        lent(MB).moments(model, values_of(model, names))
    assert "\n" not in str(caught.value)
    least = int(re.findall(r"least (\d+) MB", str(caught.value))[0])
    # A triangle of the sum, 4 K² bytes, in panels of 256 channels; the products of a panel; some rows in float64.
    # Weights and runs are next to nothing here.
    taken = (4 * 600**2 + 12 * 600 * 256 + 652 * 600) / MB
    assert 40 + taken <= least <= 41 + taken
    with pytest.raises(UsageError, match=f"at least {least} MB"):
        lent((least - 1) * MB).moments(model, values_of(model, names))
    told.clear()
    few = lent((least + 3) * MB).moments(model, values_of(model, names))
    assert_equal(few, whole)
    assert [round(share, 3) for share in told if round(share * 12, 6) % 4 == 0] == [0.0, 0.333, 0.667], "three passes"


def test_a_value_that_is_not_finite_is_named_with_its_example(graphs: GraphFolder) -> None:
    builder = GraphBuilder()
    model = builder.finish(builder.add("Log", builder.input("x", ["n", 3]), name="log", shape=["n", 3]))
    bad = np.ones((4, 3), np.float32)
    bad[2, 1] = -1.0
    lent = Calibrator(tensor_batches([{"x": bad}], rows_apart=True), graphs, memory=10**9)
    with pytest.raises(DataError, match=r"^log_out is nan for example 2 of the calibration data"):
        lent.moments(model, values_of(model, ("log_out",)))
    assert list(graphs.path.glob("moments-*")) == []


def test_nothing_to_observe(graphs: GraphFolder) -> None:
    assert calibrator(graphs).moments(decoder(), []) == {}


def some(folder: Path, seed: int = 0, **sizes: float) -> MomentsFiles:
    """Files of values of six channels, each of a size."""
    files = MomentsFiles(list(sizes), folder)
    for index, (name, size) in enumerate(sizes.items()):
        files.begin(name).update(random(seed + index, 50, 6) * np.float32(size))
        files.finish(name)
    return files


def recalled(folder: Path, **keys: str) -> MomentsFiles | None:
    """Those kept under the keys; None if one is not there."""
    files = MomentsFiles(list(keys), folder)
    if all(files.recall(name, key) for name, key in keys.items()):
        return files
    files.close()
    return None


@pytest.mark.parametrize("channels", [1, 7, 256, 300, 600])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1.0, 1e30])
def test_a_file_rounds_each_element_to_float32(tmp_path: Path, size: float, channels: int) -> None:
    data = random(1, 40, channels) * np.geomspace(1e-3, 1.0, channels, dtype=np.float32) * np.float32(size)
    accumulator = MomentsAccumulator("x")
    accumulator.update(data)
    exact = accumulator.result()
    files = MomentsFiles(["x"], tmp_path)
    files.begin("x").update(data)
    files.finish("x")
    read = files["x"]
    assert read.rows == 40
    np.testing.assert_array_equal(read.absmax, exact.absmax, strict=True)
    np.testing.assert_array_equal(read.mean, exact.mean, strict=True)
    assert (np.abs(read.second - exact.second) <= 2.0**-24 * np.abs(exact.second)).all()
    np.testing.assert_array_equal(read.second, read.second.T)


def test_files_that_cannot_be_written_are_an_error_of_one_line(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot be written: No such file or directory"):
        MomentsFiles(["x"], tmp_path / "missing")
    files = some(tmp_path, x=1.0)
    files.paths["x"].unlink()
    files.paths["x"].mkdir()
    files.begin("x").update(np.ones((2, 2), np.float32))
    with pytest.raises(OutputError, match="cannot be written"):
        files.finish("x")


def test_what_is_kept_is_found(tmp_path: Path, cache: Path) -> None:
    kept = some(tmp_path, a=1.0, b=3.0)
    assert recalled(tmp_path, a="0", b="1") is None
    kept.remember("a", "0")
    kept.remember("b", "1")
    assert sorted(path.name for path in cache.iterdir()) == ["0.npz", "1.npz"]
    found = recalled(tmp_path, a="0", b="1")
    assert found is not None
    assert_equal(found, kept)
    for path in cache.iterdir():  # another process makes room
        path.unlink()
    assert_equal(found, kept)
    found.remember("a", "0")
    assert recalled(tmp_path, a="0", b="1") is None
    assert recalled(tmp_path, other="0") is not None, "the name is no part of it"


def test_a_file_system_without_links_gets_copies(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(Path, "hardlink_to", refused)
    kept = some(tmp_path, a=1.0)
    kept.remember("a", "0")
    found = recalled(tmp_path, a="0")
    assert found is not None
    assert_equal(found, kept)
    assert len({path.stat().st_ino for path in (*kept.paths.values(), *found.paths.values(), *cache.iterdir())}) == 3


@pytest.mark.parametrize("damage", ["empty", "text", "short", "flipped", "folder", "gone"])
def test_a_damaged_file_is_a_miss(tmp_path: Path, cache: Path, damage: str) -> None:
    some(tmp_path, a=1.0).remember("a", "0")
    path = cache / "0.npz"
    data = bytearray(path.read_bytes())
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "gone":
        data[len(data) // 2] ^= 0x40
        path.write_bytes({"empty": b"", "text": b"no archive", "short": bytes(data[:-200])}.get(damage, bytes(data)))
    assert recalled(tmp_path, a="0") is None
    assert len(list(tmp_path.glob("moments-*"))) == 0


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("second", np.zeros(20, np.float32)),
        ("second", np.zeros(21, np.float64)),
        ("second", np.full(21, np.inf, np.float32)),
        ("absmax", np.zeros(5, np.float32)),
        ("mean", np.zeros(6, np.float32)),
        ("rows", np.array(0)),
    ],
)
def test_arrays_that_do_not_fit_together_are_a_miss(tmp_path: Path, cache: Path, name: str, array: Array) -> None:
    some(tmp_path, a=1.0).remember("a", "0")
    path = cache / "0.npz"
    arrays = dict(np.load(path))
    assert name in arrays
    path.unlink()
    np.savez(path, **(arrays | {name: array}))
    assert recalled(tmp_path, a="0") is None


def test_the_oldest_go_when_there_is_too_much(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some(tmp_path, a=1.0).remember("a", "0")
    size = (cache / "0.npz").stat().st_size
    monkeypatch.setattr(moments_files, "MOST_BYTES", int(2.5 * size))
    os.utime(cache / "0.npz", (1000, 1000))
    kept = some(tmp_path, a=1.0, b=1.0, c=1.0)
    for key, name in enumerate(kept, 1):
        kept.remember(name, str(key))
    # The third would be larger than the whole cache together with those before it: they stay, and are found again.
    assert sorted(path.name for path in cache.iterdir()) == ["1.npz", "2.npz"]


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("in the way")
    some(tmp_path, a=1.0).remember("a", "0")
    assert recalled(tmp_path, a="0") is None


def test_moments_are_recalled_as_they_were_and_apart_from_activations(
    graphs: GraphFolder, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, lent = decoder(), calibrator(graphs, cache=True)
    activations = lent.observe(model, values_of(model))
    first = lent.moments(model, values_of(model))
    monkeypatch.setattr(module, "measure", None)
    same = decoder()
    again = calibrator(graphs, cache=True).moments(same, values_of(same))
    assert_equal(again, first)
    assert len(list(cache.iterdir())) == len(SEEN)
    for name, found in activations.items():
        np.testing.assert_array_equal(again[name].absmax, np.maximum(-found.low, found.high))
        np.testing.assert_array_equal(again[name].mean, found.mean)
