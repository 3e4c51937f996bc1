"""The benchmark of many users on one CPU: texts written together, prompts remembered, guesses checked, forms kept.

    python benchmarks/batching.py [--quick] [--only together|gap|prefix|guesses|schema] [--json FILE] [--check]

Speed of batches is of a model with random weights (168M), next to llama.cpp, which batches requests as they come;
guessing and forms are of pystories_lm in ../shared (or $HASTEN_SHARED). Peers are looked for where
`benchmarks/peers/install.py` puts them (or in $HASTEN_PEERS).
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
from decoder import SMALL, compile_one
from measure import ROOT, SHARED, Goal, arguments, finish, machine_line, run_hasten
from quality import write_lines
from quoting import Quoting, held, quotings
from race import Contender, Measure, Plan, Race, Texts
from shapes import DECODER_SHAPES, random_decoder

sys.path.append(str(Path(__file__).resolve().parent / "peers"))
from catalogue import DECODER_PEERS, found

if TYPE_CHECKING:
    from collections.abc import Iterator

    from runtimes.generate.loop import Loop, Request
    from runtimes.generate.results import Generated
    from runtimes.tasks.generate import Generator

PROMPTS = (16, 48, 96, 160, 24, 200, 64, 120)
STEPS = (96, 48, 64, 32, 80, 40, 112, 56)
"""Tokens of the requests that come at once, and of their texts."""
RECIPE = str(ROOT / "benchmarks" / "recipes" / "int4-random.toml")
LONG = 2000
SHARED_TOKENS = 1500
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 24},
        "kind": {"enum": ["function", "class", "module"]},
        "lines": {"type": "integer", "minimum": 0, "maximum": 9999},
        "public": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 3},
    },
    "required": ["name", "kind", "lines", "public", "tags"],
    "additionalProperties": False,
}
_MODULES = ("textwrap", "bisect", "heapq", "contextlib", "functools", "string", "shlex", "queue")
_COPIED = 200
_WRITTEN = 96


def together(bundle: Path, model: Path, quick: bool, folder: Path) -> dict[str, Any]:
    """Requests at once against one after another, and against the peers that take several at once."""
    script = str(ROOT / "benchmarks" / "peers" / "hasten_decoder.py")
    ours = Contender("hasten", (sys.executable, script), bundle, {"PYTHONPATH": str(ROOT)}, ours=True)
    peers = [
        Contender(one.title, (str(one.python), str(one.script)), model, {})
        for one in found(DECODER_PEERS)
        if one.name == "llama_cpp_gguf"
    ]
    measures = (
        Measure("at once", "serve", {"prompts": PROMPTS, "steps": STEPS}),
        *(
            Measure(f"alone {i}", "serve", {"prompts": [p], "steps": [s]})
            for i, (p, s) in enumerate(zip(PROMPTS, STEPS, strict=True))
        ),
    )
    nothing = write_lines(folder / "nothing.txt", [])
    plan = Plan(restarts=1, rounds=2 if quick else 6, seconds=0.0, text_rounds=0, measures=measures)
    race = Race([ours, *peers], plan, Texts(nothing, nothing, nothing, 0, folder), folder / "work")
    race.run()
    rounds = race.results["hasten"].ms
    alone = [sum(rounds[f"alone {i}"][turn] for i in range(len(PROMPTS))) for turn in range(plan.rounds)]
    best = race.best_peer("at once")
    over = race.ratio("hasten", best, "at once") if best else None
    figures = {
        "gain": median(one / both for one, both in zip(alone, rounds["at once"], strict=True)),
        "tokens/s": {
            name: 1e3 * sum(STEPS) / median(one.ms["at once"])
            for name, one in race.results.items()
            if "at once" in one.ms
        },
        "best peer": best,
        "over the best peer": None if over is None else dataclasses.asdict(over),
        "race": race.to_dict(),
    }
    print(f"at once: {figures['gain']:.2f} x one after another; tokens/s: {figures['tokens/s']}", flush=True)
    return figures


def possible(model: Generator, rounds: int) -> dict[str, Any]:
    """What these lengths allow, were there nothing but calls of the graph.

    Every prompt is read, then all step together until each text has its length; against the same calls for one text
    after another.
    """
    chance, decoder = np.random.default_rng(2), model.decoder(len(PROMPTS), 1024)
    prompts = [chance.integers(20, 31000, count).tolist() for count in PROMPTS]
    reads, steps = [], list[list[float]]()
    for _ in range(rounds + 1):
        reads.append(sum(_timed(partial(decoder.prefill, slot, [prompt])) for slot, prompt in enumerate(prompts)))
        sizes = range(1, len(PROMPTS) + 1)
        steps.append([median(_timed(partial(decoder.step, [7] * n, PROMPTS[:n])) for _ in range(10)) for n in sizes])
    # The first round warms up.
    read = median(reads[1:])
    step = [median(turn[n] for turn in steps[1:]) for n in range(len(PROMPTS))]
    company = [sum(limit > at for limit in STEPS) for at in range(max(STEPS))]
    both, alone = read + sum(step[n - 1] for n in company), read + sum(STEPS) * step[0]
    figures = {
        "gain": alone / both,
        "gain of steps": (alone - read) / (both - read),
        "gain of steps of eight": len(PROMPTS) * step[0] / step[-1],
        "mean texts of a step": sum(STEPS) / max(STEPS),
        "reading ms": 1e3 * read,
        "step ms": [1e3 * seconds for seconds in step],
    }
    print(f"these lengths allow {figures['gain']:.2f} x: {figures}", flush=True)
    return figures


def requests(prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> list[Request]:
    """Greedy ones that only their limits end."""
    from runtimes.generate.loop import Job, Request
    from runtimes.generate.sampling import Sampling

    job = Job(Sampling(), end=frozenset())
    return [
        Request(tuple(p), limit, job, number) for number, (p, limit) in enumerate(zip(prompts, limits, strict=True))
    ]


def gap(model: Generator, rounds: int) -> dict[str, Any]:
    """Seven texts are written when a long prompt comes: their longest gap between two tokens, and a step's time."""
    from runtimes.generate.loop import Loop

    chance = np.random.default_rng(3)
    gaps, steps, firsts = [], [], []
    for _ in range(rounds):
        loop = Loop(model.decoder(8, 2048), model.encoder.vocabulary)
        for one in requests(chance.integers(20, 31000, (7, 64)).tolist(), [600] * 7):
            loop.add(one)
        calm = [_timed(loop.step) for _ in range(40)][-20:]
        (long,) = requests([chance.integers(20, 31000, LONG).tolist()], [4])
        loop.add(dataclasses.replace(long, number=7))
        begin, last, longest = time.perf_counter(), time.perf_counter(), 0.0
        done = False
        while not done:
            pieces = loop.step()
            now = time.perf_counter()
            if any(piece.prompt < 7 for piece in pieces):
                longest, last = max(longest, now - last), now
            done = any(piece.prompt == 7 for piece in pieces)
        firsts.append(time.perf_counter() - begin)
        gaps.append(longest)
        steps.append(median(calm))
    figures = {
        "gap ms": 1e3 * median(gaps),
        "step ms": 1e3 * median(steps),
        "first token of the long one s": median(firsts),
    }
    print(f"a prompt of {LONG} tokens comes: {figures}", flush=True)
    return figures


