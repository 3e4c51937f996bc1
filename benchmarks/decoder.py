"""The decoder benchmark: int4 language models of hasten next to llama.cpp, onnxruntime-genai and transformers.

    python benchmarks/decoder.py [--quick] [--shape NAME] [--json FILE] [--check]

Speed is of models with random weights; quality and text are of the trained models in ../shared (or $HASTEN_SHARED).
Everything of ours runs through the real command and the real loader. Peers are looked for where
`benchmarks/peers/install.py` puts them (or in $HASTEN_PEERS).
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from decoder_quality import judge_quality, measure_quality
from measure import ROOT, Goal, arguments, finish, machine_line, run_once
from quality import write_lines
from race import Contender, Measure, Plan, Race, Texts
from shapes import DECODER_SHAPES, random_decoder

sys.path.append(str(Path(__file__).resolve().parent / "peers"))
from catalogue import DECODER_PEERS, found

MEASURES = (
    Measure("prefill 512", "prefill", {"tokens": 512}),
    Measure("decode 1", "decode", {"prompt": 128, "steps": 32, "batch": 1}),
    Measure("decode 8", "decode", {"prompt": 128, "steps": 16, "batch": 8}),
)
FULL = Plan(restarts=3, rounds=4, seconds=1.0, text_rounds=0, measures=MEASURES)
QUICK = Plan(restarts=1, rounds=3, seconds=0.5, text_rounds=0, measures=MEASURES)
RECIPES = {"int4-serve": str(ROOT / "benchmarks" / "recipes" / "int4-random.toml"), "int4-fast": "int4-fast"}
OURS = "hasten int4-serve"
"""The one that is judged: its head has 8 bits, as llama.cpp's has 6.5; the other's has 4, as onnxruntime-genai's."""
SMALL = "llama-168m"
FIRST_TOKEN = "import hasten; print(next(hasten.load({bundle!r}).generate('w5 w6 w7', stream=True)), flush=True)"


def measure_speed(name: str, quick: bool, folder: Path) -> dict[str, Any]:
    """The race of one shape, as JSON; and, of the small one, a cold start."""
    model = random_decoder(folder / name, DECODER_SHAPES[name])
    bundles = {recipe: folder / f"{name}-{recipe}" for recipe in RECIPES}
    compiled = {recipe: compile_one(model, bundle, RECIPES[recipe]) for recipe, bundle in bundles.items()}
    script = str(ROOT / "benchmarks" / "peers" / "hasten_decoder.py")
    ours = [
        Contender(f"hasten {recipe}", (sys.executable, script), bundle, {"PYTHONPATH": str(ROOT)}, ours=True)
        for recipe, bundle in bundles.items()
    ]
    peers = [
        Contender(one.title, (str(one.python), str(one.script)), model, {})
        for one in found(DECODER_PEERS)
        if one.quick or not quick
    ]
    nothing = write_lines(folder / "nothing.txt", [])
    race = Race(
        [*ours, *peers], QUICK if quick else FULL, Texts(nothing, nothing, nothing, 0, folder), folder / f"{name}-work"
    )
    race.run()
    figures: dict[str, Any] = {"compile": compiled, "race": race.to_dict(), "lines": lines(race)}
    if name == SMALL:
        runs = 4 if quick else 8
        command = [sys.executable, "-c", FIRST_TOKEN.format(bundle=str(bundles["int4-serve"]))]
        figures["first_token"] = sorted(first_line_seconds(command) for _ in range(runs))[runs // 2]
    return figures


def first_line_seconds(command: Sequence[str]) -> float:
    """Wall seconds from the start of a process to its first line; how it ends does not count."""
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        line = process.stdout.readline() if process.stdout is not None else b""
        seconds = time.perf_counter() - start
    if process.returncode or not line:
        raise SystemExit(f"{' '.join(command)} failed")
    return seconds


def compile_one(model: Path, bundle: Path, recipe: str) -> dict[str, float]:
    """Seconds and memory of a compile for the CPU."""
    # The perplexity of random weights says nothing: quality is measured on trained models.
    wish = ("--target", "cpu", "--recipe", recipe, "--max-drop", "99%", "--quiet")
    return run_once([sys.executable, "-m", "hasten", "compile", str(model), "-o", str(bundle), *wish])


def lines(race: Race) -> dict[str, Any]:
    """Measure -> the best peer, and how many times faster we are; and what eight rows gain over one."""
    table: dict[str, Any] = {}
    for measure in (one.name for one in MEASURES):
        best = race.best_peer(measure)
        ratio = None if best is None else race.ratio(OURS, best, measure)
        table[measure] = {"best": best, "ratio": None if ratio is None else dataclasses.asdict(ratio)}
    one, eight = race.cost(OURS, "decode 1"), race.cost(OURS, "decode 8")
    table["batch gain"] = 8.0 * one / eight if one and eight else None
    return table


def judge_speed(name: str, figures: Mapping[str, Any]) -> list[Goal]:
    """The lines of the issue's table that a shape has."""

    def over_best(measure: str) -> float | None:
        ratio = figures["lines"][measure]["ratio"]
        return None if ratio is None else float(ratio["median"])

    goals = [
        Goal(f"{name}: decode, batch 1, over the best peer", 1.15, True, "x", over_best("decode 1")),
        Goal(f"{name}: prefill of 512 tokens over the best peer", 1.1, True, "x", over_best("prefill 512")),
        Goal(f"{name}: batch 8 decode over batch 1, tokens a second", 3.0, True, "x", figures["lines"]["batch gain"]),
    ]
    if "first_token" in figures:
        goals.append(Goal(f"{name}: process start to first token", 0.7, False, "s", figures["first_token"]))
    return goals


def show_speed(name: str, figures: Mapping[str, Any]) -> None:
    """A line a contender, tokens a second."""
    print(f"\n{name:28}{'prefill 512':>14}{'decode 1':>12}{'decode 8':>12}   tokens/s, median")
    tokens = {"prefill 512": 512, "decode 1": 1, "decode 8": 8}
    for contender, result in figures["race"]["contenders"].items():
        rates = {
            measure: 1e3 * tokens[measure] / sorted(ms)[len(ms) // 2] for measure, ms in result["ms"].items() if ms
        }
        cells = [f"{rates[measure]:12.1f}" if measure in rates else " " * 12 for measure in tokens]
        print(f"{contender:28}  {''.join(cells)}")
    for contender, reason in figures["race"]["failed"].items():
        print(f"{contender:28} fell out: {reason}")


def main() -> int:
    quick = "the small shape only, only peers that are ready soon, and no quality"
    parser = arguments(__doc__, quick)
    parser.add_argument("--shape", choices=tuple(DECODER_SHAPES), help="only the speed of this one")
    options = parser.parse_args()
    titles = [entry.title for entry in found(DECODER_PEERS)]
    figures: dict[str, Any] = {"machine": machine_line(), "peers": titles, "quick": options.quick, "speed": {}}
    print(f"{figures['machine']}\npeers found: {', '.join(titles) or 'none'}\n", flush=True)
    goals = []
    with tempfile.TemporaryDirectory(prefix="hasten-benchmark-") as place:
        for name in (options.shape,) if options.shape else (SMALL,) if options.quick else DECODER_SHAPES:
            figures["speed"][name] = measure_speed(name, options.quick, Path(place))
            show_speed(name, figures["speed"][name])
            goals += judge_speed(name, figures["speed"][name])
        if not options.shape and not options.quick:
            figures["quality"] = measure_quality(Path(place))
            goals += judge_quality(figures["quality"])
    return finish(figures, goals, options)


if __name__ == "__main__":
    sys.exit(main())
