"""The serving benchmark: `hasten serve` under load, next to the engine alone and to FastAPI with sentence-transformers.

    python benchmarks/serving.py [--quick] [--only embeddings|overload|chat|soak] [--json FILE] [--check]

Server, load generator and peer are processes of their own and talk over loopback. Sentences are those of STS-B in
../shared (or $HASTEN_SHARED), shuffled. The peer is looked for where `benchmarks/peers/install.py` puts it (or in
$HASTEN_PEERS).
"""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import load_generator
from decoder import SMALL, compile_one
from load_generator import Load, Outcome, percentile
from measure import ROOT, Goal, arguments, finish, machine_line, model_folder, run_hasten
from quality import sts
from served import hasten_server, serving
from shapes import DECODER_SHAPES, random_decoder
from soak import soak

sys.path.append(str(Path(__file__).resolve().parent / "peers"))
from catalogue import SERVER_PEERS, Entry, found

CLIENTS = 32
DEADLINE = 1.0


@dataclass(frozen=True)
class Plan:
    """How much to measure.

    Attributes:
        seconds: Of each load.
        overload: Seconds of the overload.
        soak: Seconds of the soak.
        kill: Seconds between two workers' ends in it.
        backends: Of sentence-transformers that the peer is tried with.
    """

    seconds: float
    overload: float
    soak: float
    kill: float
    backends: tuple[str, ...]


FULL = Plan(seconds=10.0, overload=60.0, soak=600.0, kill=30.0, backends=("torch", "onnx"))
QUICK = Plan(seconds=3.0, overload=10.0, soak=30.0, kill=10.0, backends=("torch",))


def requests_of(texts: Sequence[str], **fields: Any) -> list[dict[str, Any]]:
    """A request for each sentence, in the form that OpenAI's client sends by default."""
    return [{"model": "minilm", "input": text, "encoding_format": "base64", **fields} for text in texts]


def embeddings(bundle: Path, texts: Sequence[str], plan: Plan, peers: Sequence[Entry]) -> dict[str, Any]:
    """One client and many, and the peers; the server's share; latency at 80 % of saturation; urgent requests; hits."""
    ours = Load(0, "/v1/embeddings", requests_of(texts), seconds=plan.seconds)
    theirs = replace(ours, path="/embed", bodies=[{"texts": [text]} for text in texts], clients=CLIENTS)
    with ExitStack() as stack:
        server = stack.enter_context(serving(hasten_server({"minilm": bundle}), "/readyz"))
        ours = replace(ours, port=server.port)
        loads = {"one client": ours, "many clients": replace(ours, clients=CLIENTS)}
        for entry, backend in itertools.product(peers, plan.backends):
            command = [str(entry.python), str(entry.script), str(model_folder()), "{port}", backend]
            port = stack.enter_context(serving(command, "/embed")).port
            loads[f"{entry.title}, {backend}"] = replace(theirs, port=port)
        # In turn, so that the machine's moods meet all; the first round warms up.
        rounds = [{name: load_generator.run(load) for name, load in loads.items()} for _ in range(4)][1:]
        found = {name: summary(*(one[name] for one in rounds)) for name in loads}
    with serving(hasten_server({"minilm": bundle}), "/readyz") as server:
        ours = replace(ours, port=server.port)
        load_generator.run(replace(ours, clients=CLIENTS))
        rate = 0.8 * found["many clients"]["per second"]
        found["80 %"] = summary(*(load_generator.run(replace(ours, rate=rate, seed=seed)) for seed in range(3)))
        found["urgent"] = urgent(ours, plan)
        turns = [(load_generator.run(ours), engine_alone(bundle, texts, plan.seconds)) for _ in range(3)]
        found["over the engine"] = {
            "server p50 ms": summary(*(one for one, _ in turns))["p50 ms"],
            "engine p50 ms": median(alone for _, alone in turns),
        }
    with (
        tempfile.TemporaryDirectory() as cache,
        serving(hasten_server({"minilm": bundle}, "--cache", cache), "/readyz") as server,
    ):
        few = replace(ours, port=server.port, bodies=ours.bodies[:200])
        load_generator.run(few)
        found["cache hits"] = summary(load_generator.run(few))
    return found


