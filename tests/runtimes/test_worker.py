from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from session_graphs import determinant, endless, linear, skip_layer_norm

from artifacts.errors import ProviderError, UsageError
from artifacts.manifest import SessionOptions, TensorSpec
from artifacts.target import CPU_PROVIDER, CUDA_PROVIDER, OPENVINO_PROVIDER
from runtimes.client import Ratio, Timings, Worker, interleave
from runtimes.session import Session

FOREVER = {"turns": np.array(10**15)}


def gone(pid: int, seconds: float = 20.0) -> bool:
    """Whether the process ends within that time; a zombie has ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def rows(count: int = 4) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((count, 64)).astype(np.float32)


def test_a_child_computes_what_a_session_here_does(tmp_path):
    model = linear(tmp_path / "m.onnx", ballast=1)
    session = Session(model, CPU_PROVIDER, options=SessionOptions(), threads=1)
    with Worker(model, CPU_PROVIDER, threads=1) as worker:
        assert worker.pid != os.getpid()
        assert worker.inputs == session.inputs
        assert worker.outputs == (TensorSpec("y", "float32", ("n", 64)),)
        for count in (1, 7):
            assert np.array_equal(worker.run({"x": rows(count)})["y"], session.run({"x": rows(count)})["y"])
        assert set(worker.assignment()) == {CPU_PROVIDER}
        assert worker.fallback() == ()
        assert worker.devices()
    assert gone(worker.pid)


def test_time_drops_the_first_call(tmp_path):
    with Worker(linear(tmp_path / "m.onnx"), CPU_PROVIDER) as worker:
        assert len(worker.time({"x": rows()}, repeats=4)) == 4
        assert len(worker.time({"x": rows()}, seconds=0.0)) == 2
        assert all(seconds > 0.0 for seconds in worker.time({"x": rows()}, seconds=0.02))
        for wrong in ({}, {"repeats": 0}, {"seconds": -1.0}, {"seconds": 1.0, "repeats": 1}):
            with pytest.raises(UsageError):
                worker.time({"x": rows()}, **wrong)


def test_options_reach_the_child(tmp_path):
    model = skip_layer_norm(tmp_path / "m.onnx")
    off = SessionOptions(disabled_optimizers=("SkipLayerNormFusion",))
    with Worker(model, CPU_PROVIDER) as fused, Worker(model, CPU_PROVIDER, options=off) as plain:
        assert fused.optimized() == {"SkipLayerNormalization": 1}
        assert plain.optimized() == {"Add": 1, "LayerNormalization": 1}


def test_a_refused_request_leaves_the_child_alive(tmp_path):
    with Worker(linear(tmp_path / "m.onnx"), CPU_PROVIDER) as worker:
        with pytest.raises(ProviderError, match="cannot run the model"):
            worker.run({"x": np.zeros((2, 3), np.float32)})
        with pytest.raises(ProviderError, match="Object arrays"):
            worker.run({"x": np.array([{}], object)})
        assert worker.run({"x": rows()})["y"].shape == (4, 64)


def test_a_model_that_does_not_load(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"no model")
    with pytest.raises(ProviderError, match=r"cpu cannot load m\.onnx"):
        Worker(tmp_path / "m.onnx", CPU_PROVIDER)


def test_a_hang_is_killed(tmp_path):
    with Worker(endless(tmp_path / "m.onnx"), CPU_PROVIDER) as worker:
        assert worker.run({"turns": np.array(5)})["sum"] == 10
        worker.timeout = 0.5
        with pytest.raises(ProviderError, match=r"did not finish running the model in 0\.5 s and was killed"):
            worker.run(FOREVER)
        assert gone(worker.pid)
        with pytest.raises(ProviderError, match="the child died with signal 9"):
            worker.run({"turns": np.array(5)})


def test_a_crash_is_told(tmp_path):
    with Worker(linear(tmp_path / "m.onnx"), CPU_PROVIDER) as worker:
        os.kill(worker.pid, signal.SIGSEGV)
        with pytest.raises(ProviderError, match=r"the child died with signal 11 \(SIGSEGV\) while running the model"):
            worker.run({"x": rows()})
        with pytest.raises(ProviderError, match="died"):
            worker.assignment()


def test_closing_twice_and_running_afterwards(tmp_path):
    worker = Worker(linear(tmp_path / "m.onnx"), CPU_PROVIDER)
    worker.close()
    worker.close()
    with pytest.raises(ProviderError):
        worker.run({"x": rows()})


def test_a_restart_loads_the_same_in_a_new_process(tmp_path):
    off = SessionOptions(disabled_optimizers=("SkipLayerNormFusion",))
    with Worker(skip_layer_norm(tmp_path / "m.onnx"), CPU_PROVIDER, options=off, threads=1) as worker:
        before, inputs, outputs = worker.pid, worker.inputs, worker.outputs
        worker.restart()
        assert gone(before)
        assert worker.pid != before
        assert (worker.inputs, worker.outputs) == (inputs, outputs)
        assert worker.optimized() == {"Add": 1, "LayerNormalization": 1}
    assert gone(worker.pid)


def test_a_restart_of_what_no_longer_loads(tmp_path):
    with Worker(linear(tmp_path / "m.onnx"), CPU_PROVIDER) as worker:
        (tmp_path / "m.onnx").unlink()
        with pytest.raises(ProviderError, match="cannot load"):
            worker.restart()
        assert gone(worker.pid)


PARENT = """
import sys
from pathlib import Path
import numpy as np
from runtimes.client import Worker
worker = Worker(Path(sys.argv[1]), "CPUExecutionProvider")
print(worker.pid, flush=True)
worker.run({"turns": np.array(10**15)})
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for the process in /proc")
def test_a_killed_parent_leaves_no_child(tmp_path, child_environment):
    model = endless(tmp_path / "m.onnx")
    command = [sys.executable, "-c", PARENT, str(model)]
    environment = child_environment(TMPDIR=str(tmp_path))
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as parent:
        child = int(parent.stdout.readline())
        time.sleep(0.3)  # It is inside the loop now: native code that will not return.
        assert list(tmp_path.glob("hasten-worker-*"))
        parent.kill()
    assert gone(child)
    assert not list(tmp_path.glob("hasten-worker-*"))