def prefix(model: Generator, rounds: int) -> dict[str, Any]:
    """First token of a chat whose system prompt was read before, over that of one whose was not."""
    from runtimes.generate.loop import Loop
    from runtimes.generate.prefixes import PrefixCache

    chance = np.random.default_rng(4)
    ratios, cold, warm = [], [], []
    for _ in range(rounds):
        system = chance.integers(20, 31000, SHARED_TOKENS).tolist()
        loop = Loop(model.decoder(2, 2048), model.encoder.vocabulary, prefixes=PrefixCache(model.layout, 1 << 30))
        times = []
        for _ in range(2):
            (one,) = requests([system + chance.integers(20, 31000, 40).tolist()], [4])
            loop.add(one)
            times.append(_first(loop))
            while loop.busy:
                loop.step()
        cold.append(times[0])
        warm.append(times[1])
        ratios.append(times[1] / times[0])
    figures = {"ratio": median(ratios), "without s": median(cold), "with s": median(warm)}
    print(f"a shared prompt of {SHARED_TOKENS} tokens: {figures}", flush=True)
    return figures


def guesses(model: Generator, rounds: int, every: int) -> dict[str, Any]:
    """Plain greedy over speculative, on text that repeats its prompt and on text that does not.

    The model is held to both: pystories_lm does not quote, see `quoting`. Text that does not repeat its prompt is how
    stories and modules really go on. What it writes by itself behind the beginnings of stories and of modules that
    begin again, which repeats itself more often than not, is told and not judged.
    """
    stories = [story for story in _stories() if len(story) > 700][: 2 * len(_MODULES)]
    sources = [inspect.getsource(importlib.import_module(name)) for name in _MODULES]
    cut = [(model.encoder.encode(text), 48) for text in stories] + [
        (model.encoder.encode(text), 200) for text in sources
    ]
    real = [Quoting("", ids[:count], ids[count : count + _WRITTEN]) for ids, count in cut]
    # The text, and how it begins again.
    own = [[*ids[40 : 40 + _COPIED], *ids[40:64]] for ids, count in cut if count > 48]
    own += [list(ids[:count]) for ids, count in cut[: len(_MODULES)]]
    figures: dict[str, Any] = {
        "repeats": _gains(list(quotings(model, every)), rounds, lambda one, on: held(model, one, speculate=on)),
        "does not": _gains(real, rounds, lambda one, on: held(model, one, speculate=on)),
        "own text": _gains(own, rounds, lambda one, on: _written(model, one, speculate=on)),
    }
    for name, part in figures.items():
        print(f"guesses, {name}: {part['ratio']:.2f} x, lowest {part['lowest']:.2f}", flush=True)
    return figures


