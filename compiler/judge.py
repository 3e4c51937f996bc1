"""The gates. A change stays only if its numbers, its quality and its speed hold, each measured where it will run."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import TracebackType

from artifacts.errors import ProviderError
from artifacts.manifest import SessionOptions
from artifacts.proof import Fidelity
from runtimes.client import Ratio, Timings, Worker, interleave

from .candidate import Candidate, Trial, Verdict
from .evidence import Evidence
from .prove import LOSS

GAIN = 1.01
"""A change whose purpose is speed stays if it is at least this much faster, in the lower quartile of the rounds too."""
_TIERS = ((3, 0.10), (3, 0.03), (4, 0.0))
"""Rounds to measure, and how far beyond the line the quartiles must lie for no more to be needed. What is as close as
that is measured in new processes: two of one graph can differ by 3 % for as long as they live (`Worker.restart`)."""
DRIFT = 1.25
"""How much an exact change may add to the error of a quantized graph: it makes other values round the other way, which
leaves an error of the same size in other places."""
_SECONDS = 0.1


@dataclass
class Judge(AbstractContextManager["Judge"]):
    """Judges changes for one target, with the reigning candidate kept loaded in a process of its own.

    Attributes:
        evidence: Golden set, held-out data and quality budget.
        provider: Execution provider that the measurements run on.
        unmeasured: Why speed is not judged; empty where it is.
        threads: Threads of a session; 0: as many as there are cores.
        deferring: Exact changes of a graph whose weights wait in the checkpoint are judged together with the change
            that rounds those: nobody loads them in float32.
    """

    evidence: Evidence
    provider: str
    unmeasured: str = ""
    threads: int = 0
    deferring: bool = False
    _reigning: Worker | None = field(default=None, init=False)
    _rounding: float = field(default=0.0, init=False)
    _measured: dict[tuple[Path, SessionOptions], tuple[Fidelity, ...]] = field(default_factory=dict, init=False)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the child process."""
        self._crown(None)

    def enthrone(self, candidate: Candidate) -> Candidate:
        """Load ``candidate`` as the one that changes are compared with; its error is measured.

        Raises:
            ProviderError: It does not run, or its numbers are off by more than its tolerance.
        """
        self._rounding = candidate.tolerance
        if self._waits(candidate):
            return candidate
        worker = self._start(candidate)
        self._crown(worker)
        error = self._error(worker)
        if self.unmeasured:
            self._crown(None)  # nothing is timed next to it
        if error > candidate.tolerance:
            raise ProviderError(
                f"{self.provider} computes the unoptimized model wrongly: relative error {error:.1e}, "
                f"{candidate.tolerance:.1e} is what rounding allows",
                "Report this with the model's config; compile for another --target meanwhile",
            )
        return replace(candidate, error=error)

    def settled(self, candidate: Candidate) -> Candidate:
        """The candidate that a search ends with: run at last if its weights still wait; raises what `enthrone` does."""
        if not self._waits(candidate):
            return candidate
        self.deferring = False
        return self.enthrone(candidate)

    def judge(self, trial: Trial) -> Verdict:
        """Put ``trial`` through the gates; if it stays, it is what the next one is compared with."""
        if self._waits(trial.candidate) and not trial.lossy:
            return Verdict(True, "judged with what rounds the weights", trial.candidate)
        try:
            worker = self._start(trial.candidate)
        except ProviderError as error:
            return Verdict(False, f"does not load: {error.what}", trial.candidate)
        try:
            verdict = self._examine(trial, worker)
        except ProviderError as error:
            verdict = Verdict(False, f"does not run: {error.what}", trial.candidate)
        if verdict.kept:
            self._crown(worker)
        else:
            worker.close()
        return verdict

    def measured(self, candidate: Candidate) -> tuple[Fidelity, ...] | None:
        """The quality of a graph that went through the gates as it is now; None where none was measured."""
        return self._measured.get((candidate.graph.path, candidate.session))

    def shortfall(self, candidate: Candidate) -> str:
        """Empty if a candidate keeps the quality budget; else by how much it does not, or why it does not run."""
        try:
            with self._start(candidate) as worker:
                return self.evidence.shortfall(worker.run)
        except ProviderError as error:
            return error.what

    def _examine(self, trial: Trial, worker: Worker) -> Verdict:
        error = self._error(worker)
        candidate = replace(trial.candidate, error=error)
        if trial.lossy:
            fidelity = self.evidence.fidelity(worker.run)
            self._measured[candidate.graph.path, candidate.session] = fidelity
            if shortfall := self.evidence.exceeded(fidelity):
                return Verdict(False, f"quality: {shortfall}", candidate, miss=shortfall)
            # What the lossy step cost here, twice: kernels elsewhere may round the other way at every step.
            # Beyond 1 nothing of the original is left, whatever the metric says.
            candidate = replace(candidate, tolerance=max(candidate.tolerance, min(2.0 * error, 1.0)))
            allowed = candidate.tolerance
        else:
            allowed = min(candidate.tolerance, max(self._rounding, DRIFT * trial.candidate.error))
        if error > allowed:
            return Verdict(False, f"numbers: relative error {error:.1e} over {allowed:.1e}", candidate)
        if self.unmeasured:
            worker.close()  # it is not timed, and two of them take twice the memory
        unoptimized = self._unoptimized_error(candidate)
        if unoptimized > candidate.tolerance:
            text = f"numbers: {unoptimized:.1e} off without ONNX Runtime's optimizations, {error:.1e} with them"
            return Verdict(False, text, candidate)
        if self.unmeasured or trial.required:
            return Verdict(True, self.unmeasured or "the target needs it", candidate)
        return self._race(trial, worker, candidate)

    def _race(self, trial: Trial, worker: Worker, candidate: Candidate) -> Verdict:
        reigning = self._reigning
        if reigning is None:
            raise ProviderError("no candidate is loaded to compare with")
        timings = self._compare(reigning, worker, trial.must_gain)
        ratio = timings.ratio("before", "after")
        pays = ratio.low > 1.0 and ratio.median >= GAIN if trial.must_gain else ratio.high >= LOSS
        missed = trial.regardless or ("not faster" if trial.must_gain else "slower")
        verb = "" if pays else f": {missed}"
        kept = pays or bool(trial.regardless)
        ms = timings.ms("after", len(self.evidence.trial_feeds) - 1)
        return Verdict(kept, f"{ratio.median:.2f}x{verb}", candidate, ratio.median, ms)

    def _compare(self, before: Worker, after: Worker, must_gain: bool) -> Timings:
        workers, shapes = {"before": before, "after": after}, self.evidence.trial_feeds
        timings = interleave(workers, shapes, rounds=_TIERS[0][0], seconds=_SECONDS)
        for (_, margin), (more, _) in pairwise(_TIERS):
            if _decided(timings.ratio("before", "after"), must_gain, margin):
                break
            for worker in workers.values():
                worker.restart()
            timings += interleave(workers, shapes, rounds=more, seconds=_SECONDS)
        return timings

    def operators_at_load(self) -> set[str]:
        """Operator types of the graph that ONNX Runtime made of the reigning candidate when it loaded it.

        Empty where a provider compiles the nodes: then there is no such graph, and nothing of ONNX Runtime's to tune.
        """
        try:
            return set(self._reigning.optimized()) if self._reigning is not None else set()
        except ProviderError:
            return set()

    def _error(self, worker: Worker) -> float:
        return self.evidence.error(worker)

    def _unoptimized_error(self, candidate: Candidate) -> float:
        plain = replace(candidate, session=replace(candidate.session, optimization_level="disabled"))
        worker = self._start(plain)
        try:
            return self._error(worker)
        finally:
            worker.close()

    def _start(self, candidate: Candidate) -> Worker:
        return Worker(candidate.graph.path, self.provider, options=candidate.session, threads=self.threads)

    def _waits(self, candidate: Candidate) -> bool:
        return self.deferring and candidate.graph.pending

    def _crown(self, worker: Worker | None) -> None:
        if self._reigning is not None:
            self._reigning.close()
        self._reigning = worker


def _decided(ratio: Ratio, must_gain: bool, margin: float) -> bool:
    """Whether more rounds are not worth their time: it is clear, or the change has no claim that they could save."""
    if must_gain:
        return ratio.low > GAIN + margin or ratio.median < 1.0
    return ratio.median > 1.0 or ratio.high < LOSS - margin
