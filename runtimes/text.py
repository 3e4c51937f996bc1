"""Text to the integer arrays that an encoder graph takes, and nothing else: no model, no torch, no transformers."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer

from artifacts.errors import BundleError, UsageError
from artifacts.manifest import TextProcessor

from .items import Item
from .settings import MAX_TOKENS

Int64 = NDArray[np.int64]
MADE = ("input_ids", "attention_mask", "token_type_ids")
"""Graph inputs that a tokenizer can make."""
QUESTION_TOKENS = 64
"""Longest question kept, as in transformers' question answering."""

# The first chunk is small, so that the model starts soon; large ones pad least: 1.05 times the throughput of 1024.
_FIRST_ITEMS = 512
_CHUNK_ITEMS = 4096
_CHUNK_CHARACTERS = 1 << 18
_CHARACTERS_PER_TOKEN = 8
_GROWTH = 4
_CUT_WORDS = 16


@dataclass(frozen=True)
class Tokens:
    """One tokenized input, special tokens included.

    Attributes:
        ids: Token ids, int64 [n].
        types: Segment of each token, int64 [n].
        special: True on the tokens that the template added ([CLS], [SEP]), bool [n].
        offsets: Characters of each token in its own text, int64 [n, 2]; [0, 2] where offsets were not asked for.
        context: True on tokens of the second text, bool [n]; all False for a single text or without offsets.
        words: Characters of the word that each token is part of, int64 [n, 2]; as ``offsets`` where it has no words.
    """

    ids: Int64
    types: Int64
    special: NDArray[np.bool_]
    offsets: Int64
    context: NDArray[np.bool_]
    words: Int64

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Batch:
    """Inputs of about the same length, padded to one shape; of equal inputs one, computed for all.

    Attributes:
        indices: Where each row stands in the list given.
        rows: The tokens of each row, without padding.
        feeds: Graph inputs by name, int64 [rows, longest row], C-contiguous.
        twins: (row, place) of the further places at which the input of a row stands.
    """

    indices: tuple[int, ...]
    rows: tuple[Tokens, ...]
    feeds: dict[str, Int64]
    twins: tuple[tuple[int, int], ...] = ()

    def spread(self, outputs: dict[str, NDArray[Any]]) -> tuple[Batch, dict[str, NDArray[Any]]]:
        """Batch and outputs, arrays of a row each, with a row for every place."""
        if not self.twins:
            return self, outputs
        sources = [*range(len(self.rows)), *(row for row, _ in self.twins)]
        indices = (*self.indices, *(place for _, place in self.twins))
        feeds = {name: array[sources] for name, array in self.feeds.items()}
        batch = Batch(indices, tuple(self.rows[source] for source in sources), feeds)
        return batch, {name: array[sources] for name, array in outputs.items()}


class Chunk(NamedTuple):
    """A stretch of the items: those from index ``start`` on."""

    start: int
    items: list[Item]


