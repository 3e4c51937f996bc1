"""Writers that are killed, and disks that are full, read-only or gone."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from bundle_builders import a_manifest, a_proof, leftovers, names, stage, tree, write_bundle

from artifacts import swap
from artifacts.bundle import BundleWriter, WeightStore, open_bundle
from artifacts.errors import OutputError
from artifacts.pack import pack, unpack

HERE = Path(__file__).parent
PATHS = os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)])


def kill(folder: Path, action: str, schedule: str) -> dict[str, dict[str, int]]:
    environment = {**os.environ, "PYTHONPATH": PATHS}
    command = [sys.executable, str(HERE / "killer.py"), str(folder), action, schedule]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def fast_folder(tmp_path):
    """A folder in memory where there is one: killing a thousand times is all renaming and deleting."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


ACTIONS = ("commit", "first", "prove", "unpack", "pack")


@pytest.mark.parametrize(
    ("action", "schedule"),
    [
        *((action, "lines") for action in ACTIONS),
        *((action, "interrupts") for action in (*ACTIONS, "without-exchange")),
    ],
)
def test_w1_killed_or_interrupted(fast_folder, action, schedule):
    found = kill(fast_folder, action, schedule)
    before = "nothing" if action == "first" else "old"
    assert set(found["then"]) == {before, "new"}
    assert found["after"] == found["then"]
    assert found["then"][before] > 20
    assert found["left"] == []


def test_w1_killed_without_exchange(fast_folder):
    found = kill(fast_folder, "without-exchange", "lines")
    assert {"old", "new"} <= set(found["then"]) <= {"old", "new", "nothing"}
    assert set(found["after"]) == {"old", "new"}


def test_w1_killed_at_random_times(fast_folder):
    found = kill(fast_folder, "commit", "times")
    assert set(found["then"]) <= {"old", "new"}
    assert sum(found["then"].values()) == 60


def stale(out: Path, pid: int, kind: str = "tmp") -> Path:
    return out.with_name(f".{out.name}.{pid}-{'0' * 16}.hasten-{kind}")


def a_dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_the_next_writer_deletes_only_what_the_dead_left(tmp_path):
    out = tmp_path / "out"
    dead = stale(out, a_dead_pid())
    ours_before = stale(out, os.getpid())
    of_another_place = stale(tmp_path / "other", a_dead_pid())
    not_ours = tmp_path / ".out.hasten-tmp"
    living = stale(out, os.getppid())
    for folder in (dead, ours_before, of_another_place, not_ours, living):
        (folder / "weights").mkdir(parents=True)
    link = out.with_name(f".out.{a_dead_pid()}-{'1' * 16}.hasten-tmp")
    link.symlink_to(not_ours)
    with BundleWriter(out) as writer:
        assert not dead.exists()
        assert not ours_before.exists()
        for folder in (of_another_place, not_ours, living):
            assert (folder / "weights").exists()
        with BundleWriter(out):
            assert writer.staging.exists(), "a writer at work in this process is not swept"
    old = time.time() - 2 * 3600
    os.utime(living, (old, old))
    with BundleWriter(out):
        assert not living.exists(), "process numbers return; its lock is gone and it is old"
    assert (not_ours / "weights").exists()


def test_a_locked_staging_folder_is_kept_though_its_process_is_unknown_here(tmp_path):
    out = tmp_path / "out"
    foreign = stale(out, a_dead_pid())
    foreign.mkdir()
    lock = swap._lock(foreign)
    with BundleWriter(out):
        assert foreign.exists()
    os.close(lock)
    with BundleWriter(out):
        assert not foreign.exists()


def test_what_was_moved_aside_is_put_back(tmp_path):
    out = tmp_path / "out"
    old = write_bundle(out)
    out.rename(stale(out, a_dead_pid(), "old"))
    with BundleWriter(out):
        assert open_bundle(out) == old
    assert leftovers(out) == []


def test_names_that_leave_no_room_for_more(tmp_path):
    out = tmp_path / ("a" * 255)
    for name in ("old", "new"):
        bundle = write_bundle(out, name)
        assert open_bundle(out) == bundle
    killed = swap._staging_path(out)
    killed = killed.with_name(killed.name.replace(f".{os.getpid()}-", f".{a_dead_pid()}-"))
    killed.mkdir()
    with BundleWriter(out):
        assert not killed.exists()
    with swap.staged_file(tmp_path / ("b" * 255)) as file:
        file.write(b"whole")
    assert {path.name[:1] for path in tmp_path.iterdir()} == {"a", "b"}