def urgent(ours: Load, plan: Plan) -> dict[str, Any]:
    """p99 of rare urgent requests, alone and while many others flood the server."""

    def with_priority(priority: int) -> list[Any]:
        return [{**body, "priority": priority} for body in ours.bodies]

    rare = replace(ours, bodies=with_priority(10), rate=20.0, seconds=3 * plan.seconds)
    quiet = load_generator.run(rare)
    flood = replace(ours, bodies=with_priority(-10), clients=CLIENTS, seconds=3 * plan.seconds + 1.0)
    behind = load_generator.start(flood)
    time.sleep(0.5)
    loaded = load_generator.run(rare)
    return {
        "alone": summary(quiet),
        "in the flood": summary(loaded),
        "the flood": summary(load_generator.result(behind)),
    }


def engine_alone(bundle: Path, texts: Sequence[str], seconds: float) -> float:
    """p50 in milliseconds of `Engine.embed`, called one after another in this process."""
    import hasten

    async def measure() -> float:
        async with hasten.serve_engine(bundle) as engine:
            times = []
            end = time.perf_counter() + seconds
            for text in itertools.cycle(texts):
                begin = time.perf_counter()
                await engine.embed([text])
                times.append(time.perf_counter() - begin)
                if begin > end:
                    break
            return 1e3 * median(times)

    return asyncio.run(measure())


def overload(bundle: Path, texts: Sequence[str], plan: Plan) -> dict[str, Any]:
    """Twice the load that saturates it, each request with a deadline."""
    with serving(hasten_server({"minilm": bundle}), "/readyz") as server:
        bodies = requests_of(texts, timeout=DEADLINE)
        many = Load(server.port, "/v1/embeddings", bodies, clients=CLIENTS, seconds=plan.seconds)
        saturation = max(load_generator.run(many).rate for _ in range(2))
        before = server.rss()
        twice = Load(
            server.port,
            "/v1/embeddings",
            bodies,
            clients=4096,
            rate=2.0 * saturation,
            seconds=plan.overload,
            keep=False,
        )
        found = load_generator.run(twice)
        after = server.rss()
        again = load_generator.run(many)
    accepted = len(found.latencies) + found.late
    refused = percentile(found.refused, 0.99)
    return {
        "saturation": saturation,
        "found": summary(found),
        "accepted": accepted,
        "inside the deadline": sum(one <= DEADLINE for one in found.latencies) / max(1, accepted),
        "refused": len(found.refused),
        "refused within ms, p99": None if refused is None else 1e3 * refused,
        "rss growth": after / before - 1.0,
        "afterwards": summary(again),
    }


