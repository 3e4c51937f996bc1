"""Trim a model between its export and everything that looks at it: the graph, the tokenizer, and the original."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from artifacts.errors import UsageError
from artifacts.manifest import Generation, TextProcessor
from runtimes.environment import onnxruntime as ort

from ..export.exported import Arrays, Exported, Reference, tensor_specs
from ..processor import special_tokens
from ..source import ModelSource
from ..tasks import GENERATION
from .graph import IDS, LOGITS, cut_vocabulary
from .lists import Vocabulary, check_known
from .tokenizer import keep_tokens, renumbering

_HEADS = (GENERATION, "fill-mask")
"""Tasks whose logits are of tokens."""

Feeds = Mapping[str, NDArray[np.generic]]


@dataclass(frozen=True)
class Trimmed:
    """A model with fewer tokens.

    Attributes:
        exported: Its graph, tokenizer, ids and reference.
        note: What the user should know: how many tokens are left, and how many of them the list did not name. Empty
            where there is no list.
        digest: ``sha256:…`` over the ids that were kept: with the source's digest it says what the model is. Empty
            where nothing was trimmed.
    """

    exported: Exported
    note: str = ""
    digest: str = ""


def trim(source: ModelSource, exported: Exported, vocabulary: Vocabulary | None) -> Trimmed:
    """The model with the tokens of a list and those that they need; see `compiler.vocabulary.tokenizer`.

    Kept tokens have new ids in the old order. A text that needs only kept tokens gives the same token strings, and from
    the same rows the same numbers. The graph is cut in place; the reference takes new ids and gives their logits.

    Args:
        source: Where it comes from.
        exported: As `compiler.export.export_model` gives it.
        vocabulary: The list; None: every token stays.

    Raises:
        UsageError: The model has no tokenizer, or not the tokens of the list.
        UnsupportedError: The tokenizer, or the way the graph uses token ids, is of no known kind.
    """
    if vocabulary is None:
        return Trimmed(exported)
    processor = exported.processor
    if processor is None:
        raise UsageError(f"{source.name} takes tensors and has no vocabulary", "Leave --vocabulary out")
    content = exported.files[processor.tokenizer]
    tokenizer = Tokenizer.from_buffer(content)
    check_known(vocabulary, tokenizer)
    kept = keep_tokens(content, _wanted(vocabulary, source, tokenizer), _named(processor, exported.generation))
    before, after = tokenizer.get_vocab_size(with_added_tokens=True), len(kept.ids)
    if after >= before:
        return Trimmed(exported, f"{vocabulary.name} keeps all {before:,} tokens: nothing is trimmed")
    head = source.task in _HEADS
    cut_vocabulary(exported.model, kept.ids, head=head)
    new = renumbering(kept.ids)
    trimmed = replace(
        exported,
        outputs=tensor_specs(tuple(exported.model.graph.outputs)),
        reference=_Reference(exported.reference or _Original(source.path), kept.ids, head=head),
        processor=replace(processor, pad_id=new[processor.pad_id]),
        files={**exported.files, processor.tokenizer: kept.content},
        generation=_renumbered(exported.generation, new),
    )
    named = len(vocabulary.tokens)
    note = f"the vocabulary has {after:,} of {before:,} tokens: {named:,} of {vocabulary.name}, and {after - named:,} "
    digest = hashlib.sha256(kept.ids.astype("<i8").tobytes()).hexdigest()
    return Trimmed(trimmed, f"{note}that these need or that are special", f"sha256:{digest}")


def _wanted(vocabulary: Vocabulary, source: ModelSource, tokenizer: Tokenizer) -> set[str]:
    """The list, and the special tokens that the model's folder names."""
    special = special_tokens(source.tokenizer).values() if source.tokenizer is not None else ()
    return {*vocabulary.tokens, *(token for token in special if tokenizer.token_to_id(token) is not None)}


def _named(processor: TextProcessor, generation: Generation | None) -> Iterator[int]:
    """Ids that a manifest names."""
    yield processor.pad_id
    if generation is not None:
        yield from (index for index in (generation.bos, *generation.eos) if index >= 0)


def _renumbered(generation: Generation | None, new: Mapping[int, int]) -> Generation | None:
    if generation is None:
        return None
    return replace(generation, eos=tuple(new[index] for index in generation.eos), bos=new.get(generation.bos, -1))


class _Reference:
    """The original model behind the new ids."""

    def __init__(self, original: Reference, ids: NDArray[np.int64], *, head: bool) -> None:
        self._original = original
        self._ids = ids
        self._head = head

    def __call__(self, feeds: Feeds) -> Arrays:
        """Its outputs; the logits are those of the tokens kept."""
        given = feeds[IDS]
        found = self._original({**feeds, IDS: self._ids[given].astype(given.dtype)})
        return {**found, LOGITS: np.ascontiguousarray(found[LOGITS][..., self._ids])} if self._head else found


class _Original:
    """An .onnx file as it is, in ONNX Runtime with its optimizations off."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._session: ort.InferenceSession | None = None

    def __call__(self, feeds: Feeds) -> Arrays:
        """Its outputs by name."""
        if self._session is None:
            options = ort.SessionOptions()
            options.log_severity_level = 4
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
            self._session = ort.InferenceSession(self._path, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in self._session.get_outputs()]
        return dict(zip(names, self._session.run(names, dict(feeds)), strict=True))
