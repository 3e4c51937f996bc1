"""The compression benchmark: what pruning, low rank and repair cost in quality, and gain in size and speed.

    python benchmarks/compression.py [--quick] [--only language-model|encoder|cnn|calibration] [--json FILE] [--check]

Everything runs through the real command. Models and data are looked for in ../shared (or $HASTEN_SHARED).
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import calibration
import cnn
from decoder_quality import perplexity_of, write_seen
from measure import SHARED, Goal, arguments, finish, machine_line, model_folder, run_hasten
from quality import STS_COLUMNS, spearman, sts, sts_path
from work import multiply_adds

STEPS = {
    "magnitude 50 %": "prune(ratio=0.5, method=magnitude)",
    "wanda 50 %": "prune(ratio=0.5, method=wanda)",
    "sparsegpt 50 %": "prune(ratio=0.5)",
    "sparsegpt 2:4": 'prune(pattern="2:4")',
    "alps 2:4": 'prune(pattern="2:4", method=alps)',
    "svd 80 %": "factor(ratio=0.8, method=svd, allocation=uniform, joint=false)",
    "whitened 80 %, uniform": "factor(ratio=0.8, allocation=uniform, joint=false)",
    "whitened 80 %": "factor(ratio=0.8)",
    "structure 20 %, no repair": "prune-heads(ratio=0.2, repair=false); prune-neurons(ratio=0.2, repair=false)",
    "structure 20 %": "prune-heads(ratio=0.2); prune-neurons(ratio=0.2)",
}
"""What is done to pystories_lm; the plain forms, without the pass ``repair`` behind them."""
QUICK = ("wanda 50 %", "sparsegpt 50 %", "svd 80 %", "whitened 80 %")
DENSE = "dense"
SPED = "structure 20 %"
_RECIPE = """schema = 1
name = "compression"
description = "One step, and what every graph of a decoder gets."
tune = false

[generation]
default = ["clean", {step}"finish"]
"""
_WISH = ("--target", "cpu", "--max-drop", "1000%", "--quiet")


def measure_language_model(quick: bool, folder: Path) -> dict[str, Any]:
    """Step -> perplexity over the dense model's on both texts; speed of the structured one. Empty without the model."""
    model, data = SHARED / "models" / "pystories_lm", SHARED / "data" / "pystories"
    if not (model.exists() and data.exists()):
        print(f"pystories_lm is not at {model}: nothing is compressed")
        return {}
    texts = [data / "python.txt", data / "stories.txt"]
    seen = write_seen(folder / "seen.txt", texts)
    steps = {DENSE: "", **({name: STEPS[name] for name in QUICK} if quick else STEPS)}
    rows = ("--calibration-rows", "16") if quick else ()
    found: dict[str, Any] = {}
    for name, step in steps.items():
        bundle = compile_step(model, folder / name.replace(" ", "-"), step, seen, *rows)
        found[name] = {path.stem: perplexity_of(bundle, path) for path in texts}
        ratios = ", ".join(f"{path.stem} {found[name][path.stem] / found[DENSE][path.stem]:.4f}x" for path in texts)
        print(f"pystories_lm, {name}: {ratios}", flush=True)
    dense, pruned = (folder / name.replace(" ", "-") for name in (DENSE, SPED))
    return {"perplexity": found} | ({} if quick else {"speed": speed(dense, pruned)})


def compile_step(model: Path, bundle: Path, step: str, seen: Path, *more: str) -> Path:
    """A float32 bundle to which one step was done."""
    recipe = bundle.with_suffix(".toml")
    recipe.write_text(_RECIPE.format(step=json.dumps(step) + ", " if step else ""), encoding="utf-8")
    run_hasten("compile", str(model), "-o", str(bundle), "--recipe", str(recipe), "--data", str(seen), *_WISH, *more)
    return bundle


def speed(dense: Path, pruned: Path) -> dict[str, float]:
    """How many times faster prompts are read, and how many times fewer multiply-adds that takes."""
    wish = ("--against", str(dense), "--batches", "8", "--lengths", "256", "--new-tokens", "8", "--json")
    report = json.loads(run_hasten("bench", str(pruned), *wish))
    before, after = (multiply_adds(next(bundle.glob("*.onnx")), tokens=256) for bundle in (dense, pruned))
    return {"faster": report["rows"][0]["prefill_ratio"]["median"], "fewer": before / after}


