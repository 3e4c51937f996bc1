"""One target's variant: searched or replayed, then proven."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import onnx_ir as ir

from artifacts.errors import FidelityError, PassError
from artifacts.manifest import SessionOptions, Variant
from artifacts.proof import Fidelity, Speed, Step, VariantProof
from artifacts.target import CPU, CPU_PROVIDER, Target
from passes.base import Context, Observe, ObserveMoments, Pass
from passes.grammar import check
from passes.pipeline import Pipeline, parse
from passes.registry import CLEAN
from passes.repair import Repair
from runtimes.bench import REFERENCE
from runtimes.fingerprint import machine
from runtimes.providers import Probe

from .candidate import Candidate, is_lossy
from .choose import Chooser
from .compression import NOTHING, form
from .costs import CostBase
from .evidence import Evidence
from .graphs import GraphFolder
from .integer_kernels import integer_kernel_note, quantized_products
from .judge import Judge
from .plan import PlannedVariant
from .prove import Runnable, is_slower, race
from .recipe import Recipe, load_recipe
from .search import Search
from .tolerance import rounding_tolerance

_UNTIMED = "speed next to float32 was not measured: those weights stayed in the checkpoint"


@dataclass(frozen=True)
class BuiltVariant:
    """A variant with the decisions that made it and what was proven of it."""

    planned: PlannedVariant
    candidate: Candidate
    proof: VariantProof

    def manifest_entry(self) -> Variant:
        """How the manifest lists it."""
        target = Target.parse(self.planned.target)
        return Variant(
            id=self.planned.id,
            target=target.name,
            providers=target.providers,
            model=f"{self.planned.id}.onnx",
            precision=self.planned.precision,
            pipeline=self.planned.pipeline,
            session=self.planned.session,
            tolerance=self.planned.tolerance,
            weights=self.candidate.graph.weights,
        )


@dataclass
class Workshop:
    """Where the variants of one compile are made.

    Attributes:
        evidence: What they are judged by.
        observe: Calibration, lent to passes.
        folder: Where graphs and weights are written.
        threads: Threads to measure with; 0: physical cores.
        reproducer: Folder for what a failing pass leaves.
        announce: Progress.
        exported: The graph that all variants are made of.
        probes: What the providers besides the CPU's answered here.
        moments: Calibration of second moments, lent to passes.
        wish: Passes that the user asked for by name.
    """

    evidence: Evidence
    observe: Observe
    folder: GraphFolder
    threads: int
    reproducer: Path
    announce: Callable[[str, float], None]
    exported: ir.Model
    probes: Mapping[str, Probe]
    moments: ObserveMoments | None = None
    wish: Pipeline = NOTHING

    @cached_property
    def unoptimized(self) -> tuple[Candidate, tuple[Step, ...]]:
        """The graph that everything is compared with, and the steps that made it.

        Raises:
            ProviderError: ONNX Runtime computes something else than the original model.
        """
        with Judge(self.evidence, CPU_PROVIDER, unmeasured="part of the reference", threads=self.threads) as judge:
            search = self._search(judge, CPU, lambda text: None)
            base = judge.enthrone(self._base(SessionOptions()))
            stages = load_recipe(REFERENCE).stages_for(CPU, self.evidence.task)
            return search.walk(base, stages, tune=False), tuple(search.steps)

    def reference(self) -> BuiltVariant:
        """The unoptimized graph as a variant of its own."""
        candidate, steps = self.unoptimized
        planned = _planned(REFERENCE, CPU, REFERENCE, candidate)
        return BuiltVariant(planned, candidate, self._prove(planned, candidate, steps, CPU_PROVIDER, ()))

    def build(self, target: Target, recipe: Recipe, *, start: float, span: float) -> BuiltVariant:
        """Search the recipe for the target and prove what it found.

        Raises:
            FidelityError: No change that the recipe asks for keeps the quality budget.
            PassError: A pass broke a promise.
        """
        if recipe.name == REFERENCE and target == CPU and not self.wish.passes:
            return self.reference()
        stages = recipe.stages_for(target, self.evidence.task)
        done = 0

        def tell(text: str) -> None:
            nonlocal done
            self.announce(f"{target.name}: {text}", start + span * min(done / (len(stages) + 4), 0.9))
            done += 1

        provider, absent = self._provider(target)
        unmeasured = absent or ("" if recipe.tune else f"the recipe {recipe.name} takes it as it is")
        passes = tuple(one for alternatives in stages for stage in alternatives for one in stage.passes)
        deferring = is_lossy(passes) and not recipe.tune
        with Judge(self.evidence, provider, unmeasured, self.threads, deferring) as judge:
            search = self._search(judge, target, tell, (*self.wish.passes, *passes))
            search = replace(search, form=form(self.evidence.task, target), wish=self.wish)
            base = judge.enthrone(self._base(_strict(target)))
            best = judge.settled(search.walk(base, stages, tune=recipe.tune))
        tell("proving")
        planned = _planned(f"{target.name}-{best.precision}", target, recipe.name, best)
        known, timed = judge.measured(best), not base.graph.pending
        proof = self._prove(planned, best, tuple(search.steps), provider, absent=absent, timed=timed, known=known)
        return self._settled(planned, best, proof, provider, recipe)

    def replay(self, planned: PlannedVariant) -> BuiltVariant:
        """Make the variant that a plan records, without measuring speed to decide anything.

        Raises:
            FidelityError: It misses the quality budget.
            PassError: Its numbers do not hold.
        """
        target = Target.parse(planned.target)
        provider, absent = self._provider(target)
        self.announce(f"{planned.id}: as planned", 0.4)
        pipeline = parse(planned.pipeline)
        with Judge(self.evidence, provider, absent or "as planned", self.threads, is_lossy(pipeline.passes)) as judge:
            search = self._search(judge, target, lambda text: None, pipeline.passes)
            base = judge.enthrone(self._base(replace(planned.session, disabled_optimizers=())))
            candidate = judge.settled(search.replay(base, pipeline, planned.session))
        if candidate.error > planned.tolerance:
            raise PassError(
                f"the plan does not hold here: {planned.id} is off by {candidate.error:.1e}, "
                f"the plan allows {planned.tolerance:.1e}",
                "Compile again without --plan",
            )
        candidate = replace(candidate, tolerance=planned.tolerance)
        steps, timed = tuple(search.steps), not base.graph.pending
        known = judge.measured(candidate)
        proof = self._prove(planned, candidate, steps, provider, absent=absent, timed=timed, known=known)
        return BuiltVariant(planned, candidate, proof)

    def _settled(
        self, planned: PlannedVariant, best: Candidate, proof: VariantProof, provider: str, recipe: Recipe
    ) -> BuiltVariant:
        if not is_slower(proof.speed):
            return BuiltVariant(planned, best, proof)
        if not recipe.tune or self.wish.passes:
            who = f"the recipe {recipe.name} takes it as it is" if not recipe.tune else f"{self.wish} was asked for"
            slower = f"slower than the unoptimized graph here; {who}"
            return BuiltVariant(planned, best, replace(proof, reason=f"{proof.reason}; {slower}".removeprefix("; ")))
        # Each step held, and all together do not: ship what nothing was done to.
        target = Target.parse(planned.target)
        with Judge(self.evidence, provider, threads=self.threads) as judge:
            # It was judged on the CPU; here it is another provider's, which may compute in less than float32.
            unoptimized = judge.enthrone(replace(self.unoptimized[0], session=_strict(target)))
        planned = _planned(planned.id, target, planned.recipe, unoptimized)
        reason = "slower than the unoptimized graph as a whole: everything was reverted"
        return BuiltVariant(
            planned, unoptimized, replace(self._prove(planned, unoptimized, proof.steps, provider, ()), reason=reason)
        )

    def _prove(
        self,
        planned: PlannedVariant,
        candidate: Candidate,
        steps: tuple[Step, ...],
        provider: str,
        speed: tuple[Speed, ...] | None = None,
        *,
        absent: str = "",
        timed: bool = True,
        known: tuple[Fidelity, ...] | None = None,
    ) -> VariantProof:
        check(candidate.model, Target.parse(planned.target), finished=True)
        if known is not None and (absent or not quantized_products(candidate.model)):
            fidelity, note = known, absent
        else:
            with Runnable(candidate.graph.path, provider, candidate.session).start(self.threads) as worker:
                fidelity = known or self.evidence.fidelity(worker.run)
                note = absent or integer_kernel_note(candidate.model, worker, self.evidence.golden.feeds)
        if shortfall := self.evidence.exceeded(fidelity):
            remedy = "Raise --max-drop, give more representative --data, or choose --recipe safe"
            raise FidelityError(f"{planned.id} misses the quality budget: {shortfall}", remedy)
        if speed is None:
            speed = () if absent or not timed else self._race(candidate, provider)
            note = note if timed else f"{note}; {_UNTIMED}".removeprefix("; ")
        return VariantProof(
            variant=planned.id,
            status="unproven" if absent else "proven",
            provider="" if absent else provider,
            machine=None if absent else machine(),
            golden_error=candidate.error,
            fidelity=fidelity,
            speed=speed,
            steps=steps,
            size=candidate.graph.size,
            reason=note,
        )

    def _race(self, candidate: Candidate, provider: str) -> tuple[Speed, ...]:
        unoptimized, _ = self.unoptimized
        base = provider if Target.parse("cuda").provider == provider else CPU_PROVIDER
        reference = Runnable(unoptimized.graph.path, base, unoptimized.session)
        variant = Runnable(candidate.graph.path, provider, candidate.session)
        return race(reference, variant, self.evidence.proof_shapes, self.threads)

    def _base(self, session: SessionOptions) -> Candidate:
        model = self.exported.clone()
        graph = self.folder.save(model)
        return Candidate(model, graph, Pipeline(), session, tolerance=rounding_tolerance(model))

    def _original(self, target: Target) -> ir.Model:
        """The graph before anything lossy, for what repairs the numbers: the same for a search and for its replay."""
        model = self.exported.clone()
        Pipeline((*CLEAN, *form(self.evidence.task, target).passes)).run(model, Context(target))
        return model

    def _search(
        self, judge: Judge, target: Target, announce: Callable[[str], None], passes: Sequence[Pass] = ()
    ) -> Search:
        repairs = any(isinstance(one, Repair) for one in passes)
        context = Context(target, self.observe, self.moments, self._original(target) if repairs else None)
        costs = None
        # A provider that compiles the graph fuses operators with their neighbours: alone they cost something else.
        if not judge.unmeasured and judge.provider == CPU_PROVIDER:
            costs = CostBase(target, judge.provider, self.threads, self.evidence.product_rows)
        return Search(judge, context, self.folder, self.reproducer, announce, Chooser(context, costs))

    def _provider(self, target: Target) -> tuple[str, str]:
        """The provider to judge on, and why it is not the target's own; empty if it is."""
        found = self.probes.get(target.provider)
        return (target.provider, "") if found is None or found.ok else (CPU_PROVIDER, found.reason)


def _strict(target: Target) -> SessionOptions:
    """Loaded with nothing narrower than float32, also where the provider's default is: on this machine or another."""
    return SessionOptions(precision="fp32" if target.float_type == "float32" and target != CPU else "")


def _planned(identity: str, target: Target, recipe: str, candidate: Candidate) -> PlannedVariant:
    return PlannedVariant(
        id=identity,
        target=target.name,
        recipe=recipe,
        precision=candidate.precision,
        pipeline=str(candidate.pipeline),
        session=candidate.session,
        tolerance=candidate.tolerance,
    )
