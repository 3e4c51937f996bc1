"""Kills or interrupts writers, at every line they run or at random times, and looks at what they leave. A program:

    killer.py FOLDER ACTION SCHEDULE

SCHEDULE is lines, times (both kill) or interrupts (at every line, and at every return). Prints one JSON object. It
forks, so it must not run inside pytest, where libraries have threads.
"""

from __future__ import annotations

import atexit
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
INTERRUPTED = 130


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


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt() -> None:
    raise KeyboardInterrupt


def strike_at_line(number: int, strike: Callable[[], None], events: tuple[str, ...]) -> None:
    """Have this process struck at a line: each line of swap.py has its number, and each 12th of the rest."""
    left = number * STRIDE

    def on_line(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal left
        if event in events:
            left -= STRIDE if frame.f_code.co_filename.endswith("swap.py") else 1
            if left < 0:
                sys.settrace(None)
                strike()
        return on_line

    def on_call(frame: FrameType, event: str, _: Any) -> Any:
        return on_line if frame.f_code.co_filename.endswith(TRACED) else None

    sys.settrace(on_call)


def act(action: str, out: Path, point: float, schedule: str) -> int:
    """Do the action until struck; the exit code. What Python does at its end is done."""
    if schedule == "lines":
        strike_at_line(int(point), kill, ("line",))
    elif schedule == "interrupts":
        strike_at_line(int(point), interrupt, ("line", "return"))
    try:
        ACTIONS[action](out)
    except KeyboardInterrupt:
        atexit._run_exitfuncs()
        return INTERRUPTED
    sys.settrace(None)
    return 0


def struck(action: str, out: Path, point: float, schedule: str) -> bool:
    """Run the action in a child and strike it there; False if it ended before."""
    child = os.fork()
    if child == 0:
        os._exit(act(action, out, point, schedule))
    if schedule == "times":
        time.sleep(point)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status) not in (0, INTERRUPTED):
        raise SystemExit("the writer failed by itself")
    return status != 0


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
    """One strike: whether it was one, what is there then, what after the next writer began, and what lies about.

    What an interrupted writer leaves is looked at before the next one tidies, of the others after.
    """
    base = root / "trial"
    base.mkdir()
    out = base / "out"
    if action == "pack":
        shutil.copyfile(root / "old.hasten", out)
    elif action != "first":
        shutil.copytree(root / "old", out)
    was_struck = struck(action, out, point, schedule)
    then = state(out)
    left = bundle_builders.leftovers(out) if schedule == "interrupts" else []
    if action == "pack":
        with swap.staged_file(out) as file:
            file.write(b"")
            after = state(out)
    else:
        with BundleWriter(out):
            after = state(out)
    left += bundle_builders.leftovers(out)
    shutil.rmtree(base)
    return was_struck, then, after, left


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
    if schedule == "times":
        points: Any = [random.Random(index).uniform(0, 0.02) for index in range(60)]
    else:
        points = range(1_000_000)
    for point in points:
        was_struck, now, later, lying = trial(root, action, point, schedule)
        if schedule != "times" and not was_struck:
            break
        then[now] += 1
        after[later] += 1
        left += lying
    print(json.dumps({"then": then, "after": after, "left": left}))


if __name__ == "__main__":
    main(*sys.argv[1:])
