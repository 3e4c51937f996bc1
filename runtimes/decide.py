"""Which variant on which provider: the fastest that computes correctly here, by evidence, remembered.

Candidates are the bundle's variants on each provider that they name. A candidate that the bundle's proof refused is
never used; one that it proves is preferred to one it does not. A lone candidate takes the golden test in this process;
several are loaded in child processes, take the golden test there, and are timed in turn on the golden inputs.
"""

from __future__ import annotations

import math
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from statistics import geometric_mean
from typing import TYPE_CHECKING

from artifacts.bundle import Bundle
from artifacts.errors import HastenError, ProviderError, UsageError
from artifacts.manifest import Variant
from artifacts.target import CPU_PROVIDER

from .golden import Golden, check_golden, golden_error, load_golden
from .providers import EXECUTION_PROVIDERS, built_in, find, parse_device, why_not
from .session import Session
from .settings import Settings, default_settings

if TYPE_CHECKING:
    from .client import Worker

PROBE_SECONDS = 120.0
_ROUNDS = 5
_BLOCK_SECONDS = 0.1
_NAMED_NODES = 3


@dataclass(frozen=True)
class CandidateResult:
    """What became of one variant on one provider.

    Attributes:
        variant: Its id.
        provider: Full name.
        device: ``cpu``, ``cuda:1``...
        status: ``chosen``, ``slower``, ``wrong`` (golden test), ``failed`` (to load or run), ``refused`` (by the proof)
            or ``untried`` (unproven, and a proven one served).
        proven: The bundle's proof covers this variant on this provider.
        error: Golden error, relative L2; None where it was not measured or is infinite.
        ms: Median milliseconds of the golden inputs (of a decoder: geometric mean of that and of a step of one text);
            None where it was not timed.
        fallback: Nodes that another provider runs.
        reason: One line.
    """

    variant: str
    provider: str
    device: str
    status: str
    proven: bool
    error: float | None
    ms: float | None
    fallback: tuple[str, ...]
    reason: str

    @property
    def name(self) -> str:
        """``variant on provider``, with the device where it is not the provider's first."""
        known = find(self.provider)
        place = known.short if self.device == known.devices[0] else f"{known.short} ({self.device})"
        return f"{self.variant} on {place}"


@dataclass(frozen=True)
class Decision:
    """What to load, and why.

    Attributes:
        variant: Its id.
        provider: Full name.
        device: ``cpu``, ``cuda:1``...
        reason: One line.
        candidates: All of them, with what became of each.
        cached: It was decided earlier.
    """

    variant: str
    provider: str
    device: str
    reason: str
    candidates: tuple[CandidateResult, ...]
    cached: bool


def decide(
    bundle: Bundle,
    *,
    device: str | None = None,
    provider: str | None = None,
    variant: str | None = None,
    threads: int = 0,
    cache: bool = True,
    timeout: float = PROBE_SECONDS,
) -> Decision:
    """The decision alone, as :func:`start` makes it. The golden test has passed when this returns.

    Raises:
        UsageError: No such device, provider or variant.
        ProviderError: No candidate runs the model correctly here; each one's reason is named.
    """
    decision, session = start(
        bundle, device=device, provider=provider, variant=variant, threads=threads, cache=cache, timeout=timeout
    )
    session.close()
    return decision


