"""How fast a language model is here: prefill and decode over prompt length and batch, and how near to the ceiling.

A decode step reads every weight once, whatever the batch: at batch 1 the memory of the machine is the ceiling, and the
report says how much of its measured bandwidth the weights took.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from artifacts.bundle import Bundle, open_bundle
from artifacts.errors import UsageError
from artifacts.proof import Machine

from ..bench import REFERENCE
from ..client import Ratio, Timings
from ..decide import Decision, decide, find_short
from ..environment import import_paths
from ..fingerprint import machine
from ..peers import Peer
from .bandwidth import memory_bandwidth, weight_bytes
from .cache import check_memory, layout_of

LEAST_ROUNDS = 3
"""Rounds of a shape, whatever the seconds; one more is made before them and dropped."""
_OURS, _THEIRS = "ours", "theirs"
_BOOTSTRAP = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from runtimes.generate.timing import main; main()"
)
_ANSWER_SECONDS = 600.0

Shape = tuple[int, int]
"""Rows, and tokens of each prompt."""
Rounds = list[dict[str, Any]]
"""What a child answered to ``time``, a round each."""


@dataclass(frozen=True)
class DecodeRow:
    """One shape.

    Attributes:
        batch: Texts at once.
        prompt: Tokens of each prompt.
        prefill_per_second: Tokens of prompts read per second, of all rows together; median.
        first_ms: Milliseconds from the prompts to the first token of every row as text; median.
        decode_per_second: Tokens written per second, of all rows together.
        p50_ms: Median milliseconds from one token to the next.
        p99_ms: 99th percentile of that.
        steps: Steps measured.
        bandwidth: Bytes of weights read per second of decoding.
        prefill_ratio: How many times faster prefill is than the other model's, quartiles over the rounds; None without.
        decode_ratio: The same of the median step.
    """

    batch: int
    prompt: int
    prefill_per_second: float
    first_ms: float
    decode_per_second: float
    p50_ms: float
    p99_ms: float
    steps: int
    bandwidth: float
    prefill_ratio: Ratio | None = None
    decode_ratio: Ratio | None = None


@dataclass(frozen=True)
class DecoderReport:
    """What `bench_decoder` measured, and on what.

    Attributes:
        name: Name of the model.
        variant: Variant measured.
        provider: Execution provider it ran on.
        device: Device it ran on.
        threads: Threads within an operator; 0: one a physical core.
        against: What it was compared with; empty: nothing.
        machine: This machine.
        rows: A row a shape.
        load_seconds: Seconds to load the graph and the tokenizer in a new process, its imports not counted.
        weight_bytes: Bytes of weights that a step reads.
        memory_bandwidth: Bytes per second that this machine was measured to move.
        peak_bytes: Most memory that the process was resident with.
    """

    name: str
    variant: str
    provider: str
    device: str
    threads: int
    against: str
    machine: Machine
    rows: tuple[DecodeRow, ...]
    load_seconds: float
    weight_bytes: int
    memory_bandwidth: float
    peak_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return dataclasses.asdict(self)


def bench_decoder(
    bundle: Bundle,
    *,
    variant: str | None = None,
    against: str | Path | None = None,
    batches: Sequence[int] = (1, 8),
    lengths: Sequence[int] = (128, 512),
    new_tokens: int = 64,
    seconds: float = 1.0,
    threads: int = 0,
    device: str | None = None,
    provider: str | None = None,
) -> DecoderReport:
    """Measure a language model, each in a child process of its own; what is compared in turn, A B A B.

    Prompts are random tokens; the likeliest token is taken and turned into text.

    Args:
        bundle: A bundle of the task text-generation.
        variant: Which variant; None: the one that `load` would choose.
        against: ``"reference"``: that variant of the same bundle. Else the path of another bundle.
        batches: Texts at once.
        lengths: Tokens of each prompt; those that leave no room for ``new_tokens`` in the context are left out.
        new_tokens: Tokens to write, at least 2.
        seconds: Of measuring, for each model and shape; at least three rounds are made.
        threads: Threads within an operator; 0: one a physical core.
        device: ``cpu``, ``cuda:1``...; None: any.
        provider: Execution provider; None: any.

    Raises:
        UsageError: A number is not positive, no shape fits into context and memory, or nothing is there to compare.
        ProviderError: A model does not run here.
    """
    if not seconds > 0.0 or threads < 0:
        raise UsageError(f"seconds is {seconds}, threads is {threads}", "seconds > 0; threads >= 0, 0 for all cores")
    shapes = _shapes(bundle, batches, lengths, new_tokens)
    other, wanted = _opponent(bundle, against)
    chosen = decide(bundle, device=device, provider=provider, variant=variant, threads=threads)
    models = {_OURS: (bundle, chosen)}
    if other is not None:
        models[_THEIRS] = other, decide(other, device=device, variant=wanted, threads=threads)
    load, peak, rounds = _measure(models, shapes, new_tokens, seconds, threads)
    touched = weight_bytes(bundle.path / bundle.variant(chosen.variant).model)
    return DecoderReport(
        name=bundle.manifest.name,
        variant=chosen.variant,
        provider=chosen.provider,
        device=chosen.device,
        threads=threads,
        machine=machine(),
        against=_named(against, models.get(_THEIRS)),
        rows=tuple(_row(shape, found, touched) for shape, found in zip(shapes, rounds, strict=True)),
        load_seconds=load,
        weight_bytes=touched,
        memory_bandwidth=memory_bandwidth(threads),
        peak_bytes=peak,
    )


def _shapes(bundle: Bundle, batches: Sequence[int], lengths: Sequence[int], new_tokens: int) -> list[Shape]:
    processor = bundle.manifest.processor
    if bundle.manifest.generation is None or processor is None:
        raise UsageError(f"{bundle.path} is a {bundle.manifest.task} model, not a language model")
    for name, values in (("batches", batches), ("lengths", lengths)):
        if not values or any(value < 1 for value in values):
            raise UsageError(f"{name} {list(values)} are not positive numbers", "Give at least one, each >= 1")
    if new_tokens < 2:
        raise UsageError(f"{new_tokens} new tokens have no time between them", "Write at least 2")
    room = processor.max_length - new_tokens
    fitting = [length for length in lengths if length <= room]
    if not fitting:
        raise UsageError(
            f"prompts of {min(lengths)} tokens and {new_tokens} new ones are beyond the model's {processor.max_length}",
            "Give shorter --lengths, or fewer --new-tokens",
        )
    for batch in batches:
        check_memory(layout_of(bundle.manifest.inputs), batch, max(fitting) + new_tokens)
    return [(batch, length) for batch in batches for length in fitting]


def _opponent(bundle: Bundle, against: str | Path | None) -> tuple[Bundle | None, str | None]:
    if against is None:
        return None, None
    if against == REFERENCE:
        if all(variant.id != REFERENCE for variant in bundle.manifest.variants):
            raise UsageError(f"{bundle.path} holds no reference variant", "Compile it with --keep-reference")
        return bundle, REFERENCE
    other = open_bundle(Path(against))
    if other.manifest.generation is None:
        raise UsageError(f"{against} is a {other.manifest.task} model", "Compare with another language model")
    return other, None


def _named(against: str | Path | None, model: tuple[Bundle, Decision] | None) -> str:
    if model is None:
        return ""
    decision = model[1]
    where = "" if against == REFERENCE else f"{against}: "
    return f"{where}{decision.variant} on {find_short(decision.provider)}"


def _child(bundle: Bundle, decision: Decision) -> Peer:
    command = (sys.executable, "-c", _BOOTSTRAP, json.dumps(import_paths()))
    return Peer(f"{bundle.manifest.name} ({decision.variant})", command, timeout=_ANSWER_SECONDS)


def _load(child: Peer, bundle: Bundle, decision: Decision, threads: int) -> float:
    wanted = {"variant": decision.variant, "provider": decision.provider, "device": decision.device}
    request = {"bundle": str(bundle.path.resolve()), "threads": threads, **wanted}
    return float(child.ask("load", request)["seconds"])


def _measure(
    models: Mapping[str, tuple[Bundle, Decision]], shapes: Sequence[Shape], steps: int, seconds: float, threads: int
) -> tuple[float, int, list[dict[str, Rounds]]]:
    """Seconds that ours took to load, bytes it was resident with, and the rounds of each shape by model."""
    with ExitStack() as stack:
        children = {name: stack.enter_context(_child(*model)) for name, model in models.items()}
        loads = {name: _load(children[name], *models[name], threads) for name in models}
        rounds = [_rounds(children, shape, steps, seconds) for shape in shapes]
        return loads[_OURS], int(children[_OURS].ask("memory")["peak"]), rounds


def _rounds(children: Mapping[str, Peer], shape: Shape, steps: int, seconds: float) -> dict[str, Rounds]:
    request = {"batch": shape[0], "prompt": shape[1], "steps": steps}
    found: dict[str, Rounds] = {name: [] for name in children}
    for child in children.values():
        child.ask("time", request)  # buffers, and kernels for a new shape
    end = time.perf_counter() + seconds * len(children)
    while len(found[_OURS]) < LEAST_ROUNDS or time.perf_counter() < end:
        for name, child in children.items():
            found[name].append(child.ask("time", request))
    return found


def _row(shape: Shape, found: Mapping[str, Rounds], touched: int) -> DecodeRow:
    ours = found[_OURS]
    steps = np.concatenate([one["steps"] for one in ours])
    p50, p99 = (float(value) for value in np.percentile(steps, (50, 99)))
    batch, prompt = shape
    return DecodeRow(
        batch=batch,
        prompt=prompt,
        prefill_per_second=batch * prompt / median(one["prefill"] for one in ours),
        first_ms=median(one["first"] for one in ours) * 1e3,
        decode_per_second=batch / float(steps.mean()),
        p50_ms=p50 * 1e3,
        p99_ms=p99 * 1e3,
        steps=len(steps),
        bandwidth=touched / p50,
        prefill_ratio=_ratio(found, lambda one: float(one["prefill"])),
        decode_ratio=_ratio(found, lambda one: median(one["steps"])),
    )


def _ratio(found: Mapping[str, Rounds], cost: Callable[[dict[str, Any]], float]) -> Ratio | None:
    if _THEIRS not in found:
        return None
    timings = Timings({name: (tuple(cost(one) * 1e3 for one in rounds),) for name, rounds in found.items()})
    return timings.ratio(_THEIRS, _OURS)
