from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from task_graphs import classifier, embedder, token_head, write_bundle

from artifacts.errors import UsageError
from artifacts.manifest import TensorSpec
from runtimes.bench import bench, synthetic


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_CACHE_DIR", str(tmp_path / "cache"))


def test_every_shape_has_latencies_and_throughput(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", "feature-extraction", embedder())
    report = bench(bundle, batches=(1, 4), lengths=(8, 32), seconds=0.02, threads=1)
    assert [(row.batch, row.length) for row in report.rows] == [(1, 8), (1, 32), (4, 8), (4, 32)]
    for row in report.rows:
        assert 0.0 < row.p50_ms <= row.p90_ms <= row.p99_ms
        assert row.per_second > 0.0
        assert row.calls >= 5
        assert row.against_ms is None
        assert row.ratio is None
    assert (report.variant, report.provider, report.device) == ("cpu-fp32", "CPUExecutionProvider", "cpu")
    assert report.against == ""
    assert report.machine.cores >= 1
    assert json.loads(json.dumps(report.to_dict()))["rows"][0]["batch"] == 1


def test_the_reference_variant_is_measured_in_turn(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", "feature-extraction", embedder(), variants=("cpu-fp32", "reference"))
    report = bench(
        bundle, variant="cpu-fp32", against="reference", batches=(2,), lengths=(16,), seconds=0.02, threads=1
    )
    (row,) = report.rows
    assert report.against == "reference on cpu"
    assert row.against_ms is not None
    assert row.ratio is not None
    assert report.ratio is not None
    assert row.ratio.low <= row.ratio.median <= row.ratio.high
    assert report.ratio.median == pytest.approx(row.ratio.median)
    assert 0.05 < row.ratio.median < 20.0  # the same graph twice: an order of magnitude is a mix-up, not noise


def test_another_bundle_is_named_by_its_path(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", "feature-extraction", embedder())
    write_bundle(tmp_path / "c", "text-classification", classifier())
    report = bench(bundle, against=tmp_path / "c", batches=(1,), lengths=(8,), seconds=0.02, threads=1)
    assert report.against == f"{tmp_path / 'c'}: cpu-fp32 on cpu"
    assert report.ratio is not None


def test_a_bundle_without_reference_says_how_to_keep_one(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", "feature-extraction", embedder())
    with pytest.raises(UsageError, match="--keep-reference"):
        bench(bundle, against="reference")


def test_models_of_other_inputs_are_not_compared(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "b", "feature-extraction", embedder())
    write_bundle(tmp_path / "c", "token-classification", token_head())
    with pytest.raises(UsageError, match="takes input_ids, not attention_mask, input_ids"):
        bench(bundle, against=tmp_path / "c")


@pytest.mark.parametrize(
    "wish",
    [
        {"batches": ()},
        {"batches": (0,)},
        {"lengths": (-1,)},
        {"lengths": (129,)},
        {"seconds": 0.0},
        {"seconds": float("nan")},
        {"threads": -1},
        {"variant": "nope"},
    ],
)
def test_impossible_wishes_are_usage_errors(tmp_path: Path, wish: dict[str, object]) -> None:
    bundle = write_bundle(tmp_path / "b", "feature-extraction", embedder())
    with pytest.raises(UsageError):
        bench(bundle, **wish)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "golden", "low", "high"),
    [
        ("input_ids", np.array([[5, 90]]), 5, 90),
        ("attention_mask", np.array([[0, 1]]), 1, 1),
        ("token_type_ids", np.array([[0, 1]]), 0, 0),
        ("input_ids", np.array([[3, 9]], np.int32), 3, 9),
        ("pixels", np.array([[-1.5, 2.0]], np.float32), -1.5, 2.0),
        ("flag", np.array([[False, True]]), 0, 0),
        ("input_ids", np.zeros((0, 4), np.int64), 0, 1),
    ],
)
def test_synthetic_inputs_stay_in_the_golden_range(name: str, golden: np.ndarray, low: float, high: float) -> None:
    spec = TensorSpec(name, golden.dtype.name, ("batch", "length"))
    made = synthetic(spec, golden, 7, 50, np.random.default_rng(0))
    assert made.shape == (7, 50)
    assert made.dtype == golden.dtype
    assert low <= made.min() <= made.max() <= high


def test_fixed_extents_stay() -> None:
    spec = TensorSpec("x", "float32", ("n", 3, "s"))
    assert synthetic(spec, np.ones((1, 3, 1), np.float32), 2, 9, np.random.default_rng(0)).shape == (2, 3, 9)
