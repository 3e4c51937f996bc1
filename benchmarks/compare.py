"""hasten next to the packages people use for the same: speed at fixed shapes and from strings, at what quality."""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from measure import ROOT, Goal, model_folder, run_hasten, run_once
from quality import STS_COLUMNS, Sts, compare_vectors, sst2_figures, sts, sts_path, variants, write_lines
from race import SHAPES, Contender, Plan, Race, Texts
from shapes import OTHER_SHAPES, random_encoder

sys.path.append(str(Path(__file__).resolve().parent / "peers"))
from catalogue import Entry, found

FULL = Plan(restarts=3, rounds=4, seconds=0.5, text_rounds=2)
QUICK = Plan(restarts=1, rounds=3, seconds=0.3, text_rounds=2)
OTHERS = Plan(restarts=2, rounds=3, seconds=0.5, text_rounds=0)
CALIBRATION_SENTENCES = 300
MEMORY_SENTENCES = 5000
MEMORY_CAP_MB = 512
_OURS = "hasten "
_VARIANT = "HASTEN_BENCHMARK_VARIANT"


def measure_comparison(quick: bool) -> dict[str, Any]:
    """Speed, quality and steps of all-MiniLM-L6-v2 next to the peers, as JSON; nothing where STS-B is absent."""
    known = _parts()
    if not known:
        return {}
    model = model_folder()
    with tempfile.TemporaryDirectory(prefix="hasten-benchmark-") as place:
        folder = Path(place)
        bundle = compile_for_both(model, folder / "bundle")
        texts = text_files(known, folder, quick)
        race = Race([*ours(bundle), *peers(model, quick)], QUICK if quick else FULL, texts, folder / "work")
        race.run()
        add_quality(race, bundle, texts, known["dev"])
        figures: dict[str, Any] = {
            "race": race.to_dict(),
            "chosen": chosen_by_load(bundle),
            "lines": lines(race, bundle),
            "steps": steps(bundle),
            "sst2": sst2_figures(folder),
        }
    return figures


def measure_shapes(quick: bool) -> dict[str, Any]:
    """Speed of other encoders next to the peers; nothing where STS-B is absent, or little time is."""
    known = {} if quick else _parts()
    if not known:
        return {}
    with tempfile.TemporaryDirectory(prefix="hasten-benchmark-") as place:
        folder = Path(place)
        texts = text_files(known, folder, quick)
        return {"shapes": {name: other_shape(name, model_folder(), texts, folder) for name in OTHER_SHAPES}}


def measure_memory(quick: bool) -> dict[str, Any]:
    """What calibration adds to a compile; nothing where STS-B is absent, or little time is."""
    known = {} if quick else _parts()
    if not known:
        return {}
    with tempfile.TemporaryDirectory(prefix="hasten-benchmark-") as place:
        return {"calibration": calibration_memory(model_folder(), known["train"], Path(place))}


def _parts() -> dict[str, Sts]:
    """STS-B; empty where a part is absent."""
    parts = {name: sts(name) for name in ("train", "dev", "test")}
    known = {name: part for name, part in parts.items() if part is not None}
    return known if len(known) == len(parts) else {}


def compile_for_both(model: Path, bundle: Path, *more: str) -> Path:
    """A bundle for the CPU provider and for OpenVINO, calibrated and judged on STS-B train."""
    targets = ("--target", "cpu", "--target", "openvino", "--keep-reference")
    data = ("--data", str(sts_path("train")), "--columns", STS_COLUMNS)
    run_hasten("compile", str(model), "-o", str(bundle), *targets, *data, "--quiet", *more)
    return bundle


def ours(bundle: Path, only: Sequence[str] = ()) -> list[Contender]:
    """A contender for each variant that was compiled to be shipped, or for those given."""
    script = str(ROOT / "benchmarks" / "peers" / "hasten_bundle.py")
    names = only or [name for name in variants(bundle) if name != "reference"]
    return [
        Contender(
            f"{_OURS}{name}", (sys.executable, script), bundle, {_VARIANT: name, "PYTHONPATH": str(ROOT)}, ours=True
        )
        for name in names
    ]


def peers(model: Path, quick: bool, *, shapes: bool = False) -> list[Contender]:
    """A contender for each peer whose environment is there."""
    return [
        Contender(one.title, (str(one.python), str(one.script)), model, {})
        for one in found()
        if wanted(one, quick=quick, shapes=shapes)
    ]


