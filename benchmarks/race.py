"""Contenders timed in turn, each in its own process and environment: one computes, all others wait.

The processes are started several times, because where a process happens to lie in memory moves its speed by up to a
tenth. In each round every contender has a short block at each shape; ratios are taken within a round.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from artifacts.errors import HastenError
from runtimes.client import Ratio, Timings
from runtimes.peers import Peer

SHAPES = ((1, 32), (1, 128), (16, 128))
"""(batch, length) at which encoders are compared."""
LOAD_SECONDS = 3600.0
_SETTLE_SECONDS = 0.05
_WARM_UP_SECONDS = 0.1
_WITHIN_REACH = 1.5
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1"}


@dataclass(frozen=True)
class Contender:
    """A process that speaks the protocol of docs/peers.md.

    Attributes:
        name: Unique.
        command: How to start it.
        model: What it loads.
        environment: Variables set for it.
        ours: Whether it is hasten.
    """

    name: str
    command: tuple[str, ...]
    model: Path
    environment: Mapping[str, str]
    ours: bool = False


@dataclass(frozen=True)
class Measure:
    """What is asked for in a block: a request of the protocol.

    Attributes:
        name: As in the results: ``16x128``, ``decode 1``.
        operation: The request's ``op``.
        fields: Its other fields; ``seconds``, where a block has them, is the plan's.
    """

    name: str
    operation: str
    fields: Mapping[str, object]


ENCODER_MEASURES = tuple(
    Measure(f"{batch}x{length}", "time", {"batch": batch, "length": length}) for batch, length in SHAPES
)


@dataclass(frozen=True)
class Plan:
    """How much to measure.

    Attributes:
        restarts: Times that all processes are started.
        rounds: Blocks of each contender at each shape, a start.
        seconds: Length of a block.
        text_rounds: Times that all sentences are embedded, a start; 0: never.
        measures: What a block may be.
    """

    restarts: int
    rounds: int
    seconds: float
    text_rounds: int
    measures: tuple[Measure, ...] = ENCODER_MEASURES


@dataclass(frozen=True)
class Texts:
    """Files of a text a line.

    Attributes:
        calibration: For peers that calibrate.
        warm_up: Embedded once, not timed; its vectors are kept.
        all: Embedded in the rounds; the count of its lines.
        count: Lines of ``all``.
        vectors: Folder that gets ``<contender>.npy``, the vectors of ``warm_up``.
    """

    calibration: Path
    warm_up: Path
    all: Path
    count: int
    vectors: Path


@dataclass
class Result:
    """What one contender did.

    Attributes:
        ours: Whether it is hasten.
        loaded: What it said of itself when it was loaded.
        ms: Shape, as ``16x128`` -> round -> milliseconds, the median of a block.
        per_second: Round -> sentences a second, from strings to vectors.
        chosen: Shape, or ``texts`` -> the setting that was fastest, for each start.
        tried: The same -> setting -> milliseconds when it was chosen, in the last start.
        quality: See `quality.compare_vectors`; empty if not measured.
    """

    ours: bool
    loaded: dict[str, Any]
    ms: dict[str, list[float]] = field(default_factory=dict)
    per_second: list[float] = field(default_factory=list)
    chosen: dict[str, list[str]] = field(default_factory=dict)
    tried: dict[str, dict[str, float]] = field(default_factory=dict)
    quality: dict[str, float] = field(default_factory=dict)


class Race:
    """Run with `run`; what came of it is in ``results``, and who fell out and why in ``failed``.

    What a contender did before it fell out stays: a peer that crashes late was as fast as it was.
    """

    def __init__(self, contenders: Sequence[Contender], plan: Plan, texts: Texts, work: Path) -> None:
        self.results: dict[str, Result] = {}
        self.failed: dict[str, str] = {}
        self._contenders = {one.name: one for one in contenders}
        self._plan = plan
        self._texts = texts
        self._work = work

    def run(self) -> None:
        """Prepare every contender alone, then start all of them, again and again."""
        for name, contender in list(self._contenders.items()):
            print(f"preparing {name}", flush=True)
            with ExitStack() as stack:
                self._start(contender, stack)
        for start in range(self._plan.restarts):
            print(f"start {start + 1} of {self._plan.restarts}", flush=True)
            with ExitStack() as stack:
                running = {name: self._start(one, stack) for name, one in list(self._contenders.items())}
                peers = {name: peer for name, peer in running.items() if peer is not None}
                self._blocks(peers)
                if self._plan.text_rounds:
                    self._embed(peers)

    def best_peer(self, measure: str) -> str | None:
        """Who, of those that are not ours, was the fastest at a shape or at ``texts``; None without any."""
        costs = {name: self.cost(name, measure) for name, result in self.results.items() if not result.ours}
        known = {name: cost for name, cost in costs.items() if cost is not None}
        return min(known, key=known.__getitem__) if known else None

    def cost(self, name: str, measure: str) -> float | None:
        """Median milliseconds at a shape, or seconds a sentence at ``texts``."""
        costs = _costs(self.results[name], measure) if name in self.results else []
        return median(costs) if costs else None

    def ratio(self, ours: str, theirs: str, measure: str) -> Ratio | None:
        """How many times faster we are: within each round, median and quartiles over the rounds."""
        if ours not in self.results or theirs not in self.results:
            return None
        pairs = list(zip(*(_costs(self.results[name], measure) for name in (ours, theirs)), strict=False))
        if not pairs:
            return None
        mine, its = zip(*pairs, strict=True)
        return Timings({"mine": (mine,), "its": (its,)}).ratio("its", "mine", 0)

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        results = {name: dataclasses.asdict(result) for name, result in self.results.items()}
        return {"plan": dataclasses.asdict(self._plan), "contenders": results, "failed": self.failed}

    def _start(self, contender: Contender, stack: ExitStack) -> Peer | None:
        try:
            environment = {**ENVIRONMENT, **contender.environment}
            peer = Peer(contender.name, contender.command, timeout=LOAD_SECONDS, environment=environment)
            stack.enter_context(peer)
            request = {
                "model": str(contender.model),
                "texts": str(self._texts.calibration),
                "work": str(self._work / contender.name),
            }
            loaded = peer.ask("load", request)
        except HastenError as error:
            self._drop(contender.name, error)
            return None
        self.results.setdefault(contender.name, Result(contender.ours, {}))
        if not self.results[contender.name].loaded:  # the first time, which made what takes long to make
            self.results[contender.name].loaded = {key: value for key, value in loaded.items() if key != "ok"}
        return peer

    def _drop(self, name: str, error: HastenError) -> None:
        print(f"{name} is out: {error}", flush=True)
        self.failed[name] = str(error)
        self._contenders.pop(name, None)

    def _blocks(self, peers: dict[str, Peer]) -> None:
        for turn in range(-1, self._plan.rounds):  # turn -1: settings are tried, nothing is kept
            for measure in self._plan.measures:
                seconds = self._plan.seconds if turn >= 0 else _WARM_UP_SECONDS
                for name in _rotated(list(peers), turn):
                    self._block(peers, name, measure, seconds, keep=turn >= 0)

    def _block(self, peers: dict[str, Peer], name: str, measure: Measure, seconds: float, *, keep: bool) -> None:
        time.sleep(_SETTLE_SECONDS)
        key = measure.name
        try:
            reply = peers[name].ask(measure.operation, {**measure.fields, "seconds": seconds}, extra=seconds)
        except HastenError as error:
            peers.pop(name).close()
            self._drop(name, error)
            return
        result = self.results[name]
        if keep:
            result.ms.setdefault(key, []).append(1e3 * median(reply["seconds"][1:]))
        else:
            result.chosen.setdefault(key, []).append(reply["chosen"])
            result.tried[key] = reply["tried"]

    def _embed(self, peers: dict[str, Peer]) -> None:
        for name in list(peers):
            self._embed_once(peers, name, self._texts.warm_up, keep=False)
        for turn in range(self._plan.text_rounds):
            for name in _rotated(list(peers), turn):
                if self._within_reach(name):
                    self._embed_once(peers, name, self._texts.all, keep=True)

    def _embed_once(self, peers: dict[str, Peer], name: str, texts: Path, *, keep: bool) -> None:
        time.sleep(_SETTLE_SECONDS)
        out = self._texts.vectors / f"{'all' if keep else name}.npy"
        try:
            reply = peers[name].ask("embed", {"texts": str(texts), "out": str(out)})
        except HastenError as error:
            peers.pop(name).close()
            self._drop(name, error)
            return
        result = self.results[name]
        if keep:
            result.per_second.append(self._texts.count / reply["seconds"])
        else:
            result.chosen.setdefault("texts", []).append(reply["chosen"])
            result.tried["texts"] = reply["tried"]

    def _within_reach(self, name: str) -> bool:
        """Whether a contender may still be the best: texts take long, and a peer far behind need not prove it again."""
        best, mine = self.best_peer("texts"), self.cost(name, "texts")
        if self.results[name].ours or best is None or mine is None:
            return True
        return mine <= _WITHIN_REACH * (self.cost(best, "texts") or mine)


def _costs(result: Result, measure: str) -> list[float]:
    return [1.0 / rate for rate in result.per_second] if measure == "texts" else result.ms.get(measure, [])


def _rotated(names: list[str], turn: int) -> list[str]:
    """Another one goes first in each round."""
    start = turn % len(names) if names else 0
    return names[start:] + names[:start]