def pad(rows: Sequence[Tokens], names: Sequence[str], processor: TextProcessor) -> dict[str, Int64]:
    """Graph inputs for some rows, padded on the right to the longest: int64 [rows, length >= 1], C-contiguous.

    A row without tokens (an empty text where the tokenizer adds no special tokens) becomes one attended pad token: a
    row that attends to nothing has no defined result.
    """
    length = max(1, *(len(row) for row in rows)) if rows else 1
    shape = (len(rows), length)
    ids = np.full(shape, processor.pad_id, np.int64)
    mask = np.zeros(shape, np.int64)
    types = np.full(shape, processor.pad_type_id, np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row.ids
        mask[index, : max(1, len(row))] = 1
        types[index, : len(row)] = row.types
    made = dict(zip(MADE, (ids, mask, types), strict=True))
    return {name: made[name] for name in names}


class TextEncoder:
    """Tokenizes, truncates, sorts by length and batches.

    Padding and truncation stated inside tokenizer.json are ignored: the manifest's ``max_length`` and ``pad_id`` count.
    Tokenizing stays on the calling thread unless TOKENIZERS_PARALLELISM says otherwise: the tokenizer's thread pool
    would compete with ONNX Runtime's and does not survive a fork.
    """

    def __init__(self, processor: TextProcessor, tokenizer: Path, inputs: Sequence[str]) -> None:
        """Check that the tokenizer can feed the graph. The file is read on first use.

        Args:
            processor: How the manifest says to prepare texts.
            tokenizer: Path of tokenizer.json.
            inputs: Names of the graph's inputs.

        Raises:
            BundleError: The graph takes an input that is not made from text.
        """
        unknown = [name for name in inputs if name not in MADE]
        if unknown:
            raise BundleError(f"the graph takes {', '.join(unknown)}, which no tokenizer makes", "Use .run(feeds)")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        self.processor = processor
        self.inputs = tuple(inputs)
        self._path = tokenizer

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, set to truncate to ``max_length`` with special tokens kept; pairs lose from the longer text.

        Raises:
            BundleError: tokenizer.json cannot be read, or ``max_length`` leaves no room for text.
        """
        return self._read("longest_first", 0)

    @cached_property
    def _windowed(self) -> Tokenizer:
        # A tokenizer of its own: truncation is a setting of the object, and another thread may be encoding.
        return self._read("only_second", self._stride)

    @property
    def mask_id(self) -> int:
        """Id of the manifest's mask token.

        Raises:
            BundleError: The manifest names none, or the tokenizer does not know it.
        """
        token = self.processor.mask_token
        found = self.tokenizer.token_to_id(token) if token else None
        if found is None:
            raise BundleError(f"the tokenizer has no mask token {token!r}", "Compile the model again")
        return int(found)

    def encode(self, items: Sequence[Item], *, offsets: bool = False) -> list[Tokens]:
        """Tokenize and truncate; order kept. Use `batches` for long lists: this keeps every token in memory.

        A text much longer than ``max_length`` tokens is cut by characters before it is tokenized, where that provably
        changes nothing; see `shorten`.

        Raises:
            BundleError: The tokenizer fails.
        """
        tokenizer = self.tokenizer
        short: list[Item] = [
            self.shorten(item) if isinstance(item, str) else (self.shorten(item[0]), self.shorten(item[1]))
            for item in items
        ]
        encode = tokenizer.encode_batch if offsets else tokenizer.encode_batch_fast
        with _failures():
            encodings = encode(short)
        return [_tokens(encoding, offsets=offsets) for encoding in encodings]

    def shorten(self, text: str) -> str:
        """A prefix of ``text`` with the same first ``max_length`` tokens; the text itself if it is short.

        A token covers no fixed number of characters (a long unknown word is one token, spaces are none), so the bound
        is found: 8 characters a token, then 4 times as many, until the prefix has more than ``max_length`` tokens and
        the words at its end, the only ones that a cut can change, are not among those kept. 1 MB of prose costs the
        tokenizing of a few kB; the worst case costs 4/3 more than tokenizing all of it.
        """
        count = _CHARACTERS_PER_TOKEN * max(128, self.processor.max_length)
        while count < len(text):
            prefix = text[:count]
            if _survives_cut(self._bare(prefix)):
                return prefix
            count *= _GROWTH
        return text

    def batches(self, items: Iterable[Item], *, max_tokens: int = MAX_TOKENS, offsets: bool = False) -> Iterator[Batch]:
        """Batches of rows of similar length, at most ``max_tokens`` padded tokens each (one row may exceed it alone).

        Reads ``items`` lazily in chunks of bounded size and sorts within a chunk, so an endless generator works.

        Raises:
            UsageError: ``max_tokens`` < 1.
            BundleError: The tokenizer fails.
        """
        for chunk in self.chunks(items):
            yield from self.prepare(chunk, max_tokens=max_tokens, offsets=offsets)

    def chunks(self, items: Iterable[Item]) -> Iterator[Chunk]:
        """The items in stretches of bounded size, read lazily."""
        # Bounded in characters too: a thousand long texts would be gigabytes of tokens at once.
        most = _CHARACTERS_PER_TOKEN * max(128, self.processor.max_length)
        start, limit = 0, _FIRST_ITEMS
        taken: list[Item] = []
        characters = 0
        for item in items:
            taken.append(item)
            characters += min(len(item), most) if isinstance(item, str) else sum(min(len(t), most) for t in item)
            if len(taken) >= limit or characters >= _CHUNK_CHARACTERS:
                yield Chunk(start, taken)
                start, limit = start + len(taken), _CHUNK_ITEMS
                taken, characters = [], 0
        if taken:
            yield Chunk(start, taken)

    def prepare(
        self, chunk: Chunk, *, max_tokens: int = MAX_TOKENS, padding: int | None = None, offsets: bool = False
    ) -> list[Batch]:
        """The batches of a chunk, the longest rows first: memory that ONNX Runtime takes for them does for the rest.

        Equal items, of which real lists hold many, are tokenized and computed once; see `Batch.spread`.

        Raises:
            UsageError: ``max_tokens`` < 1.
            BundleError: The tokenizer fails.
        """
        if max_tokens < 1:
            raise UsageError(f"max_tokens is {max_tokens}", "Pass a positive number of tokens")
        places: dict[Item, list[int]] = {}
        for place, item in enumerate(chunk.items, chunk.start):
            places.setdefault(item, []).append(place)
        rows = self.encode(list(places), offsets=offsets)
        return list(self.group(rows, list(places.values()), max_tokens=max_tokens, padding=padding))[::-1]

    def group(
        self,
        rows: Sequence[Tokens],
        places: Sequence[Sequence[int]],
        *,
        max_tokens: int = MAX_TOKENS,
        padding: int | None = None,
    ) -> Iterator[Batch]:
        """Batches of rows already tokenized, shortest first.

        Args:
            rows: The rows.
            places: Where each of them stands, once at least.
            max_tokens: Padded tokens a batch.
            padding: Those of them that may be padding: more would cost as much as another run. Within 2 % of the best
                cuts for real sentences. None: as many as come.
        """
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        taken: list[int] = []
        padded, width = 0, 0
        for index in order:
            # Ascending order: the next row is the longest so far and sets the width.
            wider = max(1, len(rows[index]))
            padded += len(taken) * (wider - width)
            full = (len(taken) + 1) * wider > max_tokens or (padding is not None and padded > padding)
            if taken and full:
                yield self._batch(taken, rows, places)
                taken, padded = [], 0
            width = wider
            taken.append(index)
        if taken:
            yield self._batch(taken, rows, places)

    def windows(self, question: str, context: str) -> Iterator[Tokens]:
        """The question with one stretch of the context after another, overlapping, each of at most 384 tokens.

        As in transformers: windows of ``min(max_length, 384)`` tokens which share ``min(window // 2, 128)``; the
        question is cut to 64 tokens, or fewer where the window is small.

        Raises:
            BundleError: The tokenizer fails.
        """
        short = self._short_question(question)
        tokenizer = self._windowed
        with _failures():
            first = tokenizer.encode(short, context)
        yield _tokens(first, offsets=True)
        for overflow in first.overflowing:
            yield _tokens(overflow, offsets=True)

    @property
    def _window(self) -> int:
        return min(self.processor.max_length, 384)

    @property
    def _stride(self) -> int:
        room = self._window - self.tokenizer.num_special_tokens_to_add(is_pair=True)
        return max(0, min(self._window // 2, 128, room - 2))

    def _short_question(self, question: str) -> str:
        room = self._window - self.tokenizer.num_special_tokens_to_add(is_pair=True) - self._stride - 1
        limit = min(QUESTION_TOKENS, room)
        text = self.shorten(question)
        encoding = self._bare(text)
        while len(encoding.ids) > limit:
            # The end of a cut question may split into other tokens than before: cut until it fits.
            text = text[: min(encoding.offsets[limit - 1][1], len(text) - 1)] if limit else ""
            encoding = self._bare(text)
        return text

    def _bare(self, text: str) -> Encoding:
        tokenizer = self.tokenizer
        with _failures():
            return tokenizer.encode(text, add_special_tokens=False)

    def _read(self, strategy: str, stride: int) -> Tokenizer:
        length = self._window if strategy == "only_second" else self.processor.max_length
        try:
            tokenizer = Tokenizer.from_file(str(self._path))
        except Exception as error:  # tokenizers raises nothing narrower
            raise BundleError(f"{self._path} is not a tokenizer: {error}", "Compile the model again") from error
        pair = strategy == "only_second"
        if length <= tokenizer.num_special_tokens_to_add(is_pair=pair) + int(pair):
            raise BundleError(
                f"max_length {length} leaves no room for text",
                "Its tokenizer states too short a model_max_length: correct it and compile again",
            )
        tokenizer.no_padding()
        tokenizer.enable_truncation(length, stride=stride, strategy=strategy)
        return tokenizer

    def _batch(self, taken: Sequence[int], rows: Sequence[Tokens], places: Sequence[Sequence[int]]) -> Batch:
        chosen = tuple(rows[index] for index in taken)
        twins = tuple((row, place) for row, index in enumerate(taken) for place in places[index][1:])
        indices = tuple(places[index][0] for index in taken)
        return Batch(indices, chosen, pad(chosen, self.inputs, self.processor), twins)


@contextmanager
def _failures() -> Iterator[None]:
    """What the tokenizer raises, as a BundleError."""
    try:
        yield
    except Exception as error:  # tokenizers raises nothing narrower
        raise BundleError(f"the tokenizer failed: {error}", "Compile the model again") from error


def _survives_cut(encoding: Encoding) -> bool:
    """Whether the tokens kept end well before the end of the text, so that cutting there did not change them."""
    if not encoding.overflowing:
        return False
    kept = [word for word in encoding.word_ids if word is not None]
    last = [word for word in encoding.overflowing[-1].word_ids if word is not None]
    # Several words, not one: an added token such as [MASK] that is cut in two falls apart into words.
    return bool(kept) and bool(last) and kept[-1] + _CUT_WORDS < last[-1]


def _tokens(encoding: Encoding, *, offsets: bool) -> Tokens:
    ids = np.array(encoding.ids, np.int64)
    types = np.array(encoding.type_ids, np.int64)
    special = np.array(encoding.special_tokens_mask, np.bool_)
    if not offsets:
        none = np.zeros((0, 2), np.int64)
        return Tokens(ids, types, special, none, np.zeros(len(ids), np.bool_), none)
    spans = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    context = np.array([sequence == 1 for sequence in encoding.sequence_ids], np.bool_)
    return Tokens(ids, types, special, spans, context, _words(encoding, spans, context))


def _words(encoding: Encoding, offsets: Int64, context: NDArray[np.bool_]) -> Int64:
    """Characters of the word around each token, [n, 2]: first start and last end of the tokens with its word id."""
    found: dict[tuple[bool, int], tuple[int, int]] = {}
    keys = [
        None if word is None else (bool(second), word) for word, second in zip(encoding.word_ids, context, strict=True)
    ]
    for key, (start, end) in zip(keys, offsets.tolist(), strict=True):
        if key is not None:
            first, last = found.get(key, (start, end))
            found[key] = min(first, start), max(last, end)
    spans = [tuple(span) if key is None else found[key] for key, span in zip(keys, offsets.tolist(), strict=True)]
    return np.array(spans, np.int64).reshape(-1, 2)
