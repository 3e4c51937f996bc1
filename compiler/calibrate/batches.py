"""What calibration runs on: batches without padding, gone through as often as it takes, and checked before it is."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from artifacts.errors import DataError
from artifacts.manifest import TensorSpec, TextProcessor
from artifacts.signature import CACHE_PREFIXES
from runtimes.generate.feeds import fitted
from runtimes.text import Tokens, pad

from ..export.exported import tensor_specs
from ..generation import prefill
from ..shorten import LONGEST, shortened

Feeds = Mapping[str, NDArray[Any]]

MOST_TOKENS = 1024
"""Tokens of a batch: enough to keep two cores busy, few enough that what is fetched of a small encoder is 100 MB."""
DATA = "the calibration data"


@dataclass(frozen=True)
class Batch:
    """Feeds of a graph, and which examples they are made of.

    Attributes:
        feeds: Arrays by name of the graph's input; no padding in them. Where the rows are apart, an array without axes
            belongs to all examples.
        examples: Numbers of the examples in the user's data, in the order of the first axis; a single one where the
            whole batch is one example.
    """

    feeds: Feeds
    examples: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Elements of the feeds of one example."""
        sizes = [array.size // max(1, len(self.examples)) if array.ndim else 1 for array in self.feeds.values()]
        return sum(sizes)

    @property
    def bytes(self) -> int:
        """Bytes of the feeds; an array that several inputs share counts once."""
        return sum({id(array): array.nbytes for array in self.feeds.values()}.values())

    def twice(self) -> Batch:
        """Every example two times."""
        feeds = {name: np.concatenate([array, array]) if array.ndim else array for name, array in self.feeds.items()}
        return Batch(feeds, (*self.examples, *self.examples))

    def part(self, start: int, stop: int) -> Batch:
        """Some of its examples. The arrays are views."""
        if stop - start >= len(self.examples):
            return self
        feeds = {name: array[start:stop] if array.ndim else array for name, array in self.feeds.items()}
        return Batch(feeds, self.examples[start:stop])


def place(examples: Sequence[int]) -> str:
    """How an error calls some examples."""
    first, last = min(examples), max(examples)
    if first == last:
        return f"example {first} of {DATA}"
    between = "to" if last - first == len(examples) - 1 else "and others up to"
    return f"examples {first} {between} {last} of {DATA}"


@dataclass(frozen=True)
class Batches:
    """An iterable of batches that begins anew each time.

    Attributes:
        make: Begins it: the same batches every time.
        rows_apart: Each index of the first axis of every input that has axes is an example of its own, so that a batch
            may be cut into smaller ones. Where it is not said, a batch is one example.
        notes: What the user should know: texts that were cut.
    """

    make: Callable[[], Iterable[Batch]]
    rows_apart: bool
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.make())

    def fitted(self, inputs: Sequence[ir.Value]) -> Batches:
        """The same for a graph of other KV caches, see `runtimes.generate.feeds.fitted`."""
        if not any(str(value.name).startswith(CACHE_PREFIXES) for value in inputs):
            return self
        specs = tensor_specs(tuple(inputs))
        return replace(self, make=lambda: (replace(batch, feeds=fitted(batch.feeds, specs)) for batch in self))


def text_batches(
    rows: Sequence[Tokens],
    names: Sequence[str],
    processor: TextProcessor,
    *,
    longest: int = LONGEST,
    most_tokens: int = MOST_TOKENS,
) -> Batches:
    """Batches of rows that all have the same length, so that no batch has padding; shortest first.

    Args:
        rows: The tokenized texts; longer ones are cut to ``longest`` tokens, the closing special token kept.
        names: Inputs of the graph.
        processor: How they become arrays.
        longest: Tokens of a row, at most.
        most_tokens: Tokens of a batch, at most; a single row may have more.
    """
    cut = sum(len(row) > longest for row in rows)
    limited = [shortened(row, longest) for row in rows]

    def make() -> Iterator[Batch]:
        for chosen in _alike(limited, most_tokens):
            yield Batch(pad([limited[number] for number in chosen], names, processor), chosen)

    notes = (f"{cut} of {len(rows)} texts were cut to {longest} tokens for calibration",) if cut else ()
    return Batches(make, rows_apart=True, notes=notes)


def token_batches(
    windows: Sequence[NDArray[np.int64]], inputs: Sequence[TensorSpec], *, most_tokens: int = MOST_TOKENS
) -> Batches:
    """Batches of prompts for a decoder graph, see docs/format.md: all of one length, so none is padded; shortest first.

    Logits are asked for at every position, so that the head's input is seen there too.

    Args:
        windows: Token ids, int64 [length] each, at least one token; as they are, no longer than the model allows.
        inputs: Of the graph.
        most_tokens: Tokens of a batch, at most; a single window may have more.
    """

    def make() -> Iterator[Batch]:
        for chosen in _alike(windows, most_tokens):
            rows = [windows[number] for number in chosen]
            every = np.tile(np.arange(len(rows[0]), dtype=np.int64), (len(rows), 1))
            yield Batch(prefill(rows, inputs, every), chosen)

    return Batches(make, rows_apart=True)