def judge_language_model(figures: Mapping[str, Any]) -> list[Goal]:
    """The lines of the issue's table."""
    known = figures.get("perplexity", {})

    def rise(name: str) -> float | None:
        """Mean rise of the perplexity over the dense model's."""
        if name not in known:
            return None
        ratios = [float(value / known[DENSE][text]) for text, value in known[name].items()]
        return sum(ratios) / len(ratios) - 1.0

    def over(one: str, other: str) -> float | None:
        mine, its = rise(one), rise(other)
        return None if mine is None or its is None else mine / its

    best = [value for value in (rise("sparsegpt 2:4"), rise("alps 2:4")) if value is not None]
    sped = figures.get("speed")
    return [
        Goal("pystories_lm 50 %: rise of perplexity, SparseGPT over Wanda",
             1.0, False, "x", over("sparsegpt 50 %", "wanda 50 %")),
        Goal("pystories_lm 50 %: Wanda over magnitude", 1.0, False, "x", over("wanda 50 %", "magnitude 50 %")),
        Goal("pystories_lm 2:4: perplexity over dense", 1.5, False, "x", 1.0 + min(best) if best else None),
        Goal("pystories_lm, 20 % by low rank: rise over plain SVD's",
             0.1, False, "x", over("whitened 80 %", "svd 80 %")),
        Goal("the same over uniform ranks'", 0.7, False, "x", over("whitened 80 %", "whitened 80 %, uniform")),
        Goal("pystories_lm, 20 % of the structure: rise with repair over without",
             0.5, False, "x", over(SPED, "structure 20 %, no repair")),
        Goal("the same: speed-up over fewer multiply-adds",
             0.85, True, "x", sped["faster"] / sped["fewer"] if sped else None),
    ]  # fmt: skip


def measure_encoder(quick: bool, folder: Path) -> dict[str, Any]:
    """all-MiniLM-L6-v2 in int8: a quarter of its structure removed; half of it zero. Empty without STS-B."""
    dev = None if quick else sts("dev")
    if dev is None:
        return {}
    import hasten

    data = ("--data", str(sts_path("train")), "--columns", STS_COLUMNS)
    wish = ("--target", "cpu", "--max-drop", "5%", "--quiet", *data)
    kinds = {
        "fp32": ("--recipe", "reference"),
        "int8": (),
        "structure 25 %": ("--prune-structure", "heads=25%,ffn=25%"),
        "prune 50 %": ("--prune", "50%,embeddings=50%"),
    }
    figures: dict[str, Any] = {}
    for kind, options in kinds.items():
        bundle = folder / kind.replace(" ", "-")
        run_hasten("compile", str(model_folder()), "-o", str(bundle), *wish, *options)
        with hasten.load(bundle) as model:
            found = spearman(model.embed(dev.left + dev.right), dev.scores)
        print(f"all-MiniLM-L6-v2, {kind}: STS-B dev Spearman {100 * found:.2f}", flush=True)
        packed = folder / f"{bundle.name}.hasten"
        run_hasten("pack", str(bundle), str(packed))
        figures[kind] = {"spearman": found, "packed": packed.stat().st_size}
    rows = ("--batches", "16", "--lengths", "128", "--json", "--seconds", "4")
    against = ("--against", str(folder / "int8"))
    report = json.loads(run_hasten("bench", str(folder / "structure-25-%"), *against, *rows))
    return {"kinds": figures, "faster": report["rows"][0]["ratio"]["median"]}


def judge_encoder(figures: Mapping[str, Any]) -> list[Goal]:
    """The lines of the issue's table."""
    known = figures.get("kinds", {})

    def drop(kind: str) -> float | None:
        return 100.0 * (known["fp32"]["spearman"] - known[kind]["spearman"]) if kind in known else None

    size = known["prune 50 %"]["packed"] / known["int8"]["packed"] if known else None
    return [
        Goal("MiniLM int8, 25 % of heads and neurons removed: speed over int8", 1.2, True, "x", figures.get("faster")),
        Goal("the same: STS-B dev Spearman below fp32", 1.0, False, "points", drop("structure 25 %")),
        Goal("MiniLM int8, 50 % zeros: packed over dense int8 packed", 0.72, False, "x", size),
        Goal("the same: STS-B dev Spearman below fp32", 1.0, False, "points", drop("prune 50 %")),
    ]


def measure_cnn(quick: bool, folder: Path) -> dict[str, Any]:
    """See `cnn`."""
    return {} if quick else cnn.measure_cnn(folder)


def measure_calibration(quick: bool, folder: Path) -> dict[str, Any]:
    """See `calibration`."""
    places = [folder / name for name in ("encoder", "decoder")]
    for place in places:
        place.mkdir()
    return {
        "time": calibration.time_figures(quick, places[0]),
        "memory": calibration.memory_figures(quick, places[1]),
    }


PARTS: dict[str, tuple[Callable[[bool, Path], dict[str, Any]], Callable[[dict[str, Any]], list[Goal]]]] = {
    "language-model": (measure_language_model, judge_language_model),
    "encoder": (measure_encoder, judge_encoder),
    "cnn": (measure_cnn, cnn.goals),
    "calibration": (measure_calibration, calibration.judge),
}


def main() -> int:
    parser = arguments(__doc__, "a few steps on little data, and no training")
    parser.add_argument("--only", choices=PARTS, action="append", help="some of the parts; repeatable")
    options = parser.parse_args()
    figures: dict[str, Any] = {"machine": machine_line(), "peers": [], "quick": options.quick}
    print(f"{figures['machine']}\npeers: none; what is compared are methods\n", flush=True)
    goals = []
    with tempfile.TemporaryDirectory(prefix="hasten-benchmark-") as place:
        for name, (measure, judge) in PARTS.items():
            if options.only and name not in options.only:
                continue
            folder = Path(place) / name
            folder.mkdir()
            figures[name] = measure(options.quick, folder)
            goals += judge(figures[name])
    return finish(figures, goals, options)


if __name__ == "__main__":
    sys.exit(main())
