"""hasten tune and hasten profile through the real command."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from real_command import ok, warm

from artifacts.bundle import Bundle


def test_profile_shows_the_kernels(tiny_bundle: Bundle) -> None:
    shown = ok(warm("profile", tiny_bundle.path, "--batch", "2", "--length", "16")).out
    assert "MatMulIntegerToFloat" in shown or "DynamicQuantizeMatMul" in shown
    assert "products of integers" in shown
    kernels = json.loads(ok(warm("profile", tiny_bundle.path, "--json", "--batch", "2", "--length", "16")).out)
    assert sum(kernel["operator"].startswith(("MatMulInteger", "DynamicQuantize")) for kernel in kernels) >= 1
    assert all(kernel["ms"] >= 0.0 for kernel in kernels)


def test_tune_keeps_what_it_finds(tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_CACHE_DIR", str(tmp_path))
    shown = ok(warm("tune", tiny_bundle.path, "--seconds", "0.01")).out
    assert re.search(r"^from now on: \d+ threads?, .*tokens a batch$", shown, re.MULTILINE), shown
    assert "Settings(" not in shown
    report = json.loads(ok(warm("tune", tiny_bundle.path, "--seconds", "0.01", "--json")).out)
    assert report["variant"] == "cpu-int8"
    assert report["settings"]["tuned"] is True
    assert "tuned" in ok(warm("run", tiny_bundle.path, "the cat", "--explain")).err


@pytest.mark.parametrize("command", ["tune", "profile"])
def test_what_is_no_bundle_is_refused(command: str, tmp_path: Path) -> None:
    done = warm(command, tmp_path)
    assert done.code != 0
    assert "Traceback" not in done.err
    assert done.err.count("\n") == 1
