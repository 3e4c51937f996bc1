"""Kills writers, at every line they run or at random times, and looks at what they leave. Run as a program:

    killer.py FOLDER ACTION SCHEDULE

Prints one JSON object. It forks, so it must not run inside pytest, where libraries have threads.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import bundle_builders

from artifacts import swap
from artifacts.bundle import BundleWriter, open_bundle
from artifacts.errors import BundleError
from artifacts.pack import pack, unpack

TRACED = ("artifacts/bundle.py", "artifacts/swap.py", "artifacts/pack.py", "shutil.py")
STRIDE = 12


def commit(out: Path) -> None:
    bundle_builders.write_bundle(out, "new")


def prove(out: Path) -> None:
    open_bundle(out, verify=False).with_proof(bundle_builders.a_proof(0.5), {"report.html": b"<html>new"})


def unpack_over(out: Path) -> None:
    unpack(out.parent.parent / "new.hasten", out)


def pack_over(out: Path) -> None:
    pack(out.parent.parent / "new", out)


ACTIONS: dict[str, Callable[[Path], None]] = {
    "commit": commit,
    "first": commit,
    "without-exchange": commit,
    "prove": prove,
    "unpack": unpack_over,
    "pack": pack_over,
}


def kill_at_line(number: int) -> None:
    """Have this process killed at a line: each line of swap.py has its number, and each 12th of the rest."""
    left = number * STRIDE

    def on_line(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if event == "line":
            left -= STRIDE if frame.f_code.co_filename.endswith("swap.py") else 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return on_line

    def on_call(frame: FrameType, event: str, _: Any) -> Any:
        return on_line if frame.f_code.co_filename.endswith(TRACED) else None

    sys.settrace(on_call)


def killed(action: str, out: Path, point: float, schedule: str) -> bool:
    """Run the action in a child and kill it there; False if it ended before."""
    child = os.fork()
    if child == 0:
        if schedule == "lines":
            kill_at_line(int(point))
        ACTIONS[action](out)
        os._exit(0)
    if schedule == "times":
        time.sleep(point)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("the writer failed by itself")
    return os.WIFSIGNALED(status)


def state(out: Path) -> str:
    """What is at the place: whose bundle or file, bytes compared."""
    if not os.path.lexists(out):
        return "nothing"
    if out.is_file():
        found: Any = out.read_bytes()
    else:
        try:
            open_bundle(out)
        except BundleError as error:
            return f"broken: {error}"
        found = bundle_builders.tree(out)
    for name in ("old", "new"):
        if found == EXPECTED[name]:
            return name
    return "mixed"


def trial(root: Path, action: str, point: float, schedule: str) -> tuple[bool, str, str, list[str]]:
    """One killing: whether it was one, what is there then, what after the next writer began, and what lies about."""
    base = root / "trial"
    base.mkdir()
    out = base / "out"
    if action == "pack":
        shutil.copyfile(root / "old.hasten", out)
    elif action != "first":
        shutil.copytree(root / "old", out)
    was_killed = killed(action, out, point, schedule)
    then = state(out)
    if action == "pack":
        with swap.staged_file(out) as file:
            file.write(b"")
            after = state(out)
    else:
        with BundleWriter(out):
            after = state(out)
    left = bundle_builders.leftovers(out)
    shutil.rmtree(base)
    return was_killed, then, after, left


EXPECTED: dict[str, Any] = {}


def prepare(root: Path, action: str) -> None:
    """Make the old and the new of the action."""
    bundle_builders.write_bundle(root / "old", "old")
    bundle_builders.write_bundle(root / "new", "old" if action == "prove" else "new")
    if action == "prove":
        prove(root / "new")
    pack(root / "old", root / "old.hasten")
    pack(root / "new", root / "new.hasten")
    for name in ("old", "new"):
        packed = (root / f"{name}.hasten").read_bytes()
        EXPECTED[name] = packed if action == "pack" else bundle_builders.tree(root / name)


def main(folder: str, action: str, schedule: str) -> None:
    os.fsync = lambda handle: None  # what is synced is no matter where only the process dies
    root = Path(folder)
    prepare(root, action)
    if action == "without-exchange":
        swap._exchange = lambda one, other: False
    then: Counter[str] = Counter()
    after: Counter[str] = Counter()
    left: list[str] = []
    if schedule == "lines":
        points: Any = range(1_000_000)
    else:
        points = [random.Random(index).uniform(0, 0.02) for index in range(60)]
    for point in points:
        was_killed, now, later, lying = trial(root, action, point, schedule)
        if schedule == "lines" and not was_killed:
            break
        then[now] += 1
        after[later] += 1
        left += lying
    print(json.dumps({"then": then, "after": after, "left": left}))


if __name__ == "__main__":
    main(*sys.argv[1:])