def chat(folder: Path, plan: Plan) -> dict[str, Any]:
    """Tokens a second of one client and of eight, streaming, on random weights."""
    model = random_decoder(folder / SMALL, DECODER_SHAPES[SMALL])
    bundle = folder / "chat-bundle"
    compile_one(model, bundle, str(ROOT / "benchmarks" / "recipes" / "int4-random.toml"))
    chance = random.Random(5)
    bodies = [
        {
            "model": "chat",
            "prompt": " ".join(f"w{chance.randrange(20, 31000)}" for _ in range(chance.randrange(16, 96))),
            "max_tokens": 64,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        for _ in range(64)
    ]
    with serving(hasten_server({"chat": bundle}), "/readyz") as server:

        def load(clients: int) -> Outcome:
            return load_generator.run(
                Load(server.port, "/v1/completions", bodies, clients=clients, seconds=2 * plan.seconds)
            )

        load(8)
        one, eight = zip(*((load(1), load(8)) for _ in range(2)), strict=True)
    rates = {
        name: median(found.tokens / found.seconds for found in some) for name, some in (("one", one), ("eight", eight))
    }
    firsts = {
        name: percentile([moment for found in some for moment in found.first], 0.5)
        for name, some in (("one", one), ("eight", eight))
    }
    return {
        "tokens/s": rates,
        "first token s, p50": firsts,
        "failed": [f for found in (*one, *eight) for f in found.failed],
    }


def summary(*found: Outcome) -> dict[str, Any]:
    """Rate and latencies, medians over the runs."""

    def ms(share: float) -> float | None:
        values = [value for one in found if (value := one.percentile(share)) is not None]
        return 1e3 * median(values) if values else None

    return {
        "per second": median(one.rate for one in found),
        "p50 ms": ms(0.5),
        "p99 ms": ms(0.99),
        "refused": sum(len(one.refused) for one in found),
        "late": sum(one.late for one in found),
        "failed": sorted({failure for one in found for failure in one.failed})[:5],
    }


def over(first: float | None, second: float | None) -> float | None:
    """Their ratio, where both are known."""
    return first / second if first is not None and second else None


def judge(figures: dict[str, Any]) -> list[Goal]:
    """The lines of the issue's table."""
    goals = []
    if part := figures.get("embeddings"):
        many, alone, calm = part["many clients"], part["one client"], part["80 %"]
        peers = [one["per second"] for name, one in part.items() if "sentence-transformers" in name]
        wait, shares = part["urgent"], part["over the engine"]
        best = max(peers, default=None)
        overhead = shares["server p50 ms"] - shares["engine p50 ms"]
        rushed = over(wait["in the flood"]["p99 ms"], wait["alone"]["p99 ms"])
        gain = over(many["per second"], alone["per second"])
        goals += [
            Goal(f"embeddings, {CLIENTS} clients over one", 3.0, True, "x", gain),
            Goal("the same over FastAPI + sentence-transformers", 6.0, True, "x", over(many["per second"], best)),
            Goal("server over engine, one client, p50", 2.0, False, "ms", overhead),
            Goal("p99 over p50 at 80 % of saturation", 4.0, False, "x", over(calm["p99 ms"], calm["p50 ms"])),
            Goal("urgent p99 in a flood over alone", 2.0, False, "x", rushed),
            Goal("cache hit, p50", 3.0, False, "ms", part["cache hits"]["p50 ms"]),
        ]
    if part := figures.get("overload"):
        goals += [
            Goal(
                "2x overload: accepted that were answered in time",
                99.0,
                True,
                "%",
                100 * part["inside the deadline"],
            ),
            Goal("2x overload: refusals, p99", 50.0, False, "ms", part["refused within ms, p99"]),
            Goal("2x overload: growth of memory", 10.0, False, "%", 100 * part["rss growth"]),
            Goal("2x overload: requests that failed", 0.0, False, "", float(len(part["found"]["failed"]))),
        ]
    if part := figures.get("chat"):
        rates = part["tokens/s"]
        goals.append(
            Goal("chat, 8 clients over one, tokens a second", 3.0, True, "x", over(rates["eight"], rates["one"]))
        )
    if part := figures.get("soak"):
        goals += [
            Goal("soak: requests lost", 0.0, False, "", float(len(part["failed"]) + part["refused"])),
            Goal("soak: answers that were another's", 0.0, False, "", float(sum(part["wrong"].values()))),
            Goal("soak: requests answered twice", 0.0, False, "", float(part["twice"])),
            Goal("soak: growth of memory", 10.0, False, "%", 100 * part["rss growth"]),
        ]
    return goals


def main() -> int:
    parser = arguments(__doc__, "short loads, and the peer with its default backend only")
    parser.add_argument("--only", choices=("embeddings", "overload", "chat", "soak"), help="one part")
    options = parser.parse_args()
    plan = QUICK if options.quick else FULL
    peers = found(SERVER_PEERS)
    figures: dict[str, Any] = {
        "machine": machine_line(),
        "peers found": [one.title for one in peers],
        "quick": options.quick,
    }
    print(f"{figures['machine']}\npeers found: {', '.join(figures['peers found']) or 'none'}\n", flush=True)
    dev = sts("dev")
    if dev is None:
        return 1
    texts = list(dict.fromkeys(dev.sentences))
    # STS-B stands by genre, captions of 34 characters and headlines of 103: sent as they stand, the load would rise and
    # fall threefold every few seconds, and 80 % of the mean be more than can be done while the headlines come.
    random.Random(0).shuffle(texts)
    with tempfile.TemporaryDirectory(prefix="hasten-benchmark-") as place:
        folder = Path(place)
        parts: dict[str, Callable[[Path], dict[str, Any]]] = {
            "embeddings": lambda bundle: embeddings(bundle, texts, plan, peers),
            "overload": lambda bundle: overload(bundle, texts, plan),
            "soak": lambda bundle: soak(bundle, texts, folder, plan.soak, plan.kill),
        }
        wanted = [name for name in (*parts, "chat") if options.only in (None, name)]
        if wanted != ["chat"]:
            run_hasten("compile", str(model_folder()), "-o", str(folder / "minilm"), "--target", "cpu", "--quiet")
        for name in wanted:
            figures[name] = chat(folder, plan) if name == "chat" else parts[name](folder / "minilm")
            print(f"{name}: {figures[name]}\n", flush=True)
    return finish(figures, judge(figures), options)


if __name__ == "__main__":
    sys.exit(main())
