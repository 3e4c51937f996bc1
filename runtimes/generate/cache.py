"""The KV cache: keys and values of every layer in one buffer each, which the graph reads and writes in place."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from artifacts.errors import UsageError
from artifacts.manifest import TensorSpec
from artifacts.signature import STEP_INPUTS, cache_names

_BLOCK = 32
_SPARE = 0.9
"""Share of the free memory that a cache may take: the run itself needs some."""

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class CacheLayout:
    """What a graph's KV cache is made of.

    Attributes:
        tensors: (input name, output name, heads, head size, dtype) of each buffer; two a layer.
    """

    tensors: tuple[tuple[str, str, int, int, np.dtype[Any]], ...]

    @property
    def token_bytes(self) -> int:
        """Bytes that one token of one row takes, over all layers."""
        return sum(heads * size * dtype.itemsize for _, _, heads, size, dtype in self.tensors)


def layout_of(inputs: Sequence[TensorSpec]) -> CacheLayout:
    """The layout of the inputs of a decoder, see docs/format.md."""
    past = inputs[len(STEP_INPUTS) :]
    names = [pair for layer in range(len(past) // 2) for pair in cache_names(layer)]
    return CacheLayout(
        tuple(
            (old, new, int(spec.shape[1]), int(spec.shape[3]), np.dtype(spec.dtype))
            for (old, new), spec in zip(names, past, strict=True)
        )
    )


def check_memory(layout: CacheLayout, rows: int, capacity: int, free: int | None = None) -> None:
    """Refuse a cache that would not fit, before anything is allocated.

    Args:
        layout: Of the graph.
        rows: Texts at once.
        capacity: Tokens of each, prompt included.
        free: Bytes of memory that are free; None: ask the system.

    Raises:
        UsageError: It takes more than 0.9 of that; says how much, and the most tokens that fit.
    """
    needed, room = rows * capacity * layout.token_bytes, _room(free)
    if needed <= room:
        return
    most = room // (rows * layout.token_bytes)
    rows_said = "1 text" if rows == 1 else f"{rows} texts at once"
    raise UsageError(
        f"a KV cache of {capacity} tokens for {rows_said} takes {needed / 1e9:.3g} GB; {room / 1e9:.3g} GB may be used",
        f"At most {most} tokens fit, prompt included: pass a smaller max_new_tokens, or a shorter prompt",
    )


def rows_that_fit(layout: CacheLayout, rows: int, capacity: int, free: int | None = None) -> int:
    """How many of ``rows`` texts fit at once, from 0 on; see `check_memory`."""
    return min(rows, _room(free) // (capacity * layout.token_bytes))


def _room(free: int | None) -> int:
    if free is None:
        import psutil

        free = int(psutil.virtual_memory().available)
    return int(_SPARE * free)


class KVCache:
    """Buffers for so many rows of so many tokens. What lies beyond a row's tokens is never read.

    A row is a slot; rows ``start`` to ``stop`` of every buffer are one piece of memory, so the graph can be bound to
    any stretch of slots. Memory is touched, and so taken from the system, only as tokens come in.

    Args:
        layout: Of the graph.
        rows: Slots.
        capacity: Tokens of each; rounded up to a multiple of 32.
    """

    def __init__(self, layout: CacheLayout, rows: int, capacity: int) -> None:
        self.layout = layout
        self.rows = rows
        self.capacity = -(-capacity // _BLOCK) * _BLOCK
        self._buffers = [
            np.zeros((rows, heads, self.capacity, size), dtype) for _, _, heads, size, dtype in layout.tensors
        ]
        self._scratch: list[NDArray[Any]] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def views(self, start: int, stop: int) -> tuple[Arrays, Arrays]:
        """(inputs, outputs) of the graph by name: the same memory for both, slots ``start`` to ``stop``."""
        inputs, outputs = {}, {}
        for (old, new, *_), buffer in zip(self.layout.tensors, self._buffers, strict=True):
            inputs[old] = outputs[new] = buffer[start:stop]
        return inputs, outputs

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first ``length`` tokens of one slot into another."""
        for buffer in self._buffers:
            buffer[target, :, :length] = buffer[source, :, :length]

    def read(self, slot: int, start: int, stop: int) -> NDArray[np.uint8]:
        """A copy of tokens ``start`` to ``stop`` of a slot, for :meth:`write`; uint8 [tokens * token_bytes]."""
        block = np.empty((stop - start) * self.layout.token_bytes, np.uint8)
        for buffer, part in zip(self._buffers, self._parts(block), strict=True):
            part[...] = buffer[slot, :, start:stop]
        return block

    def write(self, slot: int, start: int, block: NDArray[np.uint8]) -> None:
        """Put tokens that :meth:`read` took, of a cache of the same layout, into a slot from ``start`` on."""
        stop = start + len(block) // self.layout.token_bytes
        for buffer, part in zip(self._buffers, self._parts(block), strict=True):
            buffer[slot, :, start:stop] = part

    def _parts(self, block: NDArray[np.uint8]) -> Iterator[NDArray[Any]]:
        """A block's keys or values of each layer, [heads, tokens, head size]: its own memory."""
        tokens, start = len(block) // self.layout.token_bytes, 0
        for _, _, heads, size, dtype in self.layout.tensors:
            stop = start + heads * tokens * size * dtype.itemsize
            yield block[start:stop].view(dtype).reshape(heads, tokens, size)
            start = stop

    def grow(self, capacity: int, lengths: Sequence[int], *, rows: int = 0) -> None:
        """Take other buffers, and copy the first ``lengths[i]`` tokens of slot i for as many slots as there are.

        Args:
            capacity: Tokens of each slot.
            lengths: At most ``rows``, none above either capacity.
            rows: Slots; 0: as many as there are.
        """
        larger = KVCache(self.layout, rows or self.rows, capacity)
        for buffer, old in zip(larger._buffers, self._buffers, strict=True):
            for slot, length in enumerate(lengths):
                buffer[slot, :, :length] = old[slot, :, :length]
        self.rows, self.capacity = larger.rows, larger.capacity
        self._buffers, self._scratch = larger._buffers, None

    def reorder(self, sources: Sequence[int], length: int) -> None:
        """Make slot i hold the first ``length`` tokens of what slot ``sources[i]`` held, for all i at once.

        Only slots that change are copied, each once (and one more for each ring of slots that wait for each other).
        """
        left = {target: source for target, source in enumerate(sources) if target != source}
        while left:
            wanted = set(left.values())
            free = next((target for target in left if target not in wanted), None)
            if free is not None:
                self.copy(left.pop(free), free, length)
                continue
            # A ring: put one aside, and let the one that waits for it take it from there.
            target, source = next(iter(left.items()))
            spare = self._spare()
            for buffer, scratch in zip(self._buffers, spare, strict=True):
                scratch[:, :length] = buffer[target, :, :length]
            del left[target]
            self.copy(source, target, length)
            self._finish_ring(left, target, source, spare, length)

    def _finish_ring(self, left: dict[int, int], aside: int, free: int, spare: list[NDArray[Any]], length: int) -> None:
        """Slot ``free`` may be written now; follow the ring until the slot that wants what was put aside."""
        while free in left:
            source = left.pop(free)
            if source != aside:
                self.copy(source, free, length)
                free = source
                continue
            for buffer, scratch in zip(self._buffers, spare, strict=True):
                buffer[free, :, :length] = scratch[:, :length]
            return

    def _spare(self) -> list[NDArray[Any]]:
        if self._scratch is None:
            self._scratch = [np.empty(buffer.shape[1:], buffer.dtype) for buffer in self._buffers]
        return self._scratch
