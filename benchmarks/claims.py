"""What README claims of a first compile: size, speed over float32, quality, start, and the compile itself."""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import Goal, model_folder, run_hasten, run_once
from quality import spearman, sts

FIRST_EMBEDDING = "import hasten; hasten.load({bundle!r}).embed(['A cat sits on the mat.'])"
PEER_FIRST_EMBEDDING = (
    "from sentence_transformers import SentenceTransformer; "
    "SentenceTransformer({model!r}, device='cpu').encode(['A cat sits on the mat.'])"
)


def measure_claims(quick: bool) -> dict[str, Any]:
    """Every figure, as JSON."""
    model = model_folder()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="hasten-benchmark-") as folder:
        bundle, both = Path(folder) / "bundle", Path(folder) / "both"
        figures["compile"] = compile_figures(model, bundle)
        run_hasten("compile", str(model), "-o", str(both), "--plan", str(bundle), "--keep-reference", "--quiet")
        figures["size"] = sizes(both)
        figures["speed"] = speed(both, 1.0 if quick else 4.0)
        figures["quality"] = sts_spearman(both)
        starts = 5 if quick else 11
        figures["first_load"] = run_once([sys.executable, "-c", FIRST_EMBEDDING.format(bundle=str(bundle))])
        figures["start"] = start_figures(FIRST_EMBEDDING.format(bundle=str(bundle)), starts)
        if importlib.util.find_spec("sentence_transformers") is not None:
            figures["start_peer"] = start_figures(PEER_FIRST_EMBEDDING.format(model=str(model)), 3)
    return figures


def judge_claims(figures: dict[str, Any]) -> list[Goal]:
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
    report: dict[str, Any] = json.loads(
        run_hasten("bench", str(bundle), *arguments, "--seconds", str(seconds), "--json")
    )
    for row in report["rows"]:
        times = f"{row['against_ms']:7.2f} → {row['p50_ms']:7.2f} ms"
        print(f"{row['batch']:3} × {row['length']:3}: {times}, {row['ratio']['median']:.2f}x")
    return report


def sts_spearman(bundle: Path) -> dict[str, float] | None:
    """Spearman correlation of cosine and human score on STS-B dev, both variants; None where the data is absent."""
    import hasten

    dev = sts("dev")
    if dev is None:
        return None
    found = {}
    for name, variant in (("int8", "cpu-int8"), ("reference", "reference")):
        with hasten.load(bundle, variant=variant) as model:
            found[name] = spearman(model.embed(dev.left + dev.right), dev.scores)
        print(f"STS-B dev Spearman, {name}: {100 * found[name]:.2f}")
    return found


def start_figures(code: str, runs: int) -> dict[str, float]:
    """Median seconds and peak memory of whole processes, from start to exit."""
    results = [run_once([sys.executable, "-c", code]) for _ in range(runs + 1)][1:]
    return {key: statistics.median(result[key] for result in results) for key in ("seconds", "peak_mb")} | {
        "runs": runs
    }