def peers_found() -> list[str]:
    """Titles of the peers that are installed."""
    return [entry.title for entry in found()]


def wanted(entry: Entry, *, quick: bool, shapes: bool) -> bool:
    return (entry.quick or not quick) and (entry.shapes or not shapes)


def text_files(parts: Mapping[str, Sts], folder: Path, quick: bool) -> Texts:
    """STS-B in the files that contenders read: 300 sentences of train to calibrate, dev to warm up, all to embed."""
    train = parts["train"].sentences
    dev = parts["dev"].sentences
    everything = dev if quick else [text for part in parts.values() for text in part.sentences]
    vectors = folder / "vectors"
    vectors.mkdir()
    return Texts(
        calibration=write_lines(folder / "calibration.txt", train[:: len(train) // CALIBRATION_SENTENCES]),
        warm_up=write_lines(folder / "dev.txt", dev),
        all=write_lines(folder / "all.txt", everything),
        count=len(everything),
        vectors=vectors,
    )


def add_quality(race: Race, bundle: Path, texts: Texts, dev: Sts) -> None:
    """What the vectors of each contender are worth, next to our float32 reference."""
    (reference,) = ours(bundle, ["reference"])
    alone = Race([reference], Plan(restarts=1, rounds=0, seconds=0.0, text_rounds=1), texts, bundle.parent / "work")
    alone.run()
    exact = np.load(texts.vectors / f"{reference.name}.npy")
    for name, result in race.results.items():
        path = texts.vectors / f"{name}.npy"
        if path.exists():
            result.quality = compare_vectors(np.load(path), exact, dev)


def chosen_by_load(bundle: Path) -> str:
    """The variant that `hasten.load` takes when it is told nothing."""
    from artifacts.bundle import open_bundle
    from runtimes.decide import decide

    return decide(open_bundle(bundle)).variant


def lines(race: Race, bundle: Path) -> dict[str, Any]:
    """Measure -> our variant -> the best peer, and how many times faster we are; and each target's variant."""
    measures = [*(f"{batch}x{length}" for batch, length in SHAPES), "texts"]
    targets = {target: name for name, target in variants(bundle).items() if name != "reference"}
    table: dict[str, Any] = {"variants": targets}
    for measure in measures:
        best = race.best_peer(measure)
        table[measure] = {
            name: {"best": best, "ratio": _ratio(race, f"{_OURS}{name}", best, measure)} for name in targets.values()
        }
    table["cpu over dynamic int8"] = _ratio(race, f"{_OURS}{targets.get('cpu')}", "ONNX Runtime dynamic int8", "16x128")
    return table


def _ratio(race: Race, mine: str, theirs: str | None, measure: str) -> dict[str, float] | None:
    ratio = None if theirs is None else race.ratio(mine, theirs, measure)
    return None if ratio is None else dataclasses.asdict(ratio)


def steps(bundle: Path) -> dict[str, Any]:
    """Variant -> what `plot.py` draws as a waterfall: the measured, kept steps of its proof."""
    import hasten

    found = {}
    for proof in hasten.open_bundle(bundle).proof.variants:
        kept = [{"name": step.name, "ratio": step.ratio} for step in proof.steps if step.kept and step.ms > 0.0]
        if proof.speed:
            widest = max(proof.speed, key=lambda speed: speed.batch * speed.length)
            found[proof.variant] = {**dataclasses.asdict(widest), "steps": kept}
    return found


def other_shape(name: str, model: Path, texts: Texts, folder: Path) -> dict[str, Any]:
    """Another encoder, random weights: speed only."""
    source = random_encoder(model, folder / name, OTHER_SHAPES[name])
    bundle = compile_for_both(source, folder / f"{name}-bundle", "--max-drop", "99%")
    race = Race([*ours(bundle), *peers(source, False, shapes=True)], OTHERS, texts, folder / f"{name}-work")
    race.run()
    return {"race": race.to_dict(), "lines": lines(race, bundle)}


def calibration_memory(model: Path, train: Sts, folder: Path) -> dict[str, Any]:
    """Peak memory of a compile that calibrates on 5,000 sentences under a cap, and of one that does not calibrate."""
    data = write_lines(folder / "memory.txt", train.sentences)
    command = [sys.executable, "-m", "hasten", "compile", str(model), "--target", "openvino", "--data", str(data), "-q"]
    capped = ["--calibration-rows", str(MEMORY_SENTENCES), "--calibration-memory", f"{MEMORY_CAP_MB}MB"]
    return {
        "sentences": MEMORY_SENTENCES,
        "cap_mb": MEMORY_CAP_MB,
        "with": run_once([*command, *capped, "-o", str(folder / "capped")]),
        "without": run_once([*command, "--recipe", "safe", "-o", str(folder / "safe")]),
    }


def judge_comparison(figures: Mapping[str, Any]) -> list[Goal]:
    """The lines of the issue's table."""
    table = figures.get("lines", {})
    chosen = figures.get("chosen", "")

    def over_best(measure: str) -> float | None:
        ratio = table.get(measure, {}).get(chosen, {}).get("ratio")
        return None if ratio is None else float(ratio["median"])

    against = table.get("cpu over dynamic int8")
    return [
        Goal("throughput 16 × 128 over the best peer", 1.15, True, "x", over_best("16x128")),
        Goal("latency 1 × 32 over the best peer", 1.1, True, "x", over_best("1x32")),
        Goal("latency 1 × 128 over the best peer", 1.1, True, "x", over_best("1x128")),
        Goal(
            "CPU provider alone, 16 × 128 over ONNX Runtime dynamic int8",
            *(1.35, True, "x", None if against is None else against["median"]),
        ),
        Goal("sentences from strings over the best peer", 1.4, True, "x", over_best("texts")),
        Goal("SST-2 accuracy over fp32", -0.3, True, "points", _sst2_change(figures.get("sst2"))),
        *(goal for variant in table.get("variants", {}).values() for goal in _quality_goals(figures, variant)),
    ]


def judge_memory(figures: Mapping[str, Any]) -> list[Goal]:
    """The line of the issue's table."""
    growth = _calibration_growth(figures.get("calibration"))
    return [Goal("calibration above a compile without", float(MEMORY_CAP_MB), False, "MB", growth)]


def _sst2_change(figures: Mapping[str, Any] | None) -> float | None:
    if not figures:
        return None
    return 100.0 * float(min(figures["accuracy"].values()) - figures["reference"])


def _calibration_growth(figures: Mapping[str, Any] | None) -> float | None:
    return float(figures["with"]["peak_mb"] - figures["without"]["peak_mb"]) if figures else None


def _quality_goals(figures: Mapping[str, Any], variant: str) -> list[Goal]:
    result = figures["race"]["contenders"].get(f"{_OURS}{variant}", {})
    quality = result.get("quality", {})
    return [
        Goal(f"{variant}: STS-B dev Spearman below fp32", 0.3, False, "points", quality.get("drop_points")),
        Goal(f"{variant}: cosine to fp32, mean", 0.985, True, "", quality.get("cosine_mean")),
        Goal(f"{variant}: cosine to fp32, least", 0.95, True, "", quality.get("cosine_min")),
    ]


def show_shapes(figures: Mapping[str, Any]) -> None:
    """A table a shape."""
    for name, one in figures.get("shapes", {}).items():
        print(f"\n{name}")
        show_comparison(one)


def show_comparison(figures: Mapping[str, Any]) -> None:
    """A line a contender."""
    if "race" not in figures:
        return
    measures = [f"{batch}x{length}" for batch, length in SHAPES]
    heads = "".join(f"{measure} ms".rjust(12) for measure in measures)
    print(f"{'':34}{heads}{'texts/s':>10}{'Spearman':>10}{'cosine':>8}{'least':>7}")
    for name, result in figures["race"]["contenders"].items():
        cells = [f"{np.median(result['ms'][key]):12.2f}" if key in result["ms"] else " " * 12 for key in measures]
        rate = f"{np.median(result['per_second']):10.0f}" if result["per_second"] else " " * 10
        quality = result["quality"]
        worth = (
            f"{100 * quality['spearman']:10.2f}{quality['cosine_mean']:8.3f}{quality['cosine_min']:7.3f}"
            if quality
            else ""
        )
        print(f"{name:34}{''.join(cells)}{rate}{worth}")
    for name, reason in figures["race"]["failed"].items():
        print(f"{name:34} fell out: {reason}")