def start(
    bundle: Bundle,
    *,
    device: str | None = None,
    provider: str | None = None,
    variant: str | None = None,
    threads: int = 0,
    cache: bool = True,
    timeout: float = PROBE_SECONDS,
) -> tuple[Decision, Session]:
    """Decide, open the session in this process, and replay the golden test on it.

    Args:
        bundle: An open bundle.
        device: ``cpu``, ``cuda``, ``cuda:1``...; None for any.
        provider: Full or short name; None for any.
        variant: Id of a variant; None for any.
        threads: Threads within an operator; 0 means the physical cores this process may use.
        cache: Use and write the cached decision.
        timeout: Seconds for each step of a probing child.

    Raises:
        UsageError: No such device, provider or variant.
        ProviderError: No candidate runs the model correctly here; each one's reason is named.
    """
    from . import remember

    candidates = _candidates(bundle, device, provider, variant)
    trial = _Trial(bundle, load_golden(bundle), threads, cache, timeout)
    lone = _lone(candidates)
    if lone is not None:
        return trial.alone(candidates, lone)
    if not cache:
        return trial.compare(candidates)
    key = remember.key(bundle.digest, device, provider, variant, threads)
    known = remember.recall(key)
    if known is not None and (kept := _still_offered(known, candidates)) is not None:
        with suppress(ProviderError):  # Something changed that the fingerprint does not see: decide anew.
            return replace(known, cached=True), trial.open(kept)
    decision, session = trial.compare(candidates)
    remember.remember(key, decision)
    return decision, session


def widen(bundle: Bundle, decision: Decision, settings: Settings) -> Session:
    """The session that `start` opened once more, for ``settings.lanes`` runs at once; the golden test has passed.

    Raises:
        BundleError: The golden arrays cannot be read any more.
        ProviderError: It does not load, or computes wrong results.
    """
    chosen = next(one for one in decision.candidates if one.status == "chosen")
    return _open(bundle, load_golden(bundle), chosen, settings, wide=True)


def _open(
    bundle: Bundle, golden: Golden, candidate: CandidateResult, settings: Settings, *, wide: bool = False
) -> Session:
    """A session of this process that passed the golden test."""
    variant = bundle.variant(candidate.variant)
    session = Session(
        bundle.path / variant.model,
        candidate.provider,
        options=variant.session,
        device=candidate.device,
        settings=settings,
        wide=wide,
        record_assignment=candidate.provider != CPU_PROVIDER,
    )
    try:
        if bundle.manifest.generation is None:
            check_golden(session, golden, variant.tolerance, candidate.name)
        else:
            from .generate.check import check_decoder

            check_decoder(session, bundle.manifest.inputs_of(variant), golden, variant.tolerance, candidate.name)
    except HastenError:
        session.close()
        raise
    return session


def _candidates(
    bundle: Bundle, device: str | None, provider: str | None, variant: str | None
) -> tuple[CandidateResult, ...]:
    wanted_provider = find(provider).name if provider else None
    wanted_kind = parse_device(device)[0] if device else None
    if variant is not None and variant not in {known.id for known in bundle.manifest.variants}:
        known = ", ".join(known.id for known in bundle.manifest.variants)
        raise UsageError(f"the bundle has no variant {variant!r}", f"It has {known}")
    found: list[CandidateResult] = []
    for offered in bundle.manifest.variants:
        for execution_provider in EXECUTION_PROVIDERS:
            name, kinds = execution_provider.name, execution_provider.devices
            fits = (
                name in offered.providers
                and variant in (None, offered.id)
                and wanted_provider in (None, name)
                and (wanted_kind is None or wanted_kind in kinds)
            )
            if fits:
                found.append(_candidate(bundle, offered, name, device or kinds[0]))
    if not found:
        asked = ", ".join(f"{key} {value}" for key, value in (("device", device), ("provider", provider)) if value)
        offers = "; ".join(
            f"{known.id}: {', '.join(find_short(name) for name in known.providers)}"
            for known in bundle.manifest.variants
        )
        raise ProviderError(f"no variant of the bundle is made for {asked or 'this runtime'}", f"It has {offers}")
    return tuple(found)


def find_short(provider: str) -> str:
    """The short name of a provider; an unknown one's own name."""
    return next((known.short for known in EXECUTION_PROVIDERS if known.name == provider), provider)


def _candidate(bundle: Bundle, variant: Variant, provider: str, device: str) -> CandidateResult:
    proof = bundle.proof.variant(variant.id)
    refused = proof is not None and proof.status == "refused"
    proven = proof is not None and proof.status == "proven" and proof.provider == provider
    status, reason = "untried", "" if proven else "unproven here; `hasten prove` measures it"
    if proof is not None and refused:
        status, reason = "refused", f"the proof refuses it: {proof.reason}"
    elif not built_in(provider):
        status, reason = "failed", why_not(provider)
    return CandidateResult(variant.id, provider, device, status, proven, None, None, (), reason)