NOISY = """
import os
from runtimes import worker
answer = worker.Server.answer
def noisy(self, request):
    os.write(1, b"native noise")
    print("python noise")
    return answer(self, request)
worker.Server.answer = noisy
worker.main()
"""


def test_prints_do_not_corrupt_the_answers(tmp_path, child_environment):
    load = {
        "op": "load",
        "model": str(linear(tmp_path / "m.onnx")),
        "provider": CPU_PROVIDER,
        "device": "cpu",
        "threads": 1,
        "record": False,
        "options": {"optimization_level": "all", "disabled_optimizers": [], "precision": ""},
        "limit": 60,
    }
    answers = []
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", NOISY], env=child_environment(), stdin=pipe, stdout=pipe, stderr=pipe, text=True
    ) as child:
        for request in (load, {"op": "unknown", "limit": 60}):
            child.stdin.write(json.dumps(request) + "\n")
            child.stdin.flush()
            answers.append(json.loads(child.stdout.readline()))
        rest, noise = child.communicate(json.dumps({"op": "exit"}) + "\n", timeout=60)
    assert ([answer["ok"] for answer in answers], rest) == ([True, False], "")
    assert "native noise" in noise
    assert "python noise" in noise


def test_the_module_is_a_program(child_environment):
    """It ends with its stdin."""
    command = [sys.executable, "-m", "runtimes.worker"]
    done = subprocess.run(command, env=child_environment(), stdin=subprocess.DEVNULL, timeout=60, capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"")


def test_a_folder_in_the_working_directory_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "__init__.py").write_text("raise RuntimeError('the wrong package')")
    model = linear(tmp_path / "m.onnx")
    monkeypatch.chdir(tmp_path)
    with Worker(Path(model.name), CPU_PROVIDER) as worker:
        assert worker.run({"x": rows()})["y"].shape == (4, 64)


def test_a_provider_without_its_hardware():
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("CUDA may work here")
    with pytest.raises(ProviderError, match="cuda"):
        Worker(Path("m.onnx"), CUDA_PROVIDER)


def test_interleaved_timing_of_two_workers(tmp_path):
    fast, slow = linear(tmp_path / "fast.onnx"), linear(tmp_path / "slow.onnx", ballast=8)
    with Worker(slow, CPU_PROVIDER) as base, Worker(fast, CPU_PROVIDER) as candidate:
        shapes = [{"x": rows(8)}, {"x": rows(32)}]
        timings = interleave({"base": base, "candidate": candidate}, shapes, rounds=3, seconds=0.01)
    assert {name: [len(blocks) for blocks in shapes] for name, shapes in timings.rounds.items()} == {
        "base": [3, 3],
        "candidate": [3, 3],
    }
    ratio = timings.ratio("base", "candidate")
    # 8 products of 512 x 512 more than one of 64 x 64: over a hundred times the work.
    assert ratio.median > 2.0
    assert ratio.low <= ratio.median <= ratio.high
    assert timings.ms("base", 1) > timings.ms("candidate", 1)


def test_ratio_is_taken_within_rounds_and_over_shapes():
    timings = Timings({"old": ((8.0, 16.0, 8.0), (1.0, 2.0, 4.0)), "new": ((4.0, 8.0, 4.0), (2.0, 4.0, 2.0))})
    assert timings.ms("old", 0) == 8.0
    assert timings.ratio("old", "new", 0) == Ratio(2.0, 2.0, 2.0)
    assert timings.ratio("old", "new", 1) == Ratio(0.5, 0.5, 1.25)
    both = timings.ratio("old", "new")
    assert (both.median, both.low, both.high) == pytest.approx((1.0, 1.0, 1.5))
    assert Timings({"a": ((3.0,),), "b": ((2.0,),)}).ratio("a", "b") == Ratio(1.5, 1.5, 1.5)


def test_interleave_needs_something_to_time():
    for workers, shapes, rounds in (({}, [{}], 1), ({"a": None}, [], 1), ({"a": None}, [{}], 0)):
        with pytest.raises(UsageError):
            interleave(workers, shapes, rounds=rounds)


@pytest.mark.usefixtures("needs_openvino")
def test_two_providers_at_once(tmp_path):
    model = linear(tmp_path / "m.onnx")
    options = SessionOptions(precision="fp32")
    with Worker(model, CPU_PROVIDER) as cpu, Worker(model, OPENVINO_PROVIDER, options=options) as openvino:
        timings = interleave({"cpu": cpu, "openvino": openvino}, [{"x": rows()}], rounds=2, seconds=0.01)
        assert np.allclose(cpu.run({"x": rows()})["y"], openvino.run({"x": rows()})["y"], atol=1e-5)
        assert set(openvino.assignment()) == {OPENVINO_PROVIDER}
    assert timings.ratio("cpu", "openvino").median > 0.0


@pytest.mark.usefixtures("needs_openvino")
def test_fallback_is_named_through_the_child(tmp_path):
    with Worker(determinant(tmp_path / "m.onnx"), OPENVINO_PROVIDER) as worker:
        assert worker.fallback() == ("determinant (Det)",)
