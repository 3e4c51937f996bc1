"""How fast a language model is here: prefill and decode over prompt length and batch, and how near to the ceiling.

A decode step reads every weight once, whatever the batch: at batch 1 the memory of the machine is the ceiling, and the
report says how much of its measured bandwidth the weights took.
"""

from __future__ import annotations

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

from artifacts.bundle import Bundle
from artifacts.errors import UsageError

from ..bench import OURS, THEIRS, Compared, Report, check_numbers, compared
from ..client import Ratio, Timings
from ..decide import Decision
from ..environment import import_paths
from ..peers import Peer
from .bandwidth import memory_bandwidth, weight_bytes
from .cache import check_memory, layout_of

LEAST_ROUNDS = 3
"""Rounds of a shape, whatever the seconds; one more is made before them and dropped."""
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
class DecoderReport(Report):
    """What `bench_decoder` measured.

    Attributes:
        rows: A row a shape.
        load_seconds: Seconds to load the graph and the tokenizer in a new process, its imports not counted.
        weight_bytes: Bytes of weights that a step reads.
        memory_bandwidth: Bytes per second that this machine was measured to move.
        peak_bytes: Most memory that the process was resident with.
    """

    rows: tuple[DecodeRow, ...]
    load_seconds: float
    weight_bytes: int
    memory_bandwidth: float
    peak_bytes: int


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
    check_numbers(batches, lengths, seconds, threads)
    shapes = _shapes(bundle, batches, lengths, new_tokens)
    found = compared(bundle, variant=variant, against=against, threads=threads, device=device, provider=provider)
    chosen = bundle.variant(found.models[OURS][1].variant)
    for batch, length in shapes:
        check_memory(layout_of(bundle.manifest.inputs_of(chosen)), batch, length + new_tokens)
    load, peak, rounds = _measure(found, shapes, new_tokens, seconds)
    touched = weight_bytes(bundle.path / chosen.model)
    return DecoderReport(
        **found.facts(),
        rows=tuple(_row(shape, one, touched) for shape, one in zip(shapes, rounds, strict=True)),
        load_seconds=load,
        weight_bytes=touched,
        memory_bandwidth=memory_bandwidth(threads),
        peak_bytes=peak,
    )


def _shapes(bundle: Bundle, batches: Sequence[int], lengths: Sequence[int], new_tokens: int) -> list[Shape]:
    processor = bundle.manifest.processor
    if bundle.manifest.generation is None or processor is None:
        raise UsageError(f"{bundle.path} is a {bundle.manifest.task} model, not a language model")
    if new_tokens < 2:
        raise UsageError(f"{new_tokens} new tokens have no time between them", "Write at least 2")
    room = processor.max_length - new_tokens
    fitting = [length for length in lengths if length <= room]
    if not fitting:
        raise UsageError(
            f"prompts of {min(lengths)} tokens and {new_tokens} new ones are beyond the model's {processor.max_length}",
            "Give shorter --lengths, or fewer --new-tokens",
        )
    return [(batch, length) for batch in batches for length in fitting]


def _child(bundle: Bundle, decision: Decision) -> Peer:
    command = (sys.executable, "-c", _BOOTSTRAP, json.dumps(import_paths()))
    return Peer(f"{bundle.manifest.name} ({decision.variant})", command, timeout=_ANSWER_SECONDS)


def _load(child: Peer, bundle: Bundle, decision: Decision, threads: int) -> float:
    wanted = {"variant": decision.variant, "provider": decision.provider, "device": decision.device}
    request = {"bundle": str(bundle.path.resolve()), "threads": threads, **wanted}
    return float(child.ask("load", request)["seconds"])


def _measure(
    found: Compared, shapes: Sequence[Shape], steps: int, seconds: float
) -> tuple[float, int, list[dict[str, Rounds]]]:
    """Seconds that ours took to load, bytes it was resident with, and the rounds of each shape by model."""
    with ExitStack() as stack:
        children = {name: stack.enter_context(_child(*model)) for name, model in found.models.items()}
        loads = {name: _load(children[name], *model, found.threads) for name, model in found.models.items()}
        rounds = [_rounds(children, shape, steps, seconds) for shape in shapes]
        return loads[OURS], int(children[OURS].ask("memory")["peak"]), rounds


def _rounds(children: Mapping[str, Peer], shape: Shape, steps: int, seconds: float) -> dict[str, Rounds]:
    request = {"batch": shape[0], "prompt": shape[1], "steps": steps}
    found: dict[str, Rounds] = {name: [] for name in children}
    for child in children.values():
        child.ask("time", request)  # buffers, and kernels for a new shape
    end = time.perf_counter() + seconds * len(children)
    while len(found[OURS]) < LEAST_ROUNDS or time.perf_counter() < end:
        for name, child in children.items():
            found[name].append(child.ask("time", request))
    return found


def _row(shape: Shape, found: Mapping[str, Rounds], touched: int) -> DecodeRow:
    ours = found[OURS]
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
    if THEIRS not in found:
        return None
    timings = Timings({name: (tuple(cost(one) * 1e3 for one in rounds),) for name, rounds in found.items()})
    return timings.ratio(THEIRS, OURS)