def _alike(rows: Sequence[Sized], most_tokens: int) -> Iterator[tuple[int, ...]]:
    """The numbers of rows of one length, ``most_tokens`` together or a single row; shortest first."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        by_length[len(row)].append(number)
    for length, numbers in sorted(by_length.items()):
        step = max(1, most_tokens // max(1, length))
        for start in range(0, len(numbers), step):
            yield tuple(numbers[start : start + step])


def tensor_batches(feeds: Sequence[Feeds] | Callable[[], Iterable[Feeds]], *, rows_apart: bool = False) -> Batches:
    """Batches of feeds as they are.

    Args:
        feeds: Arrays by name of the input: a list, or a function that begins it anew each time.
        rows_apart: See `Batches`.
    """
    begin = feeds if callable(feeds) else lambda: feeds

    def make() -> Iterator[Batch]:
        number = 0
        for one in begin():
            sizes = {array.shape[0] for array in one.values() if array.ndim} if rows_apart else {1}
            count = sizes.pop() if len(sizes) == 1 else 1
            yield Batch(one, tuple(range(number, number + count)))
            number += count

    return Batches(make, rows_apart)


@dataclass(frozen=True)
class Survey:
    """What one look at all batches tells.

    Attributes:
        digest: SHA-256 of names, types, shapes and content of all feeds, in hexadecimal; the name of the first stands
            for the content of an array that several inputs of a batch share.
        examples: How many there are.
        shapes: (examples in the batch, elements of an example) of every batch, without duplicates.
        bytes: Of the feeds of a batch, at most.
        smallest: The example with the fewest elements.
        largest: The one with the most.
    """

    digest: str
    examples: int
    shapes: frozenset[tuple[int, int]]
    bytes: int
    smallest: Batch
    largest: Batch


def survey(batches: Batches, inputs: Sequence[ir.Value]) -> Survey:
    """Look at all batches, and hold them to what the graph takes.

    Raises:
        DataError: There are none; an input is missing, unknown, of another type, rank or size than the graph states,
            or holds NaN or an infinity: names the input and the example.
    """
    digest = hashlib.sha256()
    shapes: set[tuple[int, int]] = set()
    found: dict[bool, Batch] = {}
    examples = most_bytes = 0
    for batch in batches:
        check(batch, inputs, rows_apart=batches.rows_apart)
        if not batch.examples or not all(array.size for array in batch.feeds.values()):
            continue
        _digest(batch.feeds, digest.update)
        examples += len(batch.examples)
        most_bytes = max(most_bytes, batch.bytes)
        shapes.add((len(batch.examples), batch.elements))
        for largest in (False, True):
            known = found.get(largest)
            if known is None or (batch.elements > known.elements if largest else batch.elements < known.elements):
                found[largest] = batch.part(0, 1)
    if not found:
        raise DataError("there is no calibration data", "It needs at least one example")
    return Survey(digest.hexdigest(), examples, frozenset(shapes), most_bytes, found[False], found[True])


def _digest(feeds: Feeds, update: Callable[[bytes | memoryview], None]) -> None:
    first: dict[int, str] = {}
    for name, array in sorted(feeds.items()):
        update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        if first.setdefault(id(array), name) == name:
            update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        else:
            update(f"{first[id(array)]}\n".encode())


def check(batch: Batch, inputs: Sequence[ir.Value], *, rows_apart: bool) -> None:
    """Hold a batch to what the graph takes.

    Raises:
        DataError: See `survey`.
    """
    known = {value.name or "": value for value in inputs}
    if missing := [name for name in known if name not in batch.feeds]:
        raise DataError(f"{DATA} lacks {', '.join(missing)}, which the model takes", "Give every input an array")
    for name, array in batch.feeds.items():
        if name not in known:
            raise DataError(f"{DATA} has {name!r}; the model takes {', '.join(known)}", "Leave it out, or rename it")
        _check_array(name, array, known[name], batch)
        if rows_apart and array.ndim and len(array) != len(batch.examples):
            raise DataError(
                f"{name} is {list(array.shape)} in a batch of {len(batch.examples)} examples of {DATA}",
                "The first axis of every input must be as long",
            )


def _check_array(name: str, array: NDArray[Any], value: ir.Value, batch: Batch) -> None:
    where = place(batch.examples) if batch.examples else DATA
    if value.dtype is not None and array.dtype != value.dtype.numpy():
        raise DataError(f"{name} is {array.dtype} in {where}, and the model takes {value.dtype.numpy()}", "Convert it")
    if value.shape is not None:
        fits = array.ndim == len(value.shape) and all(
            not isinstance(dim, int) or dim == size for dim, size in zip(value.shape, array.shape, strict=True)
        )
        if not fits:
            stated = ", ".join(str(dim) for dim in value.shape)
            raise DataError(f"{name} is {list(array.shape)} in {where}, and the model takes [{stated}]", "Reshape it")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        row, number = first_not_finite(array)
        example = batch.examples[row if len(batch.examples) > 1 else 0]
        raise DataError(f"{name} is {number} in {place([example])}", "Leave that example out")


def first_not_finite(array: NDArray[Any]) -> tuple[int, float]:
    """Index along the first axis of the first NaN or infinity, and the number; 0 for an array without axes."""
    index = np.argwhere(~np.isfinite(array))[0]
    return int(index[0]) if len(index) else 0, float(array[tuple(index)])
