"""The proof of a variant: fidelity on held-out data, and speed next to the unoptimized graph in one interleaved run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from artifacts.bundle import Bundle
from artifacts.errors import ProviderError
from artifacts.manifest import SessionOptions, Variant
from artifacts.proof import Speed, VariantProof
from artifacts.target import CPU_PROVIDER, Target
from runtimes.client import Feeds, Timings, Worker, interleave
from runtimes.fingerprint import machine
from runtimes.golden import golden_error, load_golden
from runtimes.providers import probe

LOSS = 0.985
"""Slower is what has the upper quartile of its rounds below this. Quartiles, not a median: machines are noisy."""

Shapes = Mapping[tuple[int, int], Feeds]
_ROUNDS = 4
_SECONDS = 0.12


@dataclass(frozen=True)
class Runnable:
    """A graph with the way it is loaded."""

    path: Path
    provider: str
    session: SessionOptions

    def start(self, threads: int) -> Worker:
        """Load it in a child process.

        Raises:
            ProviderError: It does not load.
        """
        return Worker(self.path, self.provider, options=self.session, threads=threads)


def race(reference: Runnable, variant: Runnable, shapes: Shapes, threads: int) -> tuple[Speed, ...]:
    """Latency of both at every shape, in turn, each in a process of its own; a loss is raced again in new processes.

    Raises:
        ProviderError: One of them does not load or run.
    """
    timings = _timed(reference, variant, shapes, threads)
    if is_slower(_speeds(timings, shapes)):
        timings += _timed(reference, variant, shapes, threads)
    return _speeds(timings, shapes)


def _timed(reference: Runnable, variant: Runnable, shapes: Shapes, threads: int) -> Timings:
    with reference.start(threads) as slow, variant.start(threads) as fast:
        return interleave({"reference": slow, "variant": fast}, list(shapes.values()), rounds=_ROUNDS, seconds=_SECONDS)


def _speeds(timings: Timings, shapes: Shapes) -> tuple[Speed, ...]:
    speeds = []
    for index, (batch, length) in enumerate(shapes):
        ratio = timings.ratio("reference", "variant", index)
        times = timings.ms("reference", index), timings.ms("variant", index)
        speeds.append(Speed(batch, length, *times, ratio.median, ratio.low, ratio.high))
    return tuple(speeds)


def is_slower(speeds: tuple[Speed, ...]) -> bool:
    """Whether the variant is clearly slower than the reference at every shape."""
    return bool(speeds) and all(speed.high < LOSS for speed in speeds)


def prove_bundle(bundle: Bundle, threads: int) -> tuple[VariantProof, ...]:
    """Prove on this machine the variants that were compiled for another one.

    Numbers are the golden test within the variant's tolerance; speed is next to the first variant of the bundle that
    the CPU provider runs, if there is one. A variant that fails is refused: the loader never takes it.

    Returns:
        New proofs of the variants whose provider works here and which were unproven; the others as they were.
    """
    return tuple(_prove(bundle, variant, threads) for variant in bundle.manifest.variants)


def _prove(bundle: Bundle, variant: Variant, threads: int) -> VariantProof:
    before = bundle.proof.variant(variant.id)
    if before is None:
        before = VariantProof(variant.id, "unproven", "", None, 0.0, (), (), (), bundle.size(variant.id), "")
    provider = Target.parse(variant.target).provider
    if before.status == "proven":
        return before
    found = probe(provider)
    if not found.ok:
        return replace(before, reason=f"{provider} does not work here: {found.reason}")
    here = replace(before, provider=provider, machine=machine())
    runnable = Runnable(bundle.path / variant.model, provider, variant.session)
    golden = load_golden(bundle)
    try:
        with runnable.start(threads) as worker:
            error = golden_error(worker, golden)
        if not error <= variant.tolerance:
            reason = f"golden error {error:.1e}, allowed {variant.tolerance:.1e}"
            return replace(here, status="refused", golden_error=error, reason=reason)
        speeds = _race_the_rest(bundle, runnable, threads)
    except ProviderError as problem:
        return replace(here, status="refused", reason=problem.what)
    reason = "golden test and speed on its target; quality as measured at the compile"
    return replace(here, status="proven", golden_error=error, speed=speeds, reason=reason)


def _race_the_rest(bundle: Bundle, runnable: Runnable, threads: int) -> tuple[Speed, ...]:
    """Speed next to the first variant of the bundle that the CPU provider runs; none where there is no such variant."""
    for other in bundle.manifest.variants:
        if other.providers[0] == CPU_PROVIDER:
            reference = Runnable(bundle.path / other.model, CPU_PROVIDER, other.session)
            golden = load_golden(bundle).feeds
            batch, length = next(iter(golden.values())).shape[:2] if golden else (1, 1)
            return race(reference, runnable, {(int(batch), int(length)): golden}, threads)
    return ()
