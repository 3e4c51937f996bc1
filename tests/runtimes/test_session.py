from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from session_graphs import determinant, linear, skip_layer_norm

from artifacts.errors import ProviderError, UsageError
from artifacts.manifest import SessionOptions, TensorSpec
from artifacts.target import CPU_PROVIDER, CUDA_PROVIDER, OPENVINO_PROVIDER
from runtimes.environment import physical_cores, short_reason
from runtimes.fingerprint import cpu_features
from runtimes.protobuf import op_types, probe_model
from runtimes.session import Session

PLAIN = SessionOptions()


def rows(count: int = 4, width: int = 64) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((count, width)).astype(np.float32)


def test_runs_and_describes_its_inputs(tmp_path):
    session = Session(linear(tmp_path / "m.onnx"), CPU_PROVIDER, options=PLAIN)
    assert session.inputs == (TensorSpec("x", "float32", ("n", 64)),)
    assert session.outputs == (TensorSpec("y", "float32", ("n", 64)),)
    assert session.threads == physical_cores()
    x = rows()
    expected = x @ np.asarray(session.run({"x": np.eye(64, dtype=np.float32)})["y"])
    assert np.allclose(session.run({"x": x})["y"], expected, atol=1e-5)


def test_io_binding_changes_no_number(tmp_path):
    model = linear(tmp_path / "m.onnx", ballast=2)
    plain = Session(model, CPU_PROVIDER, options=PLAIN, threads=1)
    bound = Session(model, CPU_PROVIDER, options=PLAIN, threads=1, io_binding=True)
    for x in (rows(3), rows(5), np.asfortranarray(rows(5)), rows(6)[::2]):
        assert np.array_equal(plain.run({"x": x})["y"], bound.run({"x": x})["y"])


@pytest.mark.parametrize("io_binding", [False, True])
def test_feeds_that_do_not_fit_are_one_line(tmp_path, io_binding):
    session = Session(linear(tmp_path / "m.onnx"), CPU_PROVIDER, options=PLAIN, io_binding=io_binding)
    for feeds in ({}, {"z": rows()}, {"x": rows(width=3)}, {"x": rows().astype(np.int64)}):
        with pytest.raises(ProviderError, match="cpu cannot run the model") as caught:
            session.run(feeds)
        assert "\n" not in str(caught.value)
        assert "ONNXRuntimeError" not in str(caught.value)


def test_model_files_that_cannot_be_loaded(tmp_path):
    (tmp_path / "empty.onnx").write_bytes(b"")
    (tmp_path / "noise.onnx").write_bytes(os.urandom(100))
    (tmp_path / "half.onnx").write_bytes(probe_model()[:60])
    for name in ("empty", "noise", "half", "absent"):
        with pytest.raises(ProviderError, match=rf"cpu cannot load {name}\.onnx"):
            Session(tmp_path / f"{name}.onnx", CPU_PROVIDER, options=PLAIN)


def test_never_falls_back(tmp_path):
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("CUDA may work here")
    with pytest.raises(ProviderError, match=r"cuda does not work here: .+"):
        Session(linear(tmp_path / "m.onnx"), CUDA_PROVIDER, options=PLAIN)


def test_unknown_provider_and_device(tmp_path):
    with pytest.raises(UsageError, match="unknown execution provider"):
        Session(linear(tmp_path / "m.onnx"), "MagicExecutionProvider", options=PLAIN)
    with pytest.raises(UsageError, match="unknown device"):
        Session(tmp_path / "m.onnx", CPU_PROVIDER, options=PLAIN, device="cuda:x")


def test_closed_session_says_so(tmp_path):
    session = Session(linear(tmp_path / "m.onnx"), CPU_PROVIDER, options=PLAIN)
    session.close()
    with pytest.raises(ProviderError, match="closed"):
        session.run({"x": rows()})


def test_assignment_is_recorded_only_on_demand(tmp_path):
    model = linear(tmp_path / "m.onnx")
    recorded = Session(model, CPU_PROVIDER, options=PLAIN, record_assignment=True)
    assert recorded.assignment() == {CPU_PROVIDER: (("product", "MatMul"),)}
    assert recorded.fallback() == ()
    with pytest.raises(ProviderError, match="not recorded"):
        Session(model, CPU_PROVIDER, options=PLAIN).assignment()


def test_optimization_level(tmp_path):
    model = tmp_path / "probe.onnx"
    model.write_bytes(probe_model())
    assert op_types(model) == {"Add": 1, "MatMul": 1}
    found = {}
    for level in ("disabled", "all"):
        out = tmp_path / f"{level}.onnx"
        session = Session(model, CPU_PROVIDER, options=SessionOptions(optimization_level=level), optimized=out)
        found[level] = op_types(out)
        assert np.array_equal(session.run({"x": np.ones((1, 4), np.float32)})["y"], np.full((1, 4), 3.0))
    assert found == {"disabled": {"Add": 1, "MatMul": 1}, "all": {"Gemm": 1}}


def test_disabled_optimizers_stay_off(tmp_path):
    model = skip_layer_norm(tmp_path / "m.onnx")
    Session(model, CPU_PROVIDER, options=PLAIN, optimized=tmp_path / "on.onnx")
    off = SessionOptions(disabled_optimizers=("SkipLayerNormFusion",))
    Session(model, CPU_PROVIDER, options=off, optimized=tmp_path / "off.onnx")
    assert op_types(tmp_path / "on.onnx") == {"SkipLayerNormalization": 1}
    assert op_types(tmp_path / "off.onnx") == {"Add": 1, "LayerNormalization": 1}


