"""The order of the rooms, held by import-linter."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from real_command import environment

ROOT = Path(__file__).resolve().parent.parent


def test_the_import_contracts_hold() -> None:
    pytest.importorskip("importlinter")
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 kept, 0 broken" in done.stdout
