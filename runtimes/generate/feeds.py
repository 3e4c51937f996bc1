"""What a decoder's graph is fed: the inputs of a call, and random ones where no text is at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from artifacts.manifest import Manifest, TensorSpec
from artifacts.signature import CACHE_PREFIXES, STEP_INPUTS, cache_names

_HELD = 128

Arrays = dict[str, NDArray[Any]]
Int64 = NDArray[np.int64]


def step_feeds(prompts: Sequence[Sequence[int]] | Sequence[Int64] | Int64, held: Int64 | int, places: Int64) -> Arrays:
    """The graph's inputs before the cache, for rows that each go on where they are; padded on the right.

    Args:
        prompts: Token ids of each row in this call, none empty.
        held: Tokens of each row that the cache holds, int64 [rows], or one number for all.
        places: Where in the rows logits are wanted, int64 [rows, positions].
    """
    lengths = np.array([len(prompt) for prompt in prompts])
    held = np.broadcast_to(np.asarray(held, np.int64), lengths.shape)
    ids = np.zeros((len(prompts), lengths.max()), np.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt)] = prompt
    return {
        "input_ids": ids,
        "position_ids": held[:, None] + np.arange(ids.shape[1]),
        "seqlens_k": (held + lengths - 1).astype(np.int32),
        "total_sequence_length": np.array(held.max() + ids.shape[1], np.int32),
        "logits_index": places,
    }


def cache_feeds(
    inputs: Sequence[TensorSpec], rows: int, capacity: int, rng: np.random.Generator | None = None
) -> Arrays:
    """Keys and values of every layer.

    Args:
        inputs: Of the graph.
        rows: Texts.
        capacity: Tokens of each.
        rng: What they are drawn from; None: zeros, of which layers of the same shape share one array, so that many
            prompts can be kept. Shared arrays are not to be bound as outputs.
    """
    zeros: dict[tuple[str, tuple[int, ...]], NDArray[Any]] = {}
    found: Arrays = {}
    for spec in inputs[len(STEP_INPUTS) :]:
        dtype, shape = np.dtype(spec.dtype), (rows, int(spec.shape[1]), capacity, int(spec.shape[3]))
        if rng is None:
            found[spec.name] = zeros.setdefault((spec.dtype, shape), np.zeros(shape, dtype))
        else:
            drawn = rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(0, 100, shape)
            found[spec.name] = drawn.astype(dtype)
    return found


def fitted(feeds: Mapping[str, NDArray[Any]], inputs: Sequence[TensorSpec]) -> Mapping[str, NDArray[Any]]:
    """A decoder's feeds with each cache in the dtype and of the heads that a graph takes, and none that it does not.

    What a cache holds counts only where it came out of the same graph, and then it fits: that of a first call holds
    nothing of use, that of a timed step random numbers.

    Args:
        feeds: Inputs of a decoder, ``[batch, heads, capacity, width]`` for each cache. Those of another model stay.
        inputs: Of the graph.
    """
    if cache_names(0)[0][0] not in feeds:
        return feeds
    taken, made = {spec.name: spec for spec in inputs}, dict[tuple[object, ...], NDArray[Any]]()
    found: Arrays = {}
    for name, array in feeds.items():
        if not name.startswith(CACHE_PREFIXES):
            found[name] = array
        elif name in taken:
            spec = taken[name]
            found[name] = made.setdefault((id(array), spec.shape, spec.dtype), _fit(array, spec))
    same = len(found) == len(feeds) and all(found[name] is array for name, array in feeds.items())
    return feeds if same else found


def _fit(array: NDArray[Any], spec: TensorSpec) -> NDArray[Any]:
    if len(spec.shape) != 4 or array.ndim != 4:
        return array
    _, heads, _, width = spec.shape
    if array.shape[3] != width and isinstance(heads, int) and isinstance(width, int):
        return np.zeros((array.shape[0], heads, array.shape[2], width), spec.dtype)
    if array.shape[1] != heads and isinstance(heads, int):
        array = np.ascontiguousarray(array[:, np.arange(heads) % array.shape[1]])
    return array if array.dtype == spec.dtype else array.astype(spec.dtype)


def random_feeds(
    inputs: Sequence[TensorSpec], vocabulary: int, rows: int, length: int, rng: np.random.Generator, *, held: int = 0
) -> Arrays:
    """Every input of a call that reads ``length`` tokens a row after ``held`` ones; logits wanted of the last.

    Args:
        inputs: Of the manifest.
        vocabulary: Token ids are below it.
        rows: Texts.
        length: Tokens of each in this call; 1 with ``held`` > 0 is a decode step.
        rng: What ids, keys and values are drawn from.
        held: Tokens of each row that the cache holds.
    """
    prompts = rng.integers(0, vocabulary, (rows, length))
    step = step_feeds(prompts, held, np.full((rows, 1), length - 1, np.int64))
    return {**step, **cache_feeds(inputs, rows, held + length, rng)}


def prompt_feeds(manifest: Manifest, rows: int, length: int, seed: int = 0) -> Arrays:
    """Prompts of ``length`` tokens, read at once; cut to the model's context."""
    context = manifest.processor.max_length if manifest.processor is not None else length
    size, rng = int(manifest.outputs[0].shape[2]), np.random.default_rng(seed)
    return random_feeds(manifest.inputs, size, rows, min(length, context), rng)


def written_step(manifest: Manifest, rows: int = 1, seed: int = 0) -> Arrays:
    """The step that a decoder makes for each token that it writes, here after 128 others of the context."""
    context = manifest.processor.max_length if manifest.processor is not None else _HELD
    size, rng = int(manifest.outputs[0].shape[2]), np.random.default_rng(seed)
    return random_feeds(manifest.inputs, size, rows, 1, rng, held=min(_HELD, context - 1))