def test_op_types_refuses_noise(tmp_path):
    for content in (b"", b"\xff" * 40, probe_model()[:-30], b"\x3a\xff\x01"):
        path = tmp_path / "m.onnx"
        path.write_bytes(content)
        with pytest.raises(ProviderError, match="not an ONNX model"):
            op_types(path)


@pytest.mark.usefixtures("needs_openvino")
def test_openvino_runs_the_model(tmp_path):
    model = linear(tmp_path / "m.onnx")
    options = SessionOptions(precision="fp32")
    session = Session(model, OPENVINO_PROVIDER, options=options, threads=1, record_assignment=True)
    assert set(session.assignment()) == {OPENVINO_PROVIDER}
    expected = Session(model, CPU_PROVIDER, options=PLAIN, threads=1).run({"x": rows()})["y"]
    assert np.allclose(session.run({"x": rows()})["y"], expected, atol=1e-5)
    with pytest.raises(ProviderError, match="openvino has no device npu:7"):
        Session(model, OPENVINO_PROVIDER, options=options, device="npu:7")


@pytest.mark.usefixtures("needs_openvino")
def test_precision_reaches_openvino(tmp_path):
    if "amx_bf16" not in cpu_features() and "avx512_bf16" not in cpu_features():
        pytest.skip("this CPU computes no bfloat16")
    model = linear(tmp_path / "m.onnx")
    expected = Session(model, CPU_PROVIDER, options=PLAIN).run({"x": rows()})["y"]

    def error(precision: str) -> float:
        session = Session(model, OPENVINO_PROVIDER, options=SessionOptions(precision=precision))
        return float(np.linalg.norm(session.run({"x": rows()})["y"] - expected) / np.linalg.norm(expected))

    # float32 sums 64 products: sqrt(64) * 2**-24; bfloat16 keeps 8 bits of each factor: about 2**-9.
    assert error("fp32") < 8 * 2**-24
    assert 2**-11 < error("bf16") < 2**-7


@pytest.mark.usefixtures("needs_openvino")
def test_nodes_left_to_another_provider_are_named(tmp_path):
    model = determinant(tmp_path / "m.onnx")
    session = Session(model, OPENVINO_PROVIDER, options=SessionOptions(precision="fp32"), record_assignment=True)
    assert session.fallback() == ("determinant (Det)",)
    assert session.run({"x": 2 * np.eye(3, dtype=np.float32)})["y"] == pytest.approx(64.0)


def test_short_reason():
    raw = (
        "[ONNXRuntimeError] : 1 : FAIL : Failed to load library /root/lib/capi/libonnxruntime_providers_cuda.so with "
        "error: libcublasLt.so.13: cannot open\nshared object file"
    )
    assert short_reason(RuntimeError(raw)) == (
        "Failed to load library libonnxruntime_providers_cuda.so with error: libcublasLt.so.13: cannot open shared "
        "object file"
    )
    native = "[ONNXRuntimeError] : 1 : FAIL : /onnxruntime_src/core/session.cc:12 void f(int) no good"
    assert short_reason(RuntimeError(native)) == "no good"
    assert len(short_reason(RuntimeError("x" * 5000))) == 300
    assert short_reason(ValueError()) == "ValueError"


def test_physical_cores_obeys_the_affinity_mask(child_environment):
    if not hasattr(os, "sched_setaffinity"):
        pytest.skip("this system has no affinity masks")
    code = (
        "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
        "from runtimes.environment import physical_cores; print(physical_cores())"
    )
    done = subprocess.run([sys.executable, "-c", code], env=child_environment(), capture_output=True, check=True)
    assert done.stdout.split() == [b"1"]


LEAN = """
import importlib, os, pkgutil, sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "onnxruntime":
            print("telemetry", os.environ.get("ORT_DISABLE_TELEMETRY"))

sys.meta_path.insert(0, Watch())
import runtimes
for module in pkgutil.walk_packages(runtimes.__path__, "runtimes."):
    importlib.import_module(module.name)
heavy = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "optimum", "scipy", "requests", "urllib3"}
print("heavy", sorted(heavy & set(sys.modules)))
"""


@pytest.mark.parametrize(("given", "seen"), [(None, "1"), ("0", "0")])
def test_imports_are_lean_and_without_telemetry(child_environment, given, seen):
    environment = child_environment()
    environment.pop("ORT_DISABLE_TELEMETRY", None)
    if given is not None:
        environment["ORT_DISABLE_TELEMETRY"] = given
    done = subprocess.run([sys.executable, "-c", LEAN], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [f"telemetry {seen}", "heavy []"]


def test_a_session_needs_no_slow_import(child_environment, tmp_path):
    """What costs the first 100 ms of a process: nothing here may come to need it."""
    model = linear(tmp_path / "m.onnx")
    code = (
        "import sys\nfrom pathlib import Path\nfrom artifacts.manifest import SessionOptions\n"
        "from runtimes.session import Session\n"
        f"Session(Path({str(model)!r}), {CPU_PROVIDER!r}, options=SessionOptions())\n"
        "print(sorted({'psutil', 'platformdirs', 'subprocess', 'importlib.metadata', 'multiprocessing', 'asyncio',"
        " 'tokenizers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=child_environment(), capture_output=True, check=True)
    assert done.stdout.decode().strip() == "[]"
