from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from artifacts.errors import UsageError
from artifacts.manifest import SessionOptions
from artifacts.target import CPU_PROVIDER, CUDA_PROVIDER, OPENVINO_PROVIDER, TARGETS, TENSORRT_PROVIDER
from runtimes import providers
from runtimes.client import Worker
from runtimes.providers import (
    EXECUTION_PROVIDERS,
    Probe,
    available,
    built_in,
    find,
    missing_library,
    parse_device,
    probe,
    translate,
    why_not,
)


def test_the_table_covers_every_target():
    known = {provider.name: provider for provider in EXECUTION_PROVIDERS}
    for target in TARGETS:
        assert set(target.providers) <= set(known)
        assert target.device in known[target.provider].devices


def test_find_by_both_names():
    assert find("openvino") is find(OPENVINO_PROVIDER)
    with pytest.raises(UsageError, match="cpu, openvino, cuda, tensorrt"):
        find("magic")


def test_devices():
    assert [parse_device(name) for name in ("cpu", "cuda", "cuda:1", "npu:12")] == [
        ("cpu", 0),
        ("cuda", 0),
        ("cuda", 1),
        ("npu", 12),
    ]
    for wrong in ("", "cuda:", "cuda:-1", "cuda:x", "tpu", "cuda:1:2", "CPU", "cuda:99999", "cuda:²"):
        with pytest.raises(UsageError, match="unknown device"):
            parse_device(wrong)


@pytest.mark.parametrize(
    ("provider", "precision", "device", "expected"),
    [
        (CPU_PROVIDER, "fp32", "cpu", {}),
        (CUDA_PROVIDER, "", "cuda", {"device_id": "0"}),
        (CUDA_PROVIDER, "fp32", "cuda:2", {"device_id": "2", "use_tf32": "0"}),
        (CUDA_PROVIDER, "fp16", "cuda", {"device_id": "0"}),
        (TENSORRT_PROVIDER, "fp16", "cuda:1", {"device_id": "1", "trt_fp16_enable": "1"}),
        (TENSORRT_PROVIDER, "bf16", "cuda", {"device_id": "0", "trt_bf16_enable": "1"}),
        (TENSORRT_PROVIDER, "fp32", "cuda", {"device_id": "0"}),
    ],
)
def test_translate(provider, precision, device, expected):
    assert translate(SessionOptions(precision=precision), provider, device=device, threads=4) == expected


@pytest.mark.parametrize(("precision", "hint"), [("fp32", "f32"), ("bf16", "bf16"), ("fp16", "f16"), ("", None)])
def test_translate_for_openvino(precision, hint):
    told = translate(SessionOptions(precision=precision), OPENVINO_PROVIDER, threads=3)
    config = json.loads(told["load_config"])["CPU"]
    assert config.get("INFERENCE_PRECISION_HINT") == hint
    assert config["INFERENCE_NUM_THREADS"] == "3"
    on_gpu = json.loads(translate(SessionOptions(), OPENVINO_PROVIDER, device="gpu", threads=3)["load_config"])
    assert on_gpu == {"GPU": {"PERFORMANCE_HINT": "LATENCY"}}


def test_the_cpu_provider_works():
    found = probe("cpu")
    assert found == Probe(CPU_PROVIDER, True, "", found.devices)
    assert len(found.devices) == 1


@pytest.mark.usefixtures("needs_openvino")
def test_the_openvino_plugin_works():
    found = probe("openvino")
    assert (found.ok, found.reason) == (True, "")
    assert found.devices[0].startswith("CPU")


def test_a_listed_provider_without_its_hardware_does_not_work():
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("CUDA may work here")
    for found in (probe("cuda"), probe("tensorrt")):
        assert not found.ok
        assert found.reason
        assert "\n" not in found.reason
        assert "/" not in found.reason


def test_all_are_probed():
    found = available()
    assert [one.provider for one in found] == [one.name for one in EXECUTION_PROVIDERS]
    assert found[0].ok
    assert all(one.ok != bool(one.reason) for one in found)


def test_a_provider_that_is_not_built_in_needs_no_child(monkeypatch):
    monkeypatch.setattr(providers.ort, "get_available_providers", lambda: [CPU_PROVIDER])
    monkeypatch.setattr(subprocess, "Popen", None)
    assert not built_in(CUDA_PROVIDER)
    assert probe("cuda") == Probe(CUDA_PROVIDER, False, "this onnxruntime is built without cuda", ())


def test_a_missing_plugin_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("runtimes.environment.find_spec", lambda name: None)
    monkeypatch.setattr("runtimes.environment.ep_devices", lambda name: ())
    assert not built_in(OPENVINO_PROVIDER)
    assert why_not(OPENVINO_PROVIDER) == ("the OpenVINO plugin is not installed. pip install onnxruntime-ep-openvino")


def test_a_provider_that_computes_nonsense_fails(monkeypatch):
    monkeypatch.setattr(Worker, "run", lambda self, feeds: {"y": feeds["x"]})
    assert probe("cpu") == Probe(CPU_PROVIDER, False, "cpu computes wrong results here", ())


def test_a_provider_that_leaves_nodes_to_another_fails(monkeypatch):
    monkeypatch.setattr(Worker, "fallback", lambda self: ("product (MatMul)",))
    assert probe("cpu").reason == "cpu leaves product (MatMul) to another provider"


def test_a_slow_provider_is_given_up():
    assert "was killed" in probe("cpu", timeout=0.001).reason


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_missing_libraries_are_named(tmp_path):
    (tmp_path / "none.c").write_text("int none(void) { return 0; }\n")
    (tmp_path / "user.c").write_text("int none(void); int user(void) { return none(); }\n")
    compile_ = ["cc", "-shared", "-fPIC", "-o"]
    subprocess.run([*compile_, tmp_path / "libnone.so", tmp_path / "none.c"], check=True)
    subprocess.run([*compile_, tmp_path / "libuser.so", tmp_path / "user.c", f"-L{tmp_path}", "-lnone"], check=True)
    assert missing_library(tmp_path / "libnone.so") == ""
    (tmp_path / "libnone.so").unlink()
    assert missing_library(tmp_path / "libuser.so") == "libnone.so"
    assert missing_library(tmp_path / "absent.so") == ""
