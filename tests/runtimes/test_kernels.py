from __future__ import annotations

import json
from pathlib import Path

import pytest

from artifacts.errors import ProviderError
from runtimes.kernels import Kernel, read_trace, shares


def node(name: str, operator: str, duration: int) -> dict[str, object]:
    return {"cat": "Node", "name": f"{name}_kernel_time", "dur": duration, "args": {"op_name": operator}}


def inner(name: str, operator: str, kernel: str, duration: int, status: str = "EXECUTED") -> dict[str, object]:
    told = {"ov_node_type": operator, "ov_exec_type": kernel, "ov_status": status}
    return {"cat": "Kernel", "name": f"OV::{name}", "dur": duration, "args": told}


def write(folder: Path, events: object) -> Path:
    (folder / "trace.json").write_text(json.dumps(events))
    return folder / "trace.json"


def test_kernels_are_averaged_over_the_runs_but_the_first(tmp_path: Path) -> None:
    events = [{"cat": "Session", "name": "model_run"}, node("a", "MatMul", 900), node("b", "Gelu", 50)]
    found = read_trace(write(tmp_path, [*events, *[node("a", "MatMul", t) for t in (100, 300)]]), runs=3)
    assert found == (Kernel("a", "MatMul", "MatMul", 0.2), Kernel("b", "Gelu", "Gelu", 0.0))


def test_kernels_inside_a_compiled_node_take_its_place(tmp_path: Path) -> None:
    events = [
        inner("fc", "FullyConnected", "brgemm_avx512_amx_I8", 70),
        inner("up", "FullyConnected", "brgemm_avx512_f32", 30),
        inner("gone", "Add", "undef", 0, status="NOT_RUN"),
        node("OpenVINO_0", "OpenVINO_0", 120),
    ]
    found = read_trace(write(tmp_path, events), runs=1)
    assert [kernel.name for kernel in found] == ["fc", "up"]
    assert [kernel.integer for kernel in found] == [True, False]


def test_integer_operators_of_the_cpu_provider_are_known() -> None:
    assert Kernel("a", "MatMulIntegerToFloat", "MatMulIntegerToFloat", 1.0).integer
    assert not Kernel("a", "FusedMatMul", "FusedMatMul", 1.0).integer
    assert not Kernel("a", "Transpose", "unknown_i8", 1.0).integer


def test_shares_are_summed_by_kind_and_sorted() -> None:
    kernels = (Kernel("a", "Add", "Add", 1.0), Kernel("b", "Gelu", "Gelu", 5.0), Kernel("c", "Add", "Add", 2.0))
    assert [(share.operator, share.count, share.ms) for share in shares(kernels)] == [("Gelu", 1, 5.0), ("Add", 2, 3.0)]


@pytest.mark.parametrize("events", [{}, [], [{"cat": "Node"}], "nothing", [{"cat": "Session", "name": "x"}]])
def test_what_is_no_trace_is_refused(tmp_path: Path, events: object) -> None:
    with pytest.raises(ProviderError, match="profile"):
        read_trace(write(tmp_path, events), runs=1)


def test_a_missing_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ProviderError, match="cannot be read"):
        read_trace(tmp_path / "none.json", runs=1)
