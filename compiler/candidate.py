"""One state of a model on its way through a compile: the graph, how a session is to load it, and how far it is off."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import onnx_ir as ir

from artifacts.manifest import SessionOptions
from passes.base import Effect, Outcome, Pass
from passes.pipeline import Pipeline
from passes.quantize.weight_only import WeightOnly

from .graphs import GraphFolder, SavedGraph


@dataclass(frozen=True)
class Candidate:
    """A graph with everything that decides how it runs.

    Attributes:
        model: The graph in memory; its large tensors are maps of ``graph``'s weight files.
        graph: The same on disk.
        pipeline: The passes that made it.
        session: How a session loads it.
        tolerance: Relative L2 error against the reference that it may show, here or anywhere.
        error: The error it shows here, on the golden inputs.
        precision: ``fp32``, ``bf16``, ``fp16``, ``int8``, ``int4`` or ``int2``: the narrowest format it computes in.
    """

    model: ir.Model
    graph: SavedGraph
    pipeline: Pipeline
    session: SessionOptions
    tolerance: float
    error: float = 0.0
    precision: str = "fp32"

    def rewritten(self, model: ir.Model, folder: GraphFolder, results: tuple[tuple[Pass, Outcome], ...]) -> Candidate:
        """This candidate after passes with these outcomes turned its graph into ``model``."""
        precision = self.precision
        for a_pass, outcome in results:
            precision = _narrowed(precision, a_pass) if outcome.changed else precision
        # Also those that changed nothing: they may have annotated shapes that a later pass relied on.
        pipeline = Pipeline((*self.pipeline.passes, *(a_pass for a_pass, _ in results)))
        return replace(self, model=model, graph=folder.save(model), pipeline=pipeline, precision=precision)


@dataclass(frozen=True)
class Trial:
    """One change that was tried on a candidate.

    Attributes:
        name: What the report calls it: the text of the passes, or of the session option.
        candidate: The result.
        lossy: Whether it may change the numbers: then the quality budget is checked.
        must_gain: Whether it is kept only where it is faster; else it is kept unless it is slower.
        changed: Places rewritten.
        refused: How many places were left alone.
        why_refused: The first of them, with the reason.
        required: Whether the target cannot run the graph without it: then its speed does not matter.
        regardless: Why it stays whatever its speed, which is measured all the same; empty: its speed decides.
    """

    name: str
    candidate: Candidate
    lossy: bool
    must_gain: bool
    changed: int
    refused: int = 0
    why_refused: str = ""
    required: bool = False
    regardless: str = ""


@dataclass(frozen=True)
class Verdict:
    """What the gates said of a trial.

    Attributes:
        kept: Whether it stays.
        reason: Why, in a few words for the report.
        candidate: The trial's candidate with what was measured filled in.
        ratio: Time before / time after, geometric mean over the shapes; 1 where it was not measured.
        ms: Milliseconds of one run of the largest shape after it; 0 where it was not measured.
        miss: How far the quality drop was over the budget, where that is the reason.
    """

    kept: bool
    reason: str
    candidate: Candidate
    ratio: float = 1.0
    ms: float = 0.0
    miss: str = field(default="")


def is_lossy(passes: tuple[Pass, ...]) -> bool:
    """Whether any of the passes may change the numbers."""
    return any(a_pass.effect is Effect.LOSSY for a_pass in passes)


def _narrowed(precision: str, a_pass: Pass) -> str:
    """The narrowest format once a pass has acted on a graph of that precision."""
    if isinstance(a_pass, WeightOnly):
        known = int(precision.removeprefix("int")) if precision.startswith("int") else a_pass.bits
        return f"int{min(known, a_pass.bits)}"
    return _PRECISIONS.get(a_pass.name, precision)


_PRECISIONS = {
    "dynamic-int8": "int8",
    "static-int8": "int8",
    "int8-products": "int8",
    "int8-additions": "int8",
    "weight-int8": "int8",
    "float16": "fp16",
}
