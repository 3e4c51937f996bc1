"""What a decoder is judged by: windows of held-out text, a ragged prompt continued token by token, shapes to time.

A decoder has one graph for prefill and decode; its inputs stand in docs/format.md. Rows are padded on the right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from tokenizers import Tokenizer

from artifacts.errors import DataError
from artifacts.manifest import TensorSpec
from artifacts.signature import STEP_INPUTS, cache_names
from runtimes.generate.feeds import cache_feeds, step_feeds
from runtimes.golden import Golden, relative_error

Int64 = NDArray[np.int64]
Arrays = dict[str, NDArray[Any]]
Run = Callable[[Mapping[str, NDArray[Any]]], Arrays]
Shape = tuple[int, int]

LONGEST_WINDOW = 512
"""Tokens of a window that is judged or calibrated with."""
CALIBRATION_WINDOWS = 128
"""Windows that are calibrated with, at most."""
DECODE = 1
"""The length, as (batch, length) counts it, of a decode step."""
FILLED = 128
"""Tokens in the cache when a decode step is timed."""
TRIAL_SHAPES: tuple[Shape, ...] = ((1, DECODE), (1, 128))
"""(batch, length) at which changes are compared."""
PROOF_SHAPES: tuple[Shape, ...] = ((1, DECODE), (8, DECODE), (1, 128), (1, 512))
"""(batch, length) at which the result is compared with the unoptimized graph."""

_SPARE = 32  # room in the cache beyond what is filled, as in use
_GOLDEN_LENGTHS = (12, 7)
_GOLDEN_STEPS = 2
_GOLDEN_BYTES = 4 << 20
_LOGITS_BYTES = 256 << 20
_MOST_ROWS = 8
_JUDGED = (4096, 16384)
_WORK = 1e12  # parameters x tokens that judging a change may take: some 10 s on two cores


def windows(texts: Iterable[str], tokenizer: Path, longest: int = LONGEST_WINDOW) -> list[Int64]:
    """The first tokens of each text, int64 [2 <= n <= longest], the tokenizer's own special tokens among them.

    Texts of a single token are left out: nothing follows it. The text of a special token is plain text here.
    """
    made = Tokenizer.from_file(str(tokenizer))
    made.no_padding()
    made.no_truncation()
    made.encode_special_tokens = True
    found = (np.array(encoding.ids[:longest], np.int64) for encoding in made.encode_batch_fast(list(texts)))
    return [ids for ids in found if len(ids) > 1]


def judged_tokens(model: ir.Model) -> int:
    """How many tokens a model of this size is judged on: 4,096 for the largest, 16,384 for small ones.

    Both models see the same tokens, and a token's loss changes little: the ratio of the perplexities is known far
    better than either of them.
    """
    parameters = sum(value.const_value.size for value in model.graph.initializers.values() if value.const_value)
    return int(np.clip(_WORK / max(parameters, 1), *_JUDGED))


def held_out(rows: Sequence[Int64], tokens: int, data: str) -> list[Int64]:
    """Of these windows, evenly, as many as have so many tokens together; the longest first: neighbours need no padding.

    Raises:
        DataError: There are none.
    """
    if not rows:
        raise DataError(f"{data} has no text of two tokens or more", "Give --data with running text")
    share = min(1.0, tokens / sum(len(row) for row in rows))
    places = np.linspace(0, len(rows) - 1, max(1, round(share * len(rows))))
    return sorted((rows[int(place)] for place in places), key=len, reverse=True)


def vocabulary(outputs: Sequence[TensorSpec]) -> int:
    """Classes of the logits."""
    size = outputs[0].shape[-1]
    return size if isinstance(size, int) else 1


def teacher_forced(
    rows: Sequence[Int64], inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> tuple[Arrays, ...]:
    """Prompts that ask for the logits of all positions, so many rows a batch that their logits stay below 256 MB."""
    row_bytes = 4 * len(rows[0]) * vocabulary(outputs)
    size = max(1, min(_MOST_ROWS, _LOGITS_BYTES // row_bytes))
    return tuple(_all_positions(rows[start : start + size], inputs) for start in range(0, len(rows), size))


def _all_positions(rows: Sequence[Int64], inputs: Sequence[TensorSpec]) -> Arrays:
    length = max(len(row) for row in rows)
    return prefill(rows, inputs, np.tile(np.arange(length), (len(rows), 1)))


def prefill(
    rows: Sequence[Int64], inputs: Sequence[TensorSpec], logits_index: Int64, capacity: int | None = None
) -> Arrays:
    """Feeds of a first call.

    Args:
        rows: Tokens of each row; shorter ones are padded on the right with token 0.
        inputs: Of the graph.
        logits_index: int64 [rows, positions].
        capacity: Tokens that the cache has room for; as many as the longest row by default.
    """
    return {**step_feeds(rows, 0, logits_index), **cache_feeds(inputs, len(rows), capacity or max(map(len, rows)))}


def decode(tokens: Int64, lengths: Int64, cache: Arrays) -> Arrays:
    """Feeds of a step that adds one token to each row.

    Args:
        tokens: The tokens, int64 [rows].
        lengths: Tokens of each row in the cache so far, int64 [rows].
        cache: Past keys and values, by name.
    """
    return {**step_feeds(tokens[:, None], lengths, np.zeros((len(tokens), 1), np.int64)), **cache}


def golden_prompt(rows: Sequence[Int64], inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> Arrays:
    """A ragged prompt of two short rows that asks for the logits at the end of each."""
    chosen = [rows[index % len(rows)][:length] for index, length in enumerate(_GOLDEN_LENGTHS)]
    lengths = [len(row) for row in chosen]
    room = _GOLDEN_BYTES // (4 * len(chosen) * vocabulary(outputs))
    positions = max(_GOLDEN_STEPS, min(*lengths, room))
    index = np.array([np.arange(length - positions, length) for length in lengths])
    return prefill(chosen, inputs, index)


def continued_error(run: Run, golden: Golden) -> float:
    """Relative L2 error of the golden logits where the last tokens of each row come one by one, after a shorter prompt.

    What the golden test does not see: that the cache is written and read where it should be.

    Args:
        run: The model.
        golden: A prompt whose rows ask for the logits at their end, and the original's answer.
    """
    feeds = golden.feeds
    lengths = feeds["seqlens_k"].astype(np.int64) + 1
    steps = min(_GOLDEN_STEPS, feeds["logits_index"].shape[1], int(lengths.min()) - 1)
    start = lengths - steps
    width = int(start.max())
    prompt = {
        **feeds,
        **{name: np.ascontiguousarray(feeds[name][:, :width]) for name in ("input_ids", "position_ids")},
        "seqlens_k": (start - 1).astype(np.int32),
        "total_sequence_length": np.array(width, np.int32),
        "logits_index": (start - 1)[:, None],
    }
    outputs, logits = run(prompt), []
    rows = np.arange(len(lengths))
    for step in range(steps):
        cache = {past: outputs[present] for past, present in _pairs(feeds) if present in outputs}
        outputs = run(decode(feeds["input_ids"][rows, start + step], start + step, cache))
        logits.append(outputs["logits"])
    if not steps:
        return 0.0
    return relative_error(np.concatenate(logits, axis=1), golden.outputs["logits"][:, -steps:])


def timed(inputs: Sequence[TensorSpec], shapes: Sequence[Shape], context: int, vocabulary: int) -> dict[Shape, Arrays]:
    """Feeds by (batch, length): a decode step with `FILLED` tokens in the cache, or a prompt and its last logits.

    Lengths beyond the model's context are its longest.
    """
    found = {}
    for batch, length in dict.fromkeys((batch, min(length, context)) for batch, length in shapes):
        rng = np.random.default_rng(batch * 1000 + length)
        ids = rng.integers(0, vocabulary, (batch, length))
        if length == DECODE:
            filled = max(1, min(FILLED, context - 1))
            cache = cache_feeds(inputs, batch, filled + _SPARE, rng)
            found[batch, length] = decode(ids[:, 0], np.full(batch, filled, np.int64), cache)
        else:
            index = np.full((batch, 1), length - 1, np.int64)
            found[batch, length] = prefill(list(ids), inputs, index, length + _SPARE)
    return found


def _pairs(feeds: Arrays) -> Iterator[tuple[str, str]]:
    """(past, present) of every key and value."""
    for layer in range((len(feeds) - len(STEP_INPUTS)) // 2):
        yield from cache_names(layer)
