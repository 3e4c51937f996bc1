"""Calibration that was interrupted: what was complete is there, what was not is run, and nothing damaged is read."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from calibration_child import chain, chained

from artifacts.errors import UsageError
from compiler.calibrate import Calibrator
from compiler.calibrate import calibrator as module

MB = 10**6
ROOT = Path(__file__).resolve().parents[2]
NAMES = tuple(f"v{index}_out" for index in range(6))
CHILD = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from calibration_child import killed
killed(Path({folder!r}), {memory}, {statistic!r}, passes={passes})
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HASTEN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def graphs(tmp_path: Path) -> Path:
    (tmp_path / "graphs").mkdir()
    return tmp_path / "graphs"


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The values of each pass over the data that really runs."""
    passes: list[list[str]] = []
    start = Calibrator._pass

    def noted(self: Calibrator, model: ir.Model, values: list[ir.Value], *rest: Any) -> None:
        passes.append([str(value.name) for value in values])
        start(self, model, values, *rest)

    monkeypatch.setattr(Calibrator, "_pass", noted)
    return passes


def values_of(model: ir.Model) -> list[ir.Value]:
    return [output for node in model.graph for output in node.outputs]


def cap_for_two(graphs: Path, statistic: str) -> int:
    """A cap under which a pass sees two of the six values, or few."""
    model, lent = chain(), chained(graphs, MB)
    with pytest.raises(UsageError, match="at least") as caught:
        getattr(lent, statistic)(model, values_of(model))
    return (int(re.findall(r"least (\d+) MB", str(caught.value))[0]) + 3) * MB


def assert_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    assert list(one) == list(other) == list(NAMES)
    for name in NAMES:
        for part in ("rows", "second", "absmax", "mean"):
            np.testing.assert_array_equal(getattr(one[name], part), getattr(other[name], part))


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="there is no SIGKILL here")
def test_after_a_kill_only_the_rest_is_run(graphs: Path, cache: Path, seen: list[list[str]]) -> None:
    cap = cap_for_two(graphs, "moments")
    code = CHILD.format(
        root=str(ROOT), tests=str(ROOT / "tests"), folder=str(graphs), memory=cap, statistic="moments", passes=2
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list((cache / "moments").iterdir())) == 4
    model = chain()
    again = chained(graphs, cap).moments(model, values_of(model))
    assert seen == [["v4_out", "v5_out"]]
    seen.clear()
    whole = chained(graphs, cap)
    whole.cache = False
    assert_same(again, whole.moments(model, values_of(model)))
    assert seen == [list(NAMES[:2]), list(NAMES[2:4]), list(NAMES[4:])]
    seen.clear()
    chained(graphs, cap).moments(model, values_of(model))
    assert seen == []


def test_after_an_interrupt_only_the_rest_is_run(
    graphs: Path, seen: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    cap = cap_for_two(graphs, "moments")
    see = module._see

    def interrupted(*arguments: Any, **options: Any) -> None:
        if len(seen) == 2:  # in the middle of the second pass
            raise KeyboardInterrupt
        see(*arguments, **options)

    model, lent = chain(), chained(graphs, cap)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_see", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lent.moments(model, values_of(model))
    assert [path.name for path in graphs.glob("*.onnx")] == []
    assert list(graphs.glob("moments-*")) == []
    seen.clear()
    found = chained(graphs, cap).moments(model, values_of(model))
    assert seen == [list(NAMES[2:4]), list(NAMES[4:])]
    assert list(found) == list(NAMES)


def test_a_file_cut_short_by_a_crash_is_seen_again(graphs: Path, cache: Path, seen: list[list[str]]) -> None:
    model, lent = chain(), chained(graphs, 10**9)
    whole = lent.moments(model, values_of(model))
    paths = sorted((cache / "moments").iterdir())
    for path, size in zip(paths, (0, 100, None), strict=False):
        data = path.read_bytes()
        path.unlink()  # it is the same file as that of the results
        path.write_bytes(data[: len(data) // 2 if size is None else size])
    seen.clear()
    again = lent.moments(model, values_of(model))
    assert [len(names) for names in seen] == [3]
    assert_same(again, whole)


def test_a_second_pass_over_a_rewritten_graph_sees_what_changed(graphs: Path, seen: list[list[str]]) -> None:
    model, lent = chain(), chained(graphs, 10**9)
    lent.moments(model, values_of(model)[:3])
    lent.observe(model, values_of(model)[:1])
    node = values_of(model)[4].producer()
    assert node is not None
    node.op_type = "Abs"
    lent.moments(model, values_of(model))
    assert seen == [list(NAMES[:3]), [NAMES[0]], list(NAMES[3:])]
    seen.clear()
    lent.observe(model, values_of(model))
    assert seen == [list(NAMES[1:])]