def test_without_exchange(tmp_path, monkeypatch):
    out = tmp_path / "out"
    write_bundle(out)
    monkeypatch.setattr(swap, "_exchange", lambda one, other: False)
    new = write_bundle(out, "new")
    assert open_bundle(out) == new
    assert leftovers(out) == []


def test_exchange_is_there_on_linux(tmp_path):
    if sys.platform != "linux":
        pytest.skip("renameat2 is of Linux")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").write_text("file")
    assert swap._exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a").read_text() == "file"
    with pytest.raises(FileNotFoundError):
        swap._exchange(tmp_path / "a", tmp_path / "absent")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=400k", "none", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("may not mount a small disk here; test_w2_file_limit stands in")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_w2_disk_full(small_disk):
    out = small_disk / "out"
    old = write_bundle(out)
    before = tree(small_disk)
    free = shutil.disk_usage(small_disk).free
    remedies = []
    for room in range(4096, free, 8192):
        filler = small_disk / "filler"
        filler.write_bytes(bytes(free - room))
        try:
            bundle = write_bundle(out, "new")
        except OutputError as error:
            remedies.append(error.remedy)
            assert open_bundle(out) == old
            filler.unlink()
            assert tree(small_disk) == before
        else:
            assert open_bundle(out) == bundle
            break
    else:
        pytest.fail("it never fitted")
    assert len(remedies) > 3
    assert all("free space" in remedy for remedy in remedies)


def test_w2_disk_full_while_others_write(small_disk):
    out = small_disk / "out"

    def others():
        with BundleWriter(out) as writer:
            (writer.staging / "cpu.onnx").write_bytes(bytes(1 << 20))

    with pytest.raises(OutputError, match="No space left"):
        others()
    assert names(small_disk) == []


def test_w2_disk_full_when_packing(small_disk, tmp_path):
    write_bundle(tmp_path / "big", os.urandom(8).hex())
    (tmp_path / "noise").mkdir()
    with BundleWriter(tmp_path / "noise/out") as writer:
        stage(writer, "one")
        store = WeightStore(writer.staging / "weights")
        weights = (store.put(os.urandom(600_000)).path,)
        writer.commit(a_manifest(weights), a_proof(), ("report.html",))
    pack(tmp_path / "noise/out", tmp_path / "noise.hasten")
    with pytest.raises(OutputError, match="free space"):
        pack(tmp_path / "noise/out", small_disk / "a.hasten")
    with pytest.raises(OutputError, match="free space"):
        unpack(tmp_path / "noise.hasten", small_disk / "out")
    assert names(small_disk) == []


def test_w2_file_limit(tmp_path):
    """The system refuses to let files grow, as a quota does; needs no root."""
    out = tmp_path / "out"
    old = write_bundle(out)
    before = tree(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (0, 10, 700, 4000, 15_000):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            with pytest.raises(OutputError, match="free space"):
                write_bundle(out, "new")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert tree(tmp_path) == before
    assert open_bundle(out) == old
    assert leftovers(out) == []


@pytest.fixture
def read_only(tmp_path):
    """A folder that not even root may write."""
    place = tmp_path / "protected"
    place.mkdir()
    write_bundle(place / "old")
    if os.geteuid():
        place.chmod(0o555)
        yield place
        place.chmod(0o755)
        return
    bind = ["mount", "--bind", str(place), str(place)]
    if shutil.which("mount") is None or subprocess.run(bind, capture_output=True).returncode:
        pytest.skip("root may write everything, and may not mount here")
    subprocess.run(["mount", "-o", "remount,ro,bind", str(place)], check=True, capture_output=True)
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_protected_place(read_only, tmp_path):
    pack(read_only / "old", tmp_path / "a.hasten")
    for attempt in (
        lambda: BundleWriter(read_only / "new"),
        lambda: BundleWriter(read_only / "old"),
        lambda: pack(read_only / "old", read_only / "a.hasten"),
        lambda: unpack(tmp_path / "a.hasten", read_only / "out"),
        lambda: open_bundle(read_only / "old").with_proof(a_proof(), {}),
    ):
        with pytest.raises(OutputError, match="choose a place that you may write"):
            attempt()
    assert names(read_only) == ["old"]


def test_places_that_cannot_be(tmp_path):
    (tmp_path / "file").write_text("x")
    for place, match in (
        (tmp_path / "absent/out", "does not exist"),
        (tmp_path / "file/out", "is no folder"),
        (tmp_path / ("x" * 256), "too long"),
    ):
        with pytest.raises(OutputError, match=match), BundleWriter(place):
            pass
    assert names(tmp_path) == ["file"]
