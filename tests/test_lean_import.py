"""Who only loads pays only for loading: each look is a fresh process that tells what it imported."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from real_command import environment

from artifacts.bundle import Bundle

COMPILING = {"torch", "transformers", "onnx", "onnx_ir", "onnxscript", "optimum", "scipy", "requests"}
COMPILING |= {"huggingface_hub"}
HEAVY = {*COMPILING, "numpy", "onnxruntime", "tokenizers", "click", "rich", "zstandard", "psutil", "compiler", "passes"}
_TELL = "\nimport json, sys; print('\\n' + json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"


def imported(code: str, **changes: str) -> set[str]:
    """Top-level packages that a process has imported when ``code`` has run."""
    done = subprocess.run(
        [sys.executable, "-W", "error::ImportWarning", "-c", code + _TELL],
        capture_output=True,
        text=True,
        env=environment(**changes),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def of_command(*words: str) -> set[str]:
    code = f"import sys\nfrom hasten.cli import main\nsys.argv = ['hasten', *{words!r}]\n"
    code += f"try:\n    main({list(words)!r})\nexcept SystemExit as stop:\n    assert not stop.code, stop"
    return imported(code)


def test_importing_hasten_imports_nothing_heavy() -> None:
    assert imported("import hasten\ndir(hasten)") & HEAVY == set()


def test_the_name_of_an_error_costs_no_array_library() -> None:
    found = imported("import hasten\nhasten.HastenError, hasten.Target, hasten.open_bundle")
    assert found & {"numpy", *COMPILING} == set()


def test_loading_and_embedding_import_no_compiler(encoder_bundle: Bundle) -> None:
    code = f"import hasten\nmodel = hasten.load({str(encoder_bundle.path)!r})\nmodel.embed(['a cat'])\nmodel.explain()"
    found = imported(code)
    assert found & {*COMPILING, "compiler", "passes", "click", "rich"} == set()
    assert {"numpy", "onnxruntime", "tokenizers"} <= found


def test_telemetry_is_off_before_onnx_runtime_is_imported(encoder_bundle: Bundle) -> None:
    watch = """
import os, sys
os.environ.pop("ORT_DISABLE_TELEMETRY", None)
seen = []
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "onnxruntime":
            seen.append(os.environ.get("ORT_DISABLE_TELEMETRY"))
sys.meta_path.insert(0, Watch())
"""
    for use in (
        f"import hasten; hasten.load({str(encoder_bundle.path)!r}).embed(['a'])",
        "import hasten; hasten.compile_model",
        "import runtimes.session",
        "import runtimes.doctor; runtimes.doctor.diagnose(None)",
    ):
        imported(f"{watch}{use}\nassert set(seen) <= {{'1'}}, seen\nassert seen or 'doctor' in {use!r}")


@pytest.mark.parametrize("words", [("--help",), ("--version",), ("compile", "--help"), ("run", "--help")])
def test_help_starts_lean(words: tuple[str, ...]) -> None:
    assert of_command(*words) & {*COMPILING, "numpy", "onnxruntime"} == set()


@pytest.mark.parametrize("words", [("recipes",), ("passes",)])
def test_lists_need_no_torch(words: tuple[str, ...]) -> None:
    assert of_command(*words) & {"torch", "transformers", "optimum", "onnxruntime"} == set()


def test_running_a_bundle_imports_no_compiler(encoder_bundle: Bundle) -> None:
    assert of_command("run", str(encoder_bundle.path), "a cat") & COMPILING == set()
    assert of_command("inspect", str(encoder_bundle.path)) & {*COMPILING, "onnxruntime"} == set()