def _lone(candidates: tuple[CandidateResult, ...]) -> CandidateResult | None:
    """The candidate that needs no comparison: the only one, or the only proven one if it runs on the CPU provider."""
    open_ones = [candidate for candidate in candidates if candidate.status == "untried"]
    if len(open_ones) == 1:
        return open_ones[0]
    proven = [candidate for candidate in open_ones if candidate.proven]
    return proven[0] if len(proven) == 1 and proven[0].provider == CPU_PROVIDER else None


def _still_offered(decision: Decision, candidates: tuple[CandidateResult, ...]) -> CandidateResult | None:
    decided = (decision.variant, decision.provider, decision.device, True)
    return next((c for c in candidates if (c.variant, c.provider, c.device, c.status == "untried") == decided), None)


@dataclass(frozen=True)
class _Trial:
    """Candidates put to the test."""

    bundle: Bundle
    golden: Golden
    threads: int
    cache: bool
    timeout: float

    def alone(self, candidates: tuple[CandidateResult, ...], lone: CandidateResult) -> tuple[Decision, Session]:
        """The lone candidate, tested in this process."""
        try:
            session = self.open(lone)
        except ProviderError as error:
            failed = replace(lone, status="failed", reason=error.what)
            raise _nothing_works(tuple(failed if c == lone else c for c in candidates)) from error
        fallback = () if lone.provider == CPU_PROVIDER else session.fallback()
        chosen = replace(lone, status="chosen", fallback=fallback, reason="the golden test passed")
        return _decision(chosen, tuple(chosen if c == lone else c for c in candidates)), session

    def compare(self, candidates: tuple[CandidateResult, ...]) -> tuple[Decision, Session]:
        """The fastest correct one of the proven candidates; of the unproven only if none of those works."""
        results = {(c.variant, c.provider): c for c in candidates}
        for proven in (True, False):
            tier = [c for c in results.values() if c.status == "untried" and c.proven is proven]
            results |= {(r.variant, r.provider): r for r in self.measure(tier)}
            timed = [result for result in results.values() if result.ms is not None]
            for chosen in sorted(timed, key=lambda result: result.ms or 0.0):
                self.tune(chosen)
                try:
                    session = self.open(chosen)
                except ProviderError as error:  # It worked in the child, and does not here.
                    failed = replace(chosen, status="failed", ms=None, reason=error.what)
                    results[chosen.variant, chosen.provider] = failed
                    continue
                placed = tuple(_placed(result, chosen) for result in results.values())
                return _decision(_placed(chosen, chosen), placed), session
        raise _nothing_works(tuple(results.values()))

    def open(self, candidate: CandidateResult) -> Session:
        """A session of this process that passed the golden test, with the settings tuned for it, if it was tuned."""
        from . import remember

        about = candidate.variant, candidate.provider, candidate.device, self.threads
        settings = remember.recall_settings(self.bundle.digest, *about) if self.cache else None
        return _open(self.bundle, self.golden, candidate, settings or default_settings(*about[1:]))

    def tune(self, chosen: CandidateResult) -> None:
        """Tune the settings for a candidate that was compared, where they can be kept."""
        if self.cache:
            from .tune import tune_at_load

            about = chosen.variant, chosen.provider, chosen.device, self.threads
            tune_at_load(self.bundle, *about, ms=chosen.ms or 0.0)

    def measure(self, tier: list[CandidateResult]) -> list[CandidateResult]:
        """Each candidate loaded and tested in a child of its own; those that are correct timed in turn."""
        from .client import interleave
        from .generate.feeds import written_step

        results: list[CandidateResult] = []
        correct: dict[str, CandidateResult] = {}
        workers: dict[str, Worker] = {}
        with ExitStack() as stack:
            for candidate in tier:
                try:
                    worker = stack.enter_context(self._worker(candidate))
                    tested = self._tested(candidate, worker)
                except ProviderError as failure:
                    tested = replace(candidate, status="failed", reason=failure.what)
                if tested.status == "untried":
                    correct[tested.name], workers[tested.name] = tested, worker
                else:
                    results.append(tested)
            if not correct:
                return results
            try:
                writes = self.bundle.manifest.generation is not None
                shapes = [self.golden.feeds, *([written_step(self.bundle.manifest)] if writes else [])]
                timings = interleave(workers, shapes, rounds=_ROUNDS, seconds=_BLOCK_SECONDS)
            except ProviderError as failure:  # A child died under load: time each by itself.
                if len(correct) == 1:
                    only = next(iter(correct.values()))
                    return [*results, replace(only, status="failed", reason=failure.what)]
                return [*results, *(result for one in correct.values() for result in self.measure([one]))]
            ms = {name: geometric_mean(timings.ms(name, index) for index in range(len(shapes))) for name in correct}
            return [*results, *(replace(one, ms=ms[name]) for name, one in correct.items())]

    def _worker(self, candidate: CandidateResult) -> Worker:
        from .client import Worker

        variant = self.bundle.variant(candidate.variant)
        return Worker(
            self.bundle.path / variant.model,
            candidate.provider,
            options=variant.session,
            device=candidate.device,
            threads=self.threads,
            timeout=self.timeout,
        )

    def _tested(self, candidate: CandidateResult, worker: Worker) -> CandidateResult:
        tolerance = self.bundle.variant(candidate.variant).tolerance
        error = golden_error(worker, self.golden)
        if not error <= tolerance:
            measured = error if math.isfinite(error) else None
            reason = f"golden error {error:.2g}, allowed {tolerance:.2g}"
            return replace(candidate, status="wrong", error=measured, reason=reason)
        return replace(candidate, error=error, fallback=worker.fallback())