def _gains(texts: Sequence[Any], rounds: int, write: Callable[[Any, bool], tuple[float, Generated]]) -> dict[str, Any]:
    """For each text: the time without guesses over that with them, one after the other, the median of the rounds."""
    ratios, same, drafted, accepted = [], 0, 0, 0
    for text in texts:
        turns = []
        for _ in range(rounds):
            (plain, one), (quick, other) = (write(text, on) for on in (False, True))
            turns.append(plain / quick)
        same += one.tokens == other.tokens
        drafted, accepted = drafted + other.drafted, accepted + other.accepted
        ratios.append(median(turns))
    counts = {"same tokens": same, "texts": len(texts), "drafted": drafted, "accepted": accepted}
    return {"ratio": median(ratios), "lowest": min(ratios), "ratios": ratios, **counts}


def _written(model: Generator, prompt: Sequence[int], *, speculate: bool) -> tuple[float, Generated]:
    begin = time.perf_counter()
    found = model.generate(prompt, max_new_tokens=_WRITTEN, sample=False, speculate=speculate)
    return time.perf_counter() - begin, found


def _stories() -> list[str]:
    text = (SHARED / "data" / "pystories" / "stories.txt").read_text(encoding="utf-8")
    return [story.strip() for story in text.split("<|endoftext|>")]


def schema(model: Generator, count: int) -> dict[str, Any]:
    """Of sampled texts held to a schema, how many are valid; and what a token costs more than a free one."""
    prompt, valid, ratios = "Describe a Python object as JSON:\n", 0, []
    for seed in range(count):
        told: dict[str, Any] = {"seed": seed, "temperature": 0.8}
        begin = time.perf_counter()
        held = model.generate(prompt, max_new_tokens=200, schema=SCHEMA, **told)
        middle = time.perf_counter()
        free = model.generate(
            prompt,
            max_new_tokens=max(1, len(held.tokens)),
            bias={token: float("-inf") for token in model.generation.eos},
            **told,
        )
        end = time.perf_counter()
        valid += is_valid(held.text)
        ratios.append((middle - begin) / max(1, len(held.tokens)) / ((end - middle) / max(1, len(free.tokens))))
    figures = {"valid": valid, "of": count, "time of a token over a free one": median(ratios)}
    print(f"schema: {figures}", flush=True)
    return figures


