"""How fast a bundle is here: latency and throughput over batch and length, and the ratio to another one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from artifacts.bundle import Bundle, open_bundle
from artifacts.errors import UsageError
from artifacts.manifest import TensorSpec
from artifacts.proof import Machine
from artifacts.signature import STEP_INPUTS

from .client import Feeds, Ratio, Timings, Worker
from .decide import Decision, decide, find_short
from .fingerprint import machine
from .golden import load_golden
from .peers import ANSWER_SECONDS, Peer

REFERENCE = "reference"
"""Id of the variant that `--keep-reference` leaves in a bundle."""
ROUNDS = 5
"""Blocks that the measuring of one model at one shape is split into, so that noise meets both models alike."""
OURS, THEIRS = "ours", "theirs"
"""The bundle that is measured, and what it is compared with."""
_PEER = "peer "
_SEED = 20

Shape = tuple[int, int]
"""Rows, and tokens of a row."""
Timer = Callable[[Shape, Feeds, float], list[float]]
"""Shape, feeds of that shape, seconds to measure for -> seconds of each call."""


@dataclass(frozen=True)
class PeerResult:
    """What a program outside hasten did, see docs/peers.md.

    Attributes:
        name: What the user calls it.
        ms: Median latency of a call, milliseconds; None over all shapes.
        ratio: How many times faster the bundle is, with quartiles over the rounds.
    """

    name: str
    ms: float | None
    ratio: Ratio


@dataclass(frozen=True)
class BenchRow:
    """One shape.

    Attributes:
        batch: Rows of the inputs.
        length: Tokens of each row, all attended.
        p50_ms: Median latency of a call, milliseconds.
        p90_ms: 90th percentile.
        p99_ms: 99th percentile.
        per_second: Rows per second.
        calls: Calls measured.
        against_ms: Median latency of the other model; None without one.
        ratio: How many times faster than the other model, with quartiles over the rounds; None without one.
        peers: The programs that it was compared with.
    """

    batch: int
    length: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    per_second: float
    calls: int
    against_ms: float | None = None
    ratio: Ratio | None = None
    peers: tuple[PeerResult, ...] = ()


@dataclass(frozen=True)
class Report:
    """What was measured, and on what.

    Attributes:
        name: Name of the model.
        variant: Variant measured.
        provider: Execution provider it ran on.
        device: Device it ran on.
        threads: Threads within an operator; 0: one a physical core.
        against: What it was compared with: ``variant on provider``, after the path if another bundle; empty: nothing.
        machine: This machine.
    """

    name: str
    variant: str
    provider: str
    device: str
    threads: int
    against: str
    machine: Machine

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class BenchReport(Report):
    """What `bench` measured.

    Attributes:
        rows: A row a shape.
        ratio: How many times faster over all shapes (geometric mean); None without a comparison.
        peers: The same for each program that it was compared with.
    """

    rows: tuple[BenchRow, ...]
    ratio: Ratio | None
    peers: tuple[PeerResult, ...] = ()


@dataclass(frozen=True)
class Compared:
    """Our model and the one that it is compared with.

    Attributes:
        models: `OURS`, and `THEIRS` where there is one -> bundle and what of it runs where.
        against: What the user called the other; None without one.
        threads: Threads within an operator; 0: one a physical core.
    """

    models: Mapping[str, tuple[Bundle, Decision]]
    against: str | Path | None
    threads: int

    def facts(self) -> dict[str, Any]:
        """The fields of a `Report`."""
        bundle, chosen = self.models[OURS]
        told = {"variant": chosen.variant, "provider": chosen.provider, "device": chosen.device}
        against = self._named(self.models[THEIRS][1]) if THEIRS in self.models else ""
        return {"name": bundle.manifest.name, **told, "threads": self.threads, "against": against, "machine": machine()}

    def _named(self, decision: Decision) -> str:
        where = "" if self.against == REFERENCE else f"{self.against}: "
        return f"{where}{decision.variant} on {find_short(decision.provider)}"


def bench(
    bundle: Bundle,
    *,
    variant: str | None = None,
    against: str | Path | None = None,
    batches: Sequence[int] = (1, 16),
    lengths: Sequence[int] = (32, 128),
    seconds: float = 1.0,
    threads: int = 0,
    device: str | None = None,
    provider: str | None = None,
    peers: Mapping[str, Sequence[str]] | None = None,
    peer_timeout: float = ANSWER_SECONDS,
) -> BenchReport:
    """Measure a bundle, each model in a child process of its own; what is compared in turn, A B A B.

    Inputs are random ids within the range of the golden inputs', every token attended. A peer makes its own.

    Args:
        bundle: The bundle.
        variant: Which variant; None: the one that `load` would choose.
        against: ``"reference"``: that variant of the same bundle. Else the path of another bundle.
        batches: Rows.
        lengths: Tokens a row.
        seconds: Seconds of measuring for each model and shape, warm-up not counted.
        threads: Threads within an operator; 0: one a physical core.
        device: ``cpu``, ``cuda:1``...; None: any.
        provider: Execution provider; None: any.
        peers: Name -> command of programs outside hasten to compare with; they speak the protocol of docs/peers.md.
        peer_timeout: Seconds that an answer of a peer may take, beyond what it measures.

    Raises:
        UsageError: A number is not positive, a length is beyond the model's, there is no such variant, no reference in
            the bundle, the other bundle takes other inputs, or a peer's program is not found.
        ProviderError: A model does not run here, or a peer does not do its part.
    """
    check_numbers(batches, lengths, seconds, threads)
    processor = bundle.manifest.processor
    if processor is not None and max(lengths) > processor.max_length:
        raise UsageError(
            f"length {max(lengths)} is beyond the model's {processor.max_length} tokens", "Give a shorter one"
        )
    found = compared(bundle, variant=variant, against=against, threads=threads, device=device, provider=provider)
    shapes = _shapes(bundle, batches, lengths)
    with ExitStack() as stack:
        timers = _peer_timers(stack, peers or {}, peer_timeout) | _timers(stack, found.models, threads)
        times = _measure(timers, shapes, seconds)
    timings = Timings({name: tuple(map(_medians, shape_times)) for name, shape_times in times.items()})
    return BenchReport(
        **found.facts(),
        rows=tuple(_row(times, timings, index, shape) for index, (shape, _) in enumerate(shapes)),
        ratio=timings.ratio(THEIRS, OURS) if THEIRS in found.models else None,
        peers=_peer_results(timings, None),
    )


def check_numbers(batches: Sequence[int], lengths: Sequence[int], seconds: float, threads: int) -> None:
    """Refuse what nothing can be measured with.

    Raises:
        UsageError: A number is not positive, or there is none.
    """
    for name, values in (("batches", batches), ("lengths", lengths)):
        if not values or any(value < 1 for value in values):
            raise UsageError(f"{name} {list(values)} are not positive numbers", "Give at least one, each >= 1")
    if not seconds > 0.0 or threads < 0:
        raise UsageError(f"seconds is {seconds}, threads is {threads}", "seconds > 0; threads >= 0, 0 for all cores")


def compared(
    bundle: Bundle,
    *,
    variant: str | None,
    against: str | Path | None,
    threads: int,
    device: str | None,
    provider: str | None,
) -> Compared:
    """Choose what of a bundle is measured, and the same of what it is compared with; arguments as of `bench`.

    Raises:
        UsageError: There is no such variant, no reference in the bundle, or the other bundle takes other inputs.
        ProviderError: A model does not run here.
    """
    other, wanted = _opponent(bundle, against)
    chosen = decide(bundle, device=device, provider=provider, variant=variant, threads=threads)
    models = {OURS: (bundle, chosen)}
    if other is not None:
        models[THEIRS] = other, decide(other, device=device, variant=wanted, threads=threads)
    return Compared(models, against, threads)


def _opponent(bundle: Bundle, against: str | Path | None) -> tuple[Bundle | None, str | None]:
    """The other bundle, and which variant of it (None: the one that `load` would choose)."""
    if against is None:
        return None, None
    if against == REFERENCE:
        if all(variant.id != REFERENCE for variant in bundle.manifest.variants):
            raise UsageError(f"{bundle.path} holds no reference variant", "Compile it with --keep-reference")
        return bundle, REFERENCE
    other = open_bundle(Path(against))
    mine, its = _inputs(bundle), _inputs(other)
    if mine != its:
        raise UsageError(
            f"{against} takes {', '.join(its)}, not {', '.join(mine)}", "Compare models of the same inputs"
        )
    return other, None


def _inputs(bundle: Bundle) -> list[str]:
    """Names of the inputs that a user gives; decoders of any depth compare."""
    manifest = bundle.manifest
    given = manifest.inputs if manifest.generation is None else manifest.inputs[: len(STEP_INPUTS)]
    return sorted(spec.name for spec in given)


def _medians(blocks: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """Milliseconds of each round."""
    return tuple(median(block) * 1e3 for block in blocks)


def _shapes(bundle: Bundle, batches: Sequence[int], lengths: Sequence[int]) -> list[tuple[Shape, Feeds]]:
    """(batch, length) and feeds of each shape; a graph with fixed extents has fewer shapes than asked for."""
    manifest = bundle.manifest
    if manifest.generation is not None:
        from .generate.feeds import prompt_feeds  # what is written is measured by runtimes.generate.bench

        return [((batch, length), prompt_feeds(manifest, batch, length)) for batch in batches for length in lengths]
    golden = load_golden(bundle).feeds
    rng = np.random.default_rng(_SEED)
    found: dict[Shape, Feeds] = {}
    for batch in batches:
        for length in lengths:
            feeds = {s.name: synthetic(s, golden[s.name], batch, length, rng) for s in manifest.inputs}
            first = next(iter(feeds.values())).shape
            found.setdefault((first[0] if first else 1, first[1] if len(first) > 1 else length), feeds)
    return list(found.items())


def synthetic(
    spec: TensorSpec, golden: NDArray[Any], batch: int, length: int, rng: np.random.Generator
) -> NDArray[Any]:
    """A random array for an input, within the range of its golden values; masks all ones, token types all the lowest.

    A dynamic first axis becomes ``batch``, every other dynamic axis ``length``.
    """
    shape = tuple(
        extent if isinstance(extent, int) else (length if axis else batch) for axis, extent in enumerate(spec.shape)
    )
    if "mask" in spec.name:
        return np.ones(shape, golden.dtype)
    low, high = (golden.min(), golden.max()) if golden.size else (golden.dtype.type(0), golden.dtype.type(1))
    if "type" in spec.name or golden.dtype.kind == "b":
        return np.full(shape, low, golden.dtype)
    if golden.dtype.kind in "iu":
        return rng.integers(low, high, shape, golden.dtype, endpoint=True)
    return rng.uniform(float(low), float(high), shape).astype(golden.dtype)


def _measure(
    timers: Mapping[str, Timer], shapes: Sequence[tuple[Shape, Feeds]], seconds: float
) -> dict[str, list[list[list[float]]]]:
    """Model -> shape -> round -> seconds of each call."""
    times: dict[str, list[list[list[float]]]] = {name: [[] for _ in shapes] for name in timers}
    for _ in range(ROUNDS):
        for index, shape in enumerate(shapes):
            for name, timer in timers.items():
                times[name][index].append(timer(*shape, seconds / ROUNDS))
    return times


def _timers(stack: ExitStack, models: Mapping[str, tuple[Bundle, Decision]], threads: int) -> dict[str, Timer]:
    def timer(worker: Worker) -> Timer:
        return lambda _, feeds, seconds: worker.time(feeds, seconds=seconds)

    return {name: timer(stack.enter_context(_worker(*model, threads))) for name, model in models.items()}


def _peer_timers(stack: ExitStack, commands: Mapping[str, Sequence[str]], timeout: float) -> dict[str, Timer]:
    def timer(peer: Peer) -> Timer:
        return lambda shape, _, seconds: peer.time(*shape, seconds)

    return {
        _PEER + name: timer(stack.enter_context(Peer(name, command, timeout=timeout)))
        for name, command in commands.items()
    }


def _worker(bundle: Bundle, decision: Decision, threads: int) -> Worker:
    variant = bundle.variant(decision.variant)
    model = bundle.path / variant.model
    return Worker(model, decision.provider, options=variant.session, device=decision.device, threads=threads)


def _row(times: Mapping[str, list[list[list[float]]]], timings: Timings, index: int, shape: Shape) -> BenchRow:
    calls = np.concatenate(times[OURS][index]) * 1e3
    p50, p90, p99 = (float(value) for value in np.percentile(calls, (50, 90, 99)))
    compared = THEIRS in times
    return BenchRow(
        batch=shape[0],
        length=shape[1],
        p50_ms=p50,
        p90_ms=p90,
        p99_ms=p99,
        per_second=shape[0] / (float(calls.mean()) / 1e3),
        calls=len(calls),
        against_ms=timings.ms(THEIRS, index) if compared else None,
        ratio=timings.ratio(THEIRS, OURS, index) if compared else None,
        peers=_peer_results(timings, index),
    )


def _peer_results(timings: Timings, index: int | None) -> tuple[PeerResult, ...]:
    """At one shape, or over all of them."""
    return tuple(
        PeerResult(
            name=name.removeprefix(_PEER),
            ms=None if index is None else timings.ms(name, index),
            ratio=timings.ratio(name, OURS, index),
        )
        for name in timings.rounds
        if name.startswith(_PEER)
    )
