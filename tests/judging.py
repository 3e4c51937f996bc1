"""What the tests of the core judge with: an encoder without torch, its evidence, and timings that say what we want."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest
import tiny_models
from encoder_graphs import Encoder

from artifacts.manifest import SessionOptions
from artifacts.target import CPU, CPU_PROVIDER
from compiler.calibrate import Calibrator
from compiler.candidate import Candidate
from compiler.choose import Chooser
from compiler.data import neutral
from compiler.evidence import Evidence, gather
from compiler.export import Exported, export_model
from compiler.graphs import GraphFolder
from compiler.judge import Judge
from compiler.search import Search
from compiler.source import ModelSource, read_source
from compiler.tolerance import rounding_tolerance
from passes.base import Context, Effect, Observe, Outcome, Purpose, Refusal
from passes.pipeline import Pipeline
from runtimes.client import Feeds, Timings, Worker

Interleave = Callable[..., Timings]


def write_encoder(folder: Path, *, fused: bool = False) -> Path:
    """``encoder.onnx`` and the tokenizer's files."""
    tiny_models.write_tokenizer(folder)
    ir.save(Encoder(fused=fused).build(), folder / "encoder.onnx")
    return folder / "encoder.onnx"


@dataclass(frozen=True)
class Judged:
    """A source with all that it is judged by."""

    source: ModelSource
    exported: Exported
    evidence: Evidence
    folder: GraphFolder

    @property
    def model(self) -> ir.Model:
        """A copy of the graph to change at will; its tensors are shared."""
        return self.exported.model.clone()

    def candidate(self, model: ir.Model | None = None, **changes: object) -> Candidate:
        """The graph, or another, saved."""
        model = self.model if model is None else model
        tolerance = rounding_tolerance(self.exported.model)
        made = Candidate(model, self.folder.save(model), Pipeline(), SessionOptions(), tolerance)
        return replace(made, **changes)  # type: ignore[arg-type]

    @property
    def observe(self) -> Observe:
        """Calibration on the evidence's own rows."""
        return Calibrator(self.evidence.calibration, self.folder, memory=10**9, cache=False).observe

    def judge(self, unmeasured: str = "", **changes: object) -> Judge:
        return Judge(replace(self.evidence, **changes), CPU_PROVIDER, unmeasured)  # type: ignore[arg-type]

    def search(self, judge: Judge, reproducer: Path, context: Context | None = None) -> Search:
        known = context or Context(CPU, self.observe)
        return Search(judge, known, self.folder, reproducer, lambda text: None, Chooser(known, None))


def judge_source(path: Path, folder: Path, *, seed: int = 0, max_drop: float | None = None) -> Judged:
    source = read_source(str(path), "feature-extraction")
    exported = export_model(source)
    for name, content in exported.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    evidence = gather(source, exported, neutral(source.task), folder, seed=seed, max_drop=max_drop)
    return Judged(source, exported, evidence, GraphFolder(folder))


def crafted(*ratios: float, asked: list[int] | None = None) -> Interleave:
    """Timings as if the second worker had been ``ratios`` times as fast as the first, a ratio a round."""

    def interleave(
        workers: Mapping[str, Worker], shapes: Sequence[Feeds], *, rounds: int = 5, seconds: float = 0.2
    ) -> Timings:
        if asked is not None:
            asked.append(rounds)
        first, second = workers
        turns = tuple(ratios[index % len(ratios)] for index in range(rounds))
        slow, fast = tuple(10.0 for _ in turns), tuple(10.0 / ratio for ratio in turns)
        return Timings({first: tuple(slow for _ in shapes), second: tuple(fast for _ in shapes)})

    return interleave


@contextmanager
def faster(ratio: float = 1.5, proof: float | None = None) -> Iterator[None]:
    """Within it, every change is measured to be ``ratio`` times as fast, and the result ``proof`` times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compiler.judge.interleave", crafted(ratio))
        patch.setattr("compiler.prove.interleave", crafted(ratio if proof is None else proof))
        yield


@contextmanager
def brief() -> Iterator[None]:
    """Within it, measurements are real and short: their verdicts are noise, everything else is as ever."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compiler.judge._TIERS", ((2, 0.0),))
        patch.setattr("compiler.judge._SECONDS", 0.004)
        patch.setattr("compiler.prove._ROUNDS", 3)
        patch.setattr("compiler.prove._SECONDS", 0.01)
        yield


@dataclass(frozen=True)
class Scale:
    """Multiply the first layer norm's scale; says what it is told to say of itself."""

    name: ClassVar[str] = "scale"
    effect: ClassVar[Effect] = Effect.LOSSY
    purpose: ClassVar[Purpose] = Purpose.SIZE

    factor: float = 1.5

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Once: the tensor's name tells that it was done."""
        value = model.graph.initializers["encoder.layer.0.gamma"]
        tensor = value.const_value
        assert tensor is not None
        if tensor.name == "scaled":
            return Outcome(0)
        # Uneven: a uniform scale would be taken out again by the normalisation at the end.
        grades = np.linspace(1.0, self.factor, tensor.numpy().size, dtype=np.float32)
        value.const_value = ir.tensor(tensor.numpy() * grades, name="scaled")
        return Outcome(1)


@dataclass(frozen=True)
class ScaleExactly(Scale):
    """The same, said to be exact: a lie."""

    name: ClassVar[str] = "scale-exactly"
    effect: ClassVar[Effect] = Effect.EXACT


@dataclass(frozen=True)
class Rename:
    """Rename the nodes once: changes places and no number."""

    name: ClassVar[str] = "rename"
    effect: ClassVar[Effect] = Effect.EXACT
    purpose: ClassVar[Purpose] = Purpose.FORM

    to: str = "x"

    def run(self, model: ir.Model, context: Context) -> Outcome:
        nodes = [node for node in model.graph if not (node.name or "").startswith(self.to)]
        for index, node in enumerate(nodes):
            node.name = f"{self.to}{index}"
        return Outcome(len(nodes))


@dataclass(frozen=True)
class Refuse:
    """Change nothing, and say why."""

    name: ClassVar[str] = "refuse"
    effect: ClassVar[Effect] = Effect.EXACT
    purpose: ClassVar[Purpose] = Purpose.FORM

    def run(self, model: ir.Model, context: Context) -> Outcome:
        return Outcome(0, (Refusal("some node", "it is not what it seems"),))