def is_valid(text: str) -> bool:
    """Whether it is JSON that fits the schema."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    kinds = {"name": str, "kind": str, "lines": int, "public": bool, "tags": list}
    return (
        isinstance(value, dict)
        and set(value) == set(kinds)
        and all(isinstance(value[name], kind) for name, kind in kinds.items())
        and len(value["name"]) <= 24
        and value["kind"] in SCHEMA["properties"]["kind"]["enum"]
        and not isinstance(value["lines"], bool)
        and 0 <= value["lines"] <= 9999
        and len(value["tags"]) <= 3
        and all(isinstance(tag, str) and len(tag) <= 8 for tag in value["tags"])
    )


def _timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _first(loop: Loop) -> float:
    """Seconds until a piece comes."""
    begin = time.perf_counter()
    while not loop.step():
        pass
    return time.perf_counter() - begin


@contextmanager
def loaded(bundle: Path) -> Iterator[Generator]:
    """As a user gets it."""
    import hasten
    from runtimes.tasks.generate import Generator

    with hasten.load(bundle) as model:
        if not isinstance(model, Generator):
            raise TypeError(f"{bundle} is no language model")
        yield model


def judge(figures: Mapping[str, Any]) -> list[Goal]:
    """The lines of the issue's table."""
    goals = []
    if part := figures.get("together"):
        over = part["over the best peer"]
        goals += [
            Goal("8 requests at once over one after another", 3.0, True, "x", part["gain"]),
            Goal("the same over llama.cpp", 1.3, True, "x", None if over is None else over["median"]),
        ]
    if part := figures.get("gap"):
        allowed = max(250.0, 4 * part["step ms"])
        goals.append(Goal(f"{LONG} tokens come: longest gap of 7 others", allowed, False, "ms", part["gap ms"]))
    if part := figures.get("prefix"):
        goals.append(Goal("shared prompt of 1,500 tokens: first token with / without", 0.15, False, "x", part["ratio"]))
    if part := figures.get("guesses"):
        goals += [
            Goal("speculative, text that repeats its prompt", 1.7, True, "x", part["repeats"]["ratio"]),
            Goal("speculative, text that does not", 0.97, True, "x", part["does not"]["ratio"]),
        ]
    if part := figures.get("schema"):
        goals += [
            Goal("JSON schema: valid", 100.0, True, "%", 100.0 * part["valid"] / part["of"]),
            Goal(
                "JSON schema: a token's time over a free one's",
                1.10,
                False,
                "x",
                part["time of a token over a free one"],
            ),
        ]
    return goals


def main() -> int:
    parser = arguments(__doc__, "fewer rounds")
    parser.add_argument("--only", choices=("together", "gap", "prefix", "guesses", "schema"), help="one part")
    options = parser.parse_args()
    titles = [entry.title for entry in found(DECODER_PEERS)]
    figures: dict[str, Any] = {"machine": machine_line(), "peers": titles, "quick": options.quick}
    print(f"{figures['machine']}\npeers found: {', '.join(titles) or 'none'}\n", flush=True)
    rounds = 2 if options.quick else 5

    def wanted(*names: str) -> list[str]:
        return [name for name in names if options.only in (None, name)]

    with tempfile.TemporaryDirectory(prefix="hasten-benchmark-") as place:
        folder = Path(place)
        if parts := wanted("together", "gap", "prefix"):
            model, bundle = random_decoder(folder / SMALL, DECODER_SHAPES[SMALL]), folder / "int4"
            compile_one(model, bundle, RECIPE)
            if "together" in parts:
                figures["together"] = together(bundle, model, options.quick, folder)
            with loaded(bundle) as one:
                if "together" in parts:
                    figures["together"]["possible"] = possible(one, rounds)
                for name, part in (("gap", gap), ("prefix", prefix)):
                    if name in parts:
                        figures[name] = part(one, rounds)
        source = SHARED / "models" / "pystories_lm"
        if (parts := wanted("guesses", "schema")) and source.exists():
            run_hasten("compile", str(source), "-o", str(folder / "pystories"), "--target", "cpu", "--quiet")
            with loaded(folder / "pystories") as one:
                if "guesses" in parts:
                    figures["guesses"] = guesses(one, rounds, 20 if options.quick else 10)
                if "schema" in parts:
                    figures["schema"] = schema(one, 20 if options.quick else 100)
    return finish(figures, judge(figures), options)


if __name__ == "__main__":
    sys.exit(main())
