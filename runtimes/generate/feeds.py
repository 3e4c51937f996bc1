"""Random inputs for a decoder's graph: what is measured where no text is at hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from artifacts.manifest import Manifest, TensorSpec
from artifacts.signature import STEP_INPUTS

from .decoder import step_feeds

_HELD = 128

Arrays = dict[str, NDArray[Any]]


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
    prompts = rng.integers(0, vocabulary, (rows, length)).tolist()
    feeds = step_feeds(prompts, held, np.full((rows, 1), length - 1, np.int64))
    for spec in inputs[len(STEP_INPUTS) :]:
        shape = (rows, int(spec.shape[1]), held + length, int(spec.shape[3]))
        dtype = np.dtype(spec.dtype)
        drawn = rng.standard_normal(shape) if dtype.kind == "f" else rng.integers(0, 100, shape)
        feeds[spec.name] = drawn.astype(dtype)
    return feeds


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
