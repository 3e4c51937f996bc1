"""A compile that is killed or interrupted: what stood at OUT stands there still, or the complete new bundle does."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from real_command import TIMEOUT, assert_refused, cold, command, environment, listing, warm

from artifacts.bundle import open_bundle


@pytest.fixture
def place(tmp_path: Path, mlp_bundle: Path) -> Path:
    """A folder with an old bundle in it."""
    shutil.copytree(mlp_bundle, tmp_path / "place" / "out")
    return tmp_path / "place"


def staging(place: Path) -> list[Path]:
    return [path for path in place.iterdir() if path.name.endswith((".hasten-tmp", ".hasten-old"))]


def start(place: Path, mlp: Path, *options: str) -> subprocess.Popen[str]:
    arguments = [*command(), "compile", str(mlp), "-o", "out", "--recipe", "safe", "--name", "new", *options]
    return subprocess.Popen(
        arguments, cwd=place, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(process: subprocess.Popen[str], place: Path, moment: str) -> None:
    """Until the staging folder is there, until it holds a file of that kind, or until progress tells of a stage.

    The moment of manifest.json lasts microseconds and may pass unseen: then the compile is done, and the test goes on
    with what it left. The moments of a commit are met one by one in tests/artifacts/test_crash.py.
    """
    if moment.endswith("…"):
        assert process.stderr is not None
        for line in process.stderr:
            if moment[:-1] in line:
                return
        pytest.fail(f"the compile never told of {moment}")
    deadline = time.monotonic() + TIMEOUT
    while process.poll() is None and time.monotonic() < deadline:
        if any(any(path.glob(moment)) if moment else True for path in staging(place)):
            return
        time.sleep(0.002)
    if moment != "manifest.json" or process.returncode != 0:
        pytest.fail(f"{moment} was never there; exit code {process.returncode}")


MOMENTS = [
    "",
    "reading…",
    "exporting…",
    "running the original…",
    "weights/*.bin",
    "clean…",
    "proving…",
    "manifest.json",
]


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed(place: Path, mlp: Path, moment: str) -> None:
    before = listing(place)
    process = start(place, mlp)
    try:
        wait_for(process, place, moment)
    finally:
        process.kill()
        process.communicate(timeout=TIMEOUT)
    bundle = open_bundle(place / "out")
    assert bundle.manifest.name in ("mlp", "new")
    if bundle.manifest.name == "mlp":
        assert {name: data for name, data in listing(place).items() if not name.startswith(".")} == before
    left = staging(place)
    done = warm("compile", mlp, "-o", place / "out", "--recipe", "reference", "--quiet", "--name", "next")
    assert done.code == 0, done.err
    assert open_bundle(place / "out").manifest.name == "next"
    assert [path.name for path in place.iterdir()] == ["out"], left


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "number"),
    [
        *((moment, signal.SIGINT) for moment in ("", "exporting…", "running the original…", "clean…", "proving…")),
        ("clean…", signal.SIGTERM),
    ],
)
def test_interrupted(place: Path, mlp: Path, moment: str, number: signal.Signals) -> None:
    before = listing(place)
    process = start(place, mlp)
    try:
        wait_for(process, place, moment)
        process.send_signal(number)
        _, errors = process.communicate(timeout=TIMEOUT)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert errors.splitlines()[-1] == "hasten: interrupted; nothing was left half-written"
    assert errors.count("hasten: ") == 1
    assert "Traceback" not in errors
    assert listing(place) == before


def test_interrupted_while_importing(place: Path, mlp: Path) -> None:
    """Before the command begins there is nothing to tidy; still no traceback."""
    before = listing(place)
    process = start(place, mlp, "--quiet")
    maps = Path(f"/proc/{process.pid}/maps")
    if not maps.exists():
        pytest.skip("what a process has imported is read from /proc")
    deadline = time.monotonic() + TIMEOUT
    while "numpy" not in maps.read_text() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130, errors
    assert errors.strip() == "hasten: interrupted; nothing was left half-written"
    assert listing(place) == before


def test_two_at_once(place: Path, mlp: Path) -> None:
    """The later one wins; neither takes the staging folder of the other for an abandoned one."""
    first = start(place, mlp, "--quiet")
    second = start(place, mlp, "--quiet")
    for process in (first, second):
        out, errors = process.communicate(timeout=TIMEOUT)
        assert (process.returncode, out, errors) == (0, "", "")
    assert open_bundle(place / "out").manifest.name == "new"
    assert [path.name for path in place.iterdir()] == ["out"]


def test_a_failed_compile_leaves_the_old_bundle(place: Path, mlp: Path) -> None:
    before = listing(place)
    done = cold("compile", mlp, "-o", "out", "--plan", "gone", cwd=place)
    assert_refused(done, 2, "no plan at gone")
    done = cold("compile", mlp.with_name("gone.onnx"), "-o", "out", "--quiet", cwd=place)
    assert_refused(done, 3, "no such model")
    assert listing(place) == before
