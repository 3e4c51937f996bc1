from __future__ import annotations

import platform

import pytest

from artifacts.proof import Machine
from artifacts.strict import At, decode, encode
from artifacts.target import CPU_PROVIDER, CUDA_PROVIDER
from runtimes import fingerprint as module
from runtimes.environment import physical_cores
from runtimes.fingerprint import cpu_features, cpu_name, fingerprint, gpus, machine, provider_devices

CPUINFO = """processor\t: 0
model name\t: Intel(R) Xeon(R) Test
flags\t\t: fpu avx2 fma avx512f avx512_vnni amx_int8

processor\t: 1
model name\t: Another
"""


def test_machine_is_a_valid_proof():
    found = machine()
    assert found.cores == physical_cores()
    assert found.python == platform.python_version()
    assert found.memory_gb > 0.1
    assert found.cpu
    assert decode(Machine, encode(found), At("machine")) == found


def test_fingerprint_is_stable_and_sensitive(monkeypatch, tmp_path):
    first = fingerprint()
    assert first == fingerprint()
    assert len(first) == 64
    seen = {first}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    seen.add(fingerprint())
    monkeypatch.setattr(module, "physical_cores", lambda: 99)
    seen.add(fingerprint())
    monkeypatch.setattr(module, "_version", lambda name: f"{name} 9")
    seen.add(fingerprint())
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    monkeypatch.setattr(module, "_CPUINFO", tmp_path / "cpuinfo")
    seen.add(fingerprint())
    assert len(seen) == 5


def test_cpu_is_read_from_the_system(monkeypatch, tmp_path):
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(module, "_CPUINFO", path)
    path.write_text(CPUINFO)
    assert cpu_name() == "Intel(R) Xeon(R) Test"
    assert cpu_features() == ("avx2", "fma", "avx512f", "avx512_vnni", "amx_int8")
    path.write_text("processor : 0\nFeatures : fp asimd asimddp i8mm\n")
    assert cpu_features() == ("asimd", "asimddp", "i8mm")
    path.unlink()
    assert cpu_features() == ()
    assert cpu_name()


def test_gpus_are_read_from_the_driver(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "_NVIDIA", tmp_path / "absent")
    assert gpus() == ()
    for bus, text in (("0000:01:00.0", "Model: \t\t NVIDIA H200\nIRQ: 3\n"), ("0000:02:00.0", "IRQ: 4\n")):
        folder = tmp_path / "gpus" / bus
        folder.mkdir(parents=True)
        (folder / "information").write_text(text)
    monkeypatch.setattr(module, "_NVIDIA", tmp_path / "gpus")
    assert gpus() == ("NVIDIA H200", "NVIDIA GPU")
    assert provider_devices(CUDA_PROVIDER) == gpus()
    assert provider_devices(CPU_PROVIDER) == (cpu_name(),)


@pytest.mark.parametrize("name", ["numpy", "no-such-distribution"])
def test_versions_of_distributions(name):
    assert bool(module._version(name)) == (name == "numpy")