def _placed(result: CandidateResult, chosen: CandidateResult) -> CandidateResult:
    if result.ms is None or chosen.ms is None:
        return result
    if result == chosen:
        return replace(result, status="chosen", reason=f"{result.ms:.3g} ms on the golden inputs")
    return replace(result, status="slower", reason=f"{result.ms:.3g} ms, {result.ms / chosen.ms:.2f} times the chosen")


def _decision(chosen: CandidateResult, results: tuple[CandidateResult, ...]) -> Decision:
    others = [result for result in results if result.status == "slower" and result.ms is not None]
    if chosen.ms is not None and others:
        nearest = min(others, key=lambda result: result.ms or math.inf)
        ratio = (nearest.ms or math.inf) / chosen.ms
        reason = f"{chosen.name}: {ratio:.2f} times as fast as {nearest.name}, {len(others) + 1} candidates work here"
    else:
        tried = [result for result in results if result.status in ("wrong", "failed", "refused")]
        untried = any(result.status == "untried" and result is not chosen for result in results)
        kind = "only proven candidate" if untried else "only candidate that works here" if tried else "only candidate"
        reason = f"{chosen.name}: the {kind}"
    if chosen.fallback:
        named = ", ".join(chosen.fallback[:_NAMED_NODES])
        more = f" and {len(chosen.fallback) - _NAMED_NODES} more" if len(chosen.fallback) > _NAMED_NODES else ""
        reason += f"; it leaves {named}{more} to another provider"
    if not chosen.proven:
        reason += "; unproven on this provider: run `hasten prove` to measure its quality and speed"
    return Decision(chosen.variant, chosen.provider, chosen.device, reason, results, cached=False)


def _nothing_works(candidates: tuple[CandidateResult, ...]) -> ProviderError:
    reasons = "; ".join(f"{candidate.name}: {candidate.reason}" for candidate in candidates)
    return ProviderError(f"nothing here runs this bundle correctly. {reasons}", "`hasten doctor` says more")
