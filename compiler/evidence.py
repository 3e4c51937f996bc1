"""What a compile judges by: golden inputs and outputs, held-out data and the original's answers, shapes to time."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from artifacts.errors import UnsupportedError
from artifacts.manifest import SessionOptions, TensorSpec, TextProcessor
from artifacts.proof import Fidelity
from artifacts.target import CPU_PROVIDER
from runtimes.bench import synthetic
from runtimes.client import Worker
from runtimes.golden import Golden, Runner, golden_error
from runtimes.text import TextEncoder, pad

from . import generation
from .calibrate import Batches, survey, tensor_batches, text_batches, token_batches
from .data import Dataset, Row, items, neutral, with_masks
from .export import Exported
from .export.onnx_import import index_limits, random_feeds
from .metrics import Budget, condense, default_budget, join, measure
from .shorten import LONGEST, shortened
from .source import ModelSource
from .tasks import GENERATION
from .tensor_data import TensorData

Arrays = dict[str, NDArray[Any]]
Run = Callable[[Mapping[str, NDArray[Any]]], Arrays]

TRIAL_SHAPES = ((1, 32), (4, 128))
"""(batch, length) at which changes are compared; for decoders see `compiler.generation`."""
PROOF_SHAPES = ((1, 32), (1, 128), (16, 128))
"""(batch, length) at which the result is compared with the unoptimized graph; for decoders likewise."""
CALIBRATION_ROWS = 512
"""Rows that the ranges of activations are learnt from, unless the user says otherwise."""
CALIBRATION_MEMORY = 10**9
"""Bytes that calibration may add to the process, unless the user says otherwise."""
_HELD_OUT = 256
_BATCH = 16
_GOLDEN_BYTES = 4 << 20
_TENSOR_BATCHES = 8
_TENSOR_SIZES = (1, 8)


@dataclass(frozen=True)
class Evidence:
    """See the module.

    Attributes:
        task: Of the model.
        golden: Inputs and the original model's outputs; a few of the held-out rows, or random tensors.
        feeds: Held-out inputs in batches.
        answers: What the metrics need of the original model's outputs for them.
        rows: The held-out examples.
        data: Name of the data.
        processor: How they became ids; None for plain tensors.
        mask_id: Id of the mask token, where the task needs it.
        budget: The quality that must remain.
        trial_feeds: What changes are timed on.
        proof_shapes: (batch, length) and feeds that the result is timed on.
        calibration: Other rows of the data, for passes that must know the range of a value.
        notes: What the user should know: texts that were cut.
    """

    task: str
    golden: Golden
    feeds: tuple[Arrays, ...]
    answers: Arrays
    rows: tuple[Row, ...]
    data: str
    processor: TextProcessor | None
    mask_id: int | None
    budget: Budget
    trial_feeds: tuple[Arrays, ...]
    proof_shapes: Mapping[tuple[int, int], Arrays]
    calibration: Batches
    notes: tuple[str, ...] = ()

    @property
    def product_rows(self) -> tuple[int, ...]:
        """Rows of the input of a linear operator in each of the trials: its tokens."""
        shapes = [feeds["input_ids"].shape for feeds in self.trial_feeds if "input_ids" in feeds]
        return tuple(dict.fromkeys(batch * length for batch, length in shapes or TRIAL_SHAPES))

    def error(self, runner: Runner) -> float:
        """Relative L2 error of a model on the golden set; of a decoder also where it goes on token by token.

        Raises:
            ProviderError: It does not run.
        """
        error = golden_error(runner, self.golden)
        return max(error, generation.continued_error(runner.run, self.golden)) if self.task == GENERATION else error

    def fidelity(self, run: Run) -> tuple[Fidelity, ...]:
        """Quality of a model on the held-out data, a row for each metric; the budget stands in the one that decides."""
        outputs = join([condense(self.task, run(feeds), feeds, mask_id=self.mask_id) for feeds in self.feeds])
        samples = len(self.rows) or sum(len(next(iter(feeds.values()))) for feeds in self.feeds)
        samples = len(outputs["tokens"]) if self.task == GENERATION else samples
        return tuple(
            Fidelity(
                metric=metric.name,
                value=metric.value,
                reference=metric.reference_value,
                drop=metric.drop,
                budget=self.budget.limit if metric.name == self.budget.metric else 1.0,
                samples=samples,
                data=self.data,
            )
            for metric in measure(self.task, self.answers, outputs, self.rows, self.processor)
        )

    def shortfall(self, run: Run) -> str:
        """Empty if a model is within the quality budget; else by how much it is not."""
        return self.exceeded(self.fidelity(run))

    def exceeded(self, fidelity: tuple[Fidelity, ...]) -> str:
        """The same for quality that was measured before."""
        for found in fidelity:
            if found.metric == self.budget.metric:
                within = found.drop <= found.budget
                verb = "rises" if found.metric == "perplexity" else "drops"
                return "" if within else f"{found.metric} {verb} by {found.drop:.4f}, allowed {found.budget:.4f}"
        return f"{self.budget.metric} cannot be measured on {self.data}"

    def golden_bytes(self) -> bytes:
        """golden.npz, uncompressed; the same arrays give the same bytes."""
        arrays = {f"input.{name}": array for name, array in self.golden.feeds.items()}
        arrays |= {f"output.{name}": array for name, array in self.golden.outputs.items()}
        buffer = io.BytesIO()
        np.savez(buffer, **arrays)  # type: ignore[arg-type]  # the stub takes the names for its own options
        return buffer.getvalue()


def gather(
    source: ModelSource,
    exported: Exported,
    data: Dataset | TensorData | None,
    folder: Path,
    *,
    seed: int,
    max_drop: float | None,
    calibration_rows: int = CALIBRATION_ROWS,
) -> Evidence:
    """Run the original model on held-out data.

    Args:
        source: The model.
        exported: Its graph and reference.
        data: Examples; None for random tensors.
        folder: Where the processor's files lie.
        seed: Chooses the held-out rows, or makes the tensors.
        max_drop: Share of quality that may be lost; None: the task's default.
        calibration_rows: Most rows of the data that calibration is to have.

    Raises:
        UnsupportedError: The original model computes numbers that are not finite.
    """
    problem = exported.processor.problem if exported.processor is not None else ""
    texts = data if isinstance(data, Dataset) else neutral(source.task)
    budget = default_budget(source.task, texts.labelled, problem=problem)
    if max_drop is not None:
        budget = budget.allowing(max_drop)
    with _original(source, exported) as run:
        if exported.processor is None:
            tensors = data if isinstance(data, TensorData) else None
            return _tensors(source, exported, run, budget, seed, tensors, calibration_rows)
        if source.task == GENERATION:
            return _decoder(source, exported, exported.processor, texts, folder, run, budget, seed, calibration_rows)
        return _texts(source, exported, exported.processor, texts, folder, run, budget, seed, calibration_rows)


@contextmanager
def _original(source: ModelSource, exported: Exported) -> Iterator[Run]:
    """The original model: the torch module, or the .onnx file as it is, in ONNX Runtime with its optimizations off."""
    own = exported.reference
    if own is not None:
        yield lambda feeds: dict(own(feeds))
        return
    with Worker(source.path, CPU_PROVIDER, options=SessionOptions(optimization_level="disabled")) as worker:
        yield worker.run


def _texts(
    source: ModelSource,
    exported: Exported,
    processor: TextProcessor,
    data: Dataset,
    folder: Path,
    run: Run,
    budget: Budget,
    seed: int,
    calibration_rows: int,
) -> Evidence:
    if source.task == "fill-mask":
        data = with_masks(data, processor.mask_token, seed)
    seen, held = data.split(seed, calibration_rows, _HELD_OUT)
    names = [spec.name for spec in exported.inputs]
    encoder = TextEncoder(processor, folder / processor.tokenizer, names)
    tokens = encoder.encode(items(held.rows, source.task))
    cut = sum(len(row) > LONGEST for row in tokens)
    tokens = [shortened(row) for row in tokens]
    batches = tuple(pad(tokens[i : i + _BATCH], names, processor) for i in range(0, len(tokens), _BATCH))
    mask_id = encoder.mask_id if source.task == "fill-mask" else None
    first = run(batches[0])
    rows = max(2, min(_BATCH, _BATCH * _GOLDEN_BYTES // sum(array.nbytes for array in first.values())))
    golden = Golden(_head(batches[0], rows), _head(first, rows))
    answers = join([condense(source.task, run(feeds), feeds, mask_id=mask_id) for feeds in batches])
    calibration = text_batches(encoder.encode(items(seen.rows, source.task)), names, processor)
    notes = (f"{cut} of {len(tokens)} texts were cut to {LONGEST} tokens for judging",) if cut else ()
    timed = [_synthetic(exported.inputs, golden, shapes, processor) for shapes in (TRIAL_SHAPES, PROOF_SHAPES)]
    return Evidence(
        task=source.task,
        golden=golden,
        feeds=batches,
        answers=answers,
        rows=held.rows,
        data=data.name,
        processor=processor,
        mask_id=mask_id,
        budget=budget,
        trial_feeds=tuple(timed[0].values()),
        proof_shapes=timed[1],
        calibration=calibration,
        notes=notes + calibration.notes,
    )


def _decoder(
    source: ModelSource,
    exported: Exported,
    processor: TextProcessor,
    data: Dataset,
    folder: Path,
    run: Run,
    budget: Budget,
    seed: int,
    calibration_rows: int,
) -> Evidence:
    inputs, outputs = exported.inputs, exported.outputs
    seen, held = data.split(seed, min(calibration_rows, generation.CALIBRATION_WINDOWS), _HELD_OUT)
    longest = min(generation.LONGEST_WINDOW, processor.max_length)
    learnt, judged = (
        generation.windows((row.text for row in part.rows), folder / processor.tokenizer, longest)
        for part in (seen, held)
    )
    judged = generation.held_out(judged, generation.judged_tokens(exported.model), data.name)
    feeds = generation.teacher_forced(judged, inputs, outputs)
    answers = join([condense(source.task, run(one), one) for one in feeds])
    if not np.isfinite(answers["log_probabilities"]).all():
        raise UnsupportedError(
            f"{source.path} computes numbers that are not finite for {data.name}: nothing can be compared",
            "Its weights may be damaged: download the model again",
        )
    prompt = generation.golden_prompt(judged, inputs, outputs)
    size = generation.vocabulary(outputs)
    return Evidence(
        task=source.task,
        golden=Golden(prompt, {"logits": run(prompt)["logits"]}),
        feeds=feeds,
        answers=answers,
        rows=(),
        data=data.name,
        processor=processor,
        mask_id=None,
        budget=budget,
        trial_feeds=tuple(generation.timed(inputs, generation.TRIAL_SHAPES, processor.max_length, size).values()),
        proof_shapes=generation.timed(inputs, generation.PROOF_SHAPES, processor.max_length, size),
        calibration=token_batches(learnt or judged, inputs),
    )


def _tensors(
    source: ModelSource,
    exported: Exported,
    run: Run,
    budget: Budget,
    seed: int,
    data: TensorData | None,
    calibration_rows: int,
) -> Evidence:
    limits = index_limits(exported.model)
    if data is None:
        made = (random_feeds(exported.inputs, {}, seed + index, limits=limits) for index in range(_TENSOR_BATCHES))
        feeds, calibration, name = tuple(made), None, "random tensors"
    else:
        seen, held = data.split(seed, calibration_rows, _HELD_OUT)
        feeds, calibration, name = tuple(held.batches(exported.inputs)), tuple(seen.batches(exported.inputs)), data.name
    for one in (feeds, calibration) if calibration else ():
        survey(tensor_batches(one), exported.model.graph.inputs)
    answers = [run(one) for one in feeds]
    if any(not np.isfinite(array).all() for one in answers for array in one.values() if array.dtype.kind == "f"):
        raise UnsupportedError(
            f"{source.path} computes numbers that are not finite for {name}: nothing can be compared",
            "Give other --data, or compile the model without the part that needs inputs of another kind",
        )
    shapes = {}
    for batch in _TENSOR_SIZES:
        sizes = {dim: batch for spec in exported.inputs[:1] for dim in spec.shape[:1] if isinstance(dim, str)}
        shapes[(batch, 1)] = random_feeds(exported.inputs, sizes, seed, limits=limits)
        if not sizes:
            break
    return Evidence(
        task=source.task,
        golden=Golden(feeds[0], answers[0]),
        feeds=feeds,
        answers=join(answers),
        rows=(),
        data=name,
        processor=None,
        mask_id=None,
        budget=budget,
        trial_feeds=tuple(shapes.values()),
        proof_shapes=shapes,
        calibration=tensor_batches(calibration or feeds),
    )


def _synthetic(
    inputs: tuple[TensorSpec, ...], golden: Golden, shapes: tuple[tuple[int, int], ...], processor: TextProcessor
) -> dict[tuple[int, int], Arrays]:
    """Feeds by (batch, length); lengths beyond the model's own are its longest."""
    found = {}
    for batch, length in dict.fromkeys((batch, min(length, processor.max_length)) for batch, length in shapes):
        rng = np.random.default_rng(batch * 1000 + length)
        found[batch, length] = {
            spec.name: synthetic(spec, golden.feeds[spec.name], batch, length, rng) for spec in inputs
        }
    return found


def _head(arrays: Arrays, rows: int) -> Arrays:
    return {name: np.ascontiguousarray(array[:rows]) for name, array in arrays.items()}
