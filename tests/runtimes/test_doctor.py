from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from session_graphs import linear

from runtimes import doctor
from runtimes.doctor import Check, Report, diagnose

ROOT = Path(__file__).resolve().parents[2]
CHILD = """
import dataclasses, json, sys
from pathlib import Path
from runtimes.doctor import diagnose
report = diagnose(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
checks = [dataclasses.astuple(check) for check in report.checks]
print(json.dumps([report.broken, checks, "onnxruntime" in sys.modules]))
"""


@pytest.fixture
def examine(child_environment, tmp_path_factory):
    """Checks as a child sees them that finds these folders first, run from a folder of no interest."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")

    def run(*folders: Path, arguments: tuple[str, ...] = (), cwd: Path | None = None):
        command = [sys.executable, "-c", CHILD, *arguments]
        done = subprocess.run(
            command, env=child_environment(*folders), capture_output=True, text=True, cwd=cwd or elsewhere
        )
        assert done.returncode == 0, done.stderr
        broken, checks, imported = json.loads(done.stdout)
        return broken, [Check(*check) for check in checks], imported

    return run


def install(folder: Path, name: str, package: str, version: str = "1.0", *, top_level: bool = True) -> Path:
    """A distribution as pip leaves it, with one package."""
    (folder / package).mkdir(parents=True)
    (folder / package / "__init__.py").write_text("")
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (info / "RECORD").write_text(f"{package}/__init__.py,,\n")
    if top_level:
        (info / "top_level.txt").write_text(f"{package}\n")
    return folder


def of(checks, name: str) -> Check:
    (found,) = [check for check in checks if check.name == name]
    return found


def test_this_installation():
    report = diagnose()
    names = [check.name for check in report.checks]
    assert names[:5] == ["python", "packages", "compile extra", "onnxruntime", "cpu"]
    assert [name for name in names if name.startswith("provider ")] == [
        "provider cpu",
        "provider openvino",
        "provider cuda",
        "provider tensorrt",
    ]
    assert not report.broken
    assert platform.python_version() in of(report.checks, "python").detail
    assert of(report.checks, "provider cpu").detail.startswith("works: ")
    assert all(check.status in ("ok", "warn", "broken") for check in report.checks)
    assert all("\n" not in check.detail for check in report.checks)


def test_absent_hardware_is_not_broken():
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("there is an NVIDIA driver here")
    check = of(diagnose().checks, "provider cuda")
    assert check.status == "ok"
    assert check.detail.startswith("absent: ")


@pytest.mark.parametrize("top_level", [True, False])
def test_two_onnxruntimes(tmp_path, examine, top_level):
    install(tmp_path, "onnxruntime-directml", "onnxruntime", "1.99.0", top_level=top_level)
    broken, checks, imported = examine(tmp_path)
    check = of(checks, "onnxruntime")
    assert broken
    assert not imported  # It may not import at all.
    assert check.status == "broken"
    assert "2 distributions overwrite each other's files: " in check.detail
    assert "onnxruntime-directml 1.99.0" in check.detail
    assert check.remedy.startswith("pip uninstall -y onnxruntime-directml onnxruntime-gpu && pip install onnxruntime")


def test_a_plugin_is_not_a_second_onnxruntime(tmp_path, examine):
    install(tmp_path, "onnxruntime-ep-other", "onnxruntime_ep_other")
    install(tmp_path, "onnxruntime-extensions", "onnxruntime_extensions")
    broken, checks, _ = examine(tmp_path)
    assert not broken
    assert of(checks, "onnxruntime").status == "ok"


def test_an_onnxruntime_that_does_not_import(tmp_path, examine):
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text("raise ImportError('half of it is missing')")
    broken, checks, _ = examine(tmp_path)
    assert broken
    assert "half of it is missing" in of(checks, "onnxruntime").detail
    assert "pip install --force-reinstall" in of(checks, "onnxruntime").remedy


@pytest.mark.parametrize("name", ["artifacts", "compiler", "passes"])
def test_a_folder_that_shadows_one_of_ours(tmp_path, examine, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the wrong package')")
    broken, checks, imported = examine(tmp_path)
    check = of(checks, "packages")
    assert (broken, imported, check.status) == (True, False, "broken")
    assert check.detail == f"the package {name!r} comes from {tmp_path / name}, not from {ROOT}"
    assert check.remedy.startswith(f"Take {tmp_path} off PYTHONPATH")


def test_a_folder_in_the_working_directory(tmp_path, examine):
    """`python -c` looks there first."""
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts" / "__init__.py").write_text("")
    broken, checks, _ = examine(cwd=tmp_path)
    assert broken
    assert of(checks, "packages").remedy.startswith("Run from another folder, or rename ./artifacts")


def test_a_plain_folder_is_no_package(tmp_path, examine):
    """A folder of build artifacts without __init__.py hides nothing."""
    (tmp_path / "artifacts").mkdir()
    broken, checks, _ = examine(tmp_path, cwd=tmp_path)
    assert not broken
    assert of(checks, "packages").status == "ok"


def test_another_distribution_with_a_package_of_that_name(tmp_path, examine, monkeypatch):
    install(tmp_path, "Other-Compiler", "compiler")
    broken, checks, _ = examine(tmp_path)
    packages = [check for check in checks if check.name == "packages"]
    assert broken
    assert any("Other-Compiler also installs a package named 'compiler'" in check.detail for check in packages)
    assert any("pip uninstall Other-Compiler" in check.remedy for check in packages)


def test_the_compile_extra_is_looked_for_and_not_imported(monkeypatch, examine):
    code = "import sys; from runtimes.doctor import _compile_extra; _compile_extra(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    real = doctor.find_spec
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if name == "torch" else real(name))
    check = doctor._compile_extra()
    assert (check.status, check.remedy) == ("warn", "pip install 'hasten[compile]'")
    assert "torch missing" in check.detail


def test_old_python_and_weak_cpu(monkeypatch):
    monkeypatch.setattr(doctor, "_MINIMUM_PYTHON", (9, 0))
    assert doctor._python().status == "broken"
    monkeypatch.setattr("runtimes.fingerprint.cpu_features", lambda: ("avx2",))
    assert doctor._cpu().status == "warn"
    assert "no int8 dot product" in doctor._cpu().detail


def test_a_gpu_without_its_libraries(monkeypatch):
    monkeypatch.setattr("runtimes.fingerprint.gpus", lambda: ("NVIDIA H200",))
    monkeypatch.setattr(doctor, "_mapped_libraries", lambda: ("libcudart.so.13", "libcublas.so.13.1"))
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    check = doctor._cuda_libraries("13.0")
    assert check.status == "warn"
    assert check.detail.endswith("missing: libcublasLt, libcufft, libcurand, libcudnn")
    assert check.remedy
    monkeypatch.setattr("ctypes.util.find_library", lambda name: f"lib{name}.so")
    assert doctor._cuda_libraries("13.0").status == "ok"


def test_a_bundle(make_bundle, recipe):
    bundle = make_bundle(
        {
            "fast": recipe(linear),
            "new": recipe(linear, status="unproven"),
            "bad": recipe(linear, status="refused"),
        }
    )
    report = diagnose(bundle.path)
    assert not report.broken
    assert bundle.digest in of(report.checks, "bundle").detail
    assert of(report.checks, "decision").detail == "fast on cpu: the only proven candidate"
    assert of(report.checks, "candidate new on cpu").detail.startswith("untried: unproven here")
    assert [of(report.checks, f"proof of {name}").status for name in ("fast", "new", "bad")] == ["ok", "warn", "warn"]
    assert "hasten prove" in of(report.checks, "proof of new").remedy


def test_a_damaged_bundle_is_broken(make_bundle, recipe, tmp_path):
    bundle = make_bundle({"fast": recipe(linear)})
    with (bundle.path / "fast.onnx").open("r+b") as file:
        file.write(b"X")
    check = of(diagnose(bundle.path).checks, "bundle")
    assert check.status == "broken"
    assert "fast.onnx" in check.detail
    assert of(diagnose(tmp_path / "nothing").checks, "bundle").status == "broken"


def test_a_bundle_that_nothing_runs_is_broken(make_bundle, recipe):
    bundle = make_bundle({"bad": recipe(linear, status="refused")})
    report = diagnose(bundle.path)
    assert report.broken
    assert "the proof refuses it" in of(report.checks, "decision").detail


def test_a_bundle_is_not_looked_at_in_a_broken_installation(tmp_path, examine, make_bundle, recipe):
    bundle = make_bundle({"fast": recipe(linear)})
    install(tmp_path / "site", "onnxruntime", "onnxruntime", "1.99.0")
    _, checks, _ = examine(tmp_path / "site", arguments=(str(bundle.path),))
    assert of(checks, "bundle").status == "warn"


def test_report_is_broken_by_one_check():
    fine = Check("a", "ok", "")
    assert not Report((fine, Check("b", "warn", ""))).broken
    assert Report((fine, Check("b", "broken", ""))).broken
