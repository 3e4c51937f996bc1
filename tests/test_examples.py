"""The examples run as a user runs them. (examples/my_pass.py: tests/passes/test_pipeline.py.)"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from real_command import environment

from artifacts.bundle import Bundle

ROOT = Path(__file__).resolve().parent.parent


def example(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(ROOT / "examples" / name), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=120)


def test_semantic_search(encoder_bundle: Bundle) -> None:
    done = example("semantic_search.py", str(encoder_bundle.path))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "Why does dough grow?"
    assert len(lines) == 6
    assert all(-1.0 <= float(line.split()[0]) <= 1.0 for line in lines[1::2])
    done = example("semantic_search.py", str(encoder_bundle.path), "What do glaciers do?")
    assert done.stdout.splitlines()[0] == "What do glaciers do?"


def test_semantic_search_without_a_bundle_says_how() -> None:
    done = example("semantic_search.py")
    assert done.returncode == 1
    assert "semantic_search.py BUNDLE" in done.stderr


def test_every_example_is_tested() -> None:
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == {"my_pass.py", "semantic_search.py"}
