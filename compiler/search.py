"""The search: each stage of the recipe in turn, kept if the gates let it stand; then ONNX Runtime's own optimizers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from artifacts.errors import FidelityError, PassError, UnsupportedError
from artifacts.manifest import SessionOptions
from artifacts.proof import Step
from passes.base import Context, Outcome, Pass, Purpose
from passes.grammar import check
from passes.observers import Reproducer, Verifying
from passes.pipeline import Pipeline
from passes.registry import CLEAN
from passes.repair import Repair

from .candidate import Candidate, Trial, Verdict, is_lossy
from .choose import Assignment, Chooser
from .compression import NOTHING, split
from .graphs import GraphFolder
from .judge import Judge
from .recipe import PerSite, Stage

LOAD_TIME_FUSIONS = {
    "SkipLayerNormFusion": {"SkipLayerNormalization"},
    "BiasGeluFusion": {"BiasGelu"},
    "EmbedLayerNormFusion": {"EmbedLayerNormalization"},
    "AttentionFusion": {"Attention"},
    "MatmulTransposeFusion": {"FusedMatMul"},
    "MatMulScaleFusion": {"FusedMatMul"},
    "MatMulAddFusion": {"Gemm"},
    "DynamicQuantizeMatMulFusion": {"DynamicQuantizeMatMul"},
    "QuickGeluFusion": {"QuickGelu"},
}
"""ONNX Runtime optimizers that fuse when a session loads, and the operators by which their work shows."""


@dataclass
class Search:
    """One walk through a recipe for one target.

    Attributes:
        judge: The gates.
        context: What passes may know.
        folder: Where graphs are saved.
        reproducer: Folder that a failing pass leaves the model and the rest of the pipeline in.
        announce: Called with the name of each trial before it is made.
        chooser: Chooses the form of each linear operator.
        form: Passes that bring the graph into the form that those of ``wish`` see through.
        wish: Passes that the user asked for by name: kept at any speed, and a compile that cannot keep them fails.
    """

    judge: Judge
    context: Context
    folder: GraphFolder
    reproducer: Path
    announce: Callable[[str], None]
    chooser: Chooser
    form: Pipeline = NOTHING
    wish: Pipeline = NOTHING
    steps: list[Step] = field(default_factory=list)
    misses: list[str] = field(default_factory=list)
    _idle: dict[Pass, str] = field(default_factory=dict, init=False)

    def walk(self, base: Candidate, stages: Sequence[Stage], *, tune: bool) -> Candidate:
        """Try the stages in order, then the session options.

        Raises:
            FidelityError: Every change that could have made the numbers smaller or faster missed the quality budget; or
                what was wished for does.
            UnsupportedError: The graph has nothing that a wish could act on.
            PassError: A pass broke a promise; the reproducer folder is named.
        """
        lossy = any(is_lossy(stage.passes) for alternatives in stages for stage in alternatives)
        if base.graph.pending and lossy and not tune and not self.wish.passes:
            found = self._together(base, stages)
            if found is not None:
                return found
        # First the precision: what pays in it is not what pays in float32.
        best = self._precision(base) if lossy and tune else base
        forming, rest = split(stages)
        for alternatives in forming:
            best = self._first(best, alternatives)
        best = self._granted(best) if self.wish.passes else best
        before = len(best.pipeline.passes)
        for alternatives in rest:
            best = self._first(best, alternatives)
        if tune:
            best = self._load_time_fusions(best)
        relaxed = best.session.precision != base.session.precision
        if self.misses and not relaxed and not is_lossy(best.pipeline.passes[before:]):
            raise FidelityError(
                f"no lossy pass met the quality budget; nearest miss: {self.misses[0]}",
                "Raise --max-drop, give more representative --data, or choose --recipe safe",
            )
        return best

    def replay(self, base: Candidate, pipeline: Pipeline, session: SessionOptions) -> Candidate:
        """Run a recorded pipeline as one step, under every gate but speed.

        Raises:
            FidelityError: It misses the quality budget.
            PassError: Its numbers are off, or a pass broke a promise.
        """
        best = replace(base, session=session)
        trial = self._attempt(best, pipeline)
        if trial is None:
            return best
        verdict = self._try(trial)
        if verdict.miss:
            raise FidelityError(f"the plan misses the quality budget: {verdict.miss}", "Compile again without --plan")
        if not verdict.kept:
            raise PassError(f"the plan does not hold here: {verdict.reason}", "Compile again without --plan")
        return verdict.candidate

    def _together(self, base: Candidate, stages: Sequence[Stage]) -> Candidate | None:
        """All that the stages ask for, judged as one; None where it does not stand, and then nothing is noted.

        For weights that wait in the checkpoint: what lies between them and the result is a graph that nobody wants.
        """
        noted, best = len(self.steps), base
        trials: dict[int, Trial] = {}
        for alternatives in stages:
            for stage in alternatives:
                self.announce(_label(stage))
                trial = self._attempt(best, self._assigned(best, stage)[0], _label(stage))
                if trial is not None:
                    trials[len(self.steps)] = trial
                    self.steps.append(_noted(trial, Verdict(True, "judged with what follows", trial.candidate)))
                    best = trial.candidate
                    break
        if any(trial.lossy for trial in trials.values()):
            place, last = trials.popitem()
            verdict = self.judge.judge(replace(last, lossy=True))
            if verdict.kept:
                self.steps[place] = _noted(last, verdict)
                return verdict.candidate
        del self.steps[noted:]
        return None

    def _granted(self, best: Candidate) -> Candidate:
        """The candidate after what the user wished for."""
        self.announce(str(self.wish))
        trial = self._attempt(best, Pipeline((*self.form.passes, *self.wish.passes)), str(self.wish))
        idle = [one for one in self.wish.passes if one in self._idle and not isinstance(one, Repair)]
        if trial is None or idle:
            what, why = Pipeline(tuple(idle[:1])), self._idle[idle[0]]
            raise UnsupportedError(f"{what} finds nothing to act on{why and f': {why}'}", "Leave it out")
        verdict = self._try(replace(trial, name=str(self.wish), regardless="asked for"))
        if verdict.kept:
            return verdict.candidate
        remedy = "Ask for less, or give more representative --data"
        if verdict.miss:
            remedy = f"{remedy}; or raise --max-drop"
            raise FidelityError(f"{self.wish} misses the quality budget: {verdict.miss}", remedy)
        raise FidelityError(f"{self.wish} leaves nothing of the model: {verdict.reason}", remedy)

    def _first(self, best: Candidate, alternatives: Stage) -> Candidate:
        """The first alternative that stands; else what is left of the last one: with gentler forms of the operators
        that cost most quality where it missed the budget; or those of its passes that stand by themselves; or ``best``.
        One that finds nothing to change does not stand, and leaves nothing.
        """
        last: tuple[Pipeline | PerSite, Assignment, Verdict] | None = None
        for stage in alternatives:
            self.announce(_label(stage))
            pipeline, assignment = self._assigned(best, stage)
            trial = self._attempt(best, pipeline, _label(stage))
            if trial is None:
                continue
            verdict = self._try(trial)
            if verdict.kept:
                return verdict.candidate
            last = stage, assignment, verdict
        return best if last is None else self._remains(best, *last)

    def _remains(
        self, best: Candidate, stage: Pipeline | PerSite, assignment: Assignment, verdict: Verdict
    ) -> Candidate:
        """What is left of an alternative that did not stand."""
        if isinstance(stage, PerSite) and verdict.miss:
            return self._stepped_back(best, stage, assignment)
        for a_pass in stage.passes if len(stage.passes) > 1 else ():
            best = self._first(best, (Pipeline((a_pass,)),))
        return best

    def _assigned(self, best: Candidate, stage: Pipeline | PerSite) -> tuple[Pipeline, Assignment]:
        """The passes of an alternative, each told its operators."""
        if isinstance(stage, Pipeline):
            return stage, Assignment({})
        assignment = self.chooser.assign(best.model, stage.forms, best.session.precision)
        return assignment.pipeline(stage.before), assignment

    def _stepped_back(self, best: Candidate, stage: PerSite, assignment: Assignment) -> Candidate:
        """Let the operators that cost most quality take gentler forms, in as few steps as possible: by bisection."""
        steps = self.chooser.steps_back(best.model, assignment, stage.forms, best.session.precision)
        enough, too_few = len(steps), 0
        while enough - too_few > 1:
            middle = (enough + too_few) // 2
            self.announce(f"{middle} of {len(steps)} steps back towards float32")
            trial = self._attempt(best, assignment.after(steps[:middle]).pipeline(stage.before))
            if trial is None or self.judge.shortfall(trial.candidate):
                too_few = middle
            else:
                enough = middle
        if enough == len(steps):
            return best
        trial = self._attempt(best, assignment.after(steps[:enough]).pipeline(stage.before))
        verdict = self._try(trial) if trial is not None else None
        return verdict.candidate if verdict is not None and verdict.kept else best

    def _attempt(self, best: Candidate, stage: Pipeline, name: str = "") -> Trial | None:
        model = best.model.clone()
        observers = (Verifying(self.context), Reproducer(self.reproducer))
        results: tuple[tuple[Pass, Outcome], ...] = stage.run(model, self.context, observers=observers)
        changed = sum(outcome.changed for _, outcome in results)
        refused = sum(len(outcome.refused) for _, outcome in results)
        why = _why_refused(results)
        self._idle = {a_pass: _why_idle(outcome) for a_pass, outcome in results if not outcome.changed}
        if not changed:
            reason = f"nothing changed; {why}" if why else "nothing to change"
            self.steps.append(_step(_label(stage) or name, refused=refused, reason=reason, before=best))
            return None
        passes = tuple(a_pass for a_pass, outcome in results if outcome.changed)
        candidate = best.rewritten(model, self.folder, results)
        speed = all(a_pass.purpose is Purpose.SPEED for a_pass in passes)
        required = not self._runnable(best)
        basis = "part of the reference" if stage.passes == CLEAN else ""
        return Trial(_label(stage), candidate, is_lossy(passes), speed, changed, refused, why, required, basis)

    def _runnable(self, candidate: Candidate) -> bool:
        """Whether the target knows every operator of the graph."""
        try:
            check(candidate.model, self.context.target)
        except UnsupportedError:
            return False
        return True

    def _precision(self, best: Candidate) -> Candidate:
        """Let the provider compute float32 graphs in the narrower format it prefers, if it has one and is here."""
        if best.session.precision != "fp32" or self.judge.unmeasured:
            return best
        self.announce("bfloat16")
        relaxed = replace(best, session=replace(best.session, precision="bf16"))
        relaxed = replace(relaxed, precision="bf16" if best.precision == "fp32" else best.precision)
        verdict = self._try(Trial("compute in bfloat16", relaxed, lossy=True, must_gain=True, changed=1))
        return verdict.candidate if verdict.kept else best

    def _load_time_fusions(self, best: Candidate) -> Candidate:
        if self.judge.unmeasured:
            return best
        operators = self.judge.operators_at_load()
        for optimizer, traces in LOAD_TIME_FUSIONS.items():
            if not traces & operators:
                continue
            self.announce(f"without {optimizer}")
            session = replace(best.session, disabled_optimizers=(*best.session.disabled_optimizers, optimizer))
            trial = Trial(f"without ORT {optimizer}", replace(best, session=session), False, True, changed=1)
            verdict = self._try(trial)
            best = verdict.candidate if verdict.kept else best
        return best

    def _try(self, trial: Trial) -> Verdict:
        verdict = self.judge.judge(trial)
        self.steps.append(_noted(trial, verdict))
        if verdict.miss:
            self.misses.append(f"{trial.name}: {verdict.miss}")
        return verdict


def _label(stage: Pipeline | PerSite) -> str:
    return f"clean ({len(CLEAN)} passes)" if stage.passes == CLEAN else str(stage)


def _why_refused(results: tuple[tuple[Pass, Outcome], ...]) -> str:
    refusals = [refusal for _, outcome in results for refusal in outcome.refused]
    more = f" (and {len(refusals) - 1} more)" if len(refusals) > 1 else ""
    return f"left alone {refusals[0].node}: {refusals[0].reason}{more}".replace(" :", ":") if refusals else ""


def _why_idle(outcome: Outcome) -> str:
    """Why a pass did nothing: what it says of the graph, else of the first place."""
    refusals = sorted(outcome.refused, key=lambda refusal: bool(refusal.node))
    more = f" (and {len(refusals) - 1} more)" if len(refusals) > 1 and refusals[0].node else ""
    return f"{refusals[0].node}: {refusals[0].reason}{more}".removeprefix(": ") if refusals else ""


def _step(name: str, *, refused: int, reason: str, before: Candidate) -> Step:
    return Step(name, 0, refused, False, reason, before.graph.size, 0.0, 1.0, before.error)


def _noted(trial: Trial, verdict: Verdict) -> Step:
    """A trial and what came of it, for the proof."""
    return Step(
        name=trial.name,
        changed=trial.changed,
        refused=trial.refused,
        kept=verdict.kept,
        reason=f"{verdict.reason}; {trial.why_refused}" if trial.why_refused else verdict.reason,
        size=verdict.candidate.graph.size,
        ms=verdict.ms,
        ratio=verdict.ratio,
        error=verdict.candidate.error,
    )
