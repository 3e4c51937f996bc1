"""Many texts at once: continuous batching over the slots of one KV cache.

Each step writes one token of every text, and then reads at most one piece of the prompts that wait. Texts join and
leave at any step. The texts that are written have the first slots, one after the other: where one leaves, the last one
moves into its slot, and nothing else moves. A prompt is read in the slot behind them; where some left meanwhile, it
moves down once, when it was read.

A text depends on its own prompt, seed and settings; its neighbours only change the rounding of the logits.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice

from artifacts.errors import HastenError

from .cache import check_memory, rows_that_fit
from .decoder import Decoder, Floats, grouped, piece_end
from .detokenize import Vocabulary
from .pace import Pace, Speed
from .prefixes import PrefixCache
from .results import LoopStats, Piece
from .rows import Constraint, Job, Matcher, Request, Row
from .speculate import Speculator

__all__ = ["Constraint", "Job", "Loop", "LoopStats", "Matcher", "Pace", "PrefixCache", "Request", "Row"]

_AHEAD = 512
"""Tokens of an answer that room is made for when a prompt needs more room anyway."""
_PACE = Pace()


@dataclass
class _Reading:
    """The texts of a prompt that is being read, and the slot."""

    rows: list[Row]
    slot: int


class Loop:
    """Writes texts. One thread drives it; `add` may be called from any.

    Args:
        decoder: Its slots say how many texts are written at once.
        vocabulary: Of the tokenizer.
        pace: How reading and writing share the time.
        prefixes: Of texts of the same session; what it knows of a prompt is not read again.
        held: Tokens of the first request that slot 0 of the cache holds already.
        speculator: Of the same session; None: nothing is guessed.
    """

    def __init__(
        self,
        decoder: Decoder,
        vocabulary: Vocabulary,
        *,
        pace: Pace = _PACE,
        prefixes: PrefixCache | None = None,
        held: int = 0,
        speculator: Speculator | None = None,
    ) -> None:
        self._decoder = decoder
        self._vocabulary = vocabulary
        self._prefixes = prefixes
        self._held = held
        self._shape = (decoder.cache.rows, decoder.cache.capacity)
        self._speed = Speed(pace)
        self._speculator = speculator
        self._first: Row | None = None
        self._arrived: deque[Row] = deque()
        self._waiting: deque[Row] = deque()
        self._reading: _Reading | None = None
        self._active: list[Row] = []
        self._read_tokens = self._written_tokens = self._drafted = self._accepted = 0

    @property
    def busy(self) -> bool:
        """Whether there is a text that has not ended."""
        return bool(self._active or self._reading or self._waiting or self._arrived)

    @property
    def stats(self) -> LoopStats:
        """What it does now, and did so far."""
        reading = len(self._reading.rows) if self._reading is not None else 0
        waiting = len(self._waiting) + len(self._arrived)
        known = self._prefixes
        counted = (0, 0, 0) if known is None else (known.hits, known.saved, known.nbytes)
        guessed = (self._drafted, self._accepted)
        done = (self._read_tokens, self._written_tokens)
        return LoopStats(len(self._active), reading, waiting, *done, *counted, *guessed)

    @property
    def held(self) -> tuple[int, ...]:
        """Token ids that slot 0 holds, for a loop of one row."""
        return () if self._first is None else self._first.held

    def add(self, request: Request) -> None:
        """Queue a prompt; its texts begin, in the order of the queue, when there are slots and memory.

        Raises:
            UsageError: The prompt would not fit in memory, were it alone.
        """
        cache = self._decoder.cache
        if len(request.prompt) > cache.capacity:
            check_memory(cache.layout, 1, len(request.prompt))
        self._arrived.extend(Row(request, index, self._vocabulary) for index in range(request.job.n))

    def step(self) -> list[Piece]:
        """One token of every text, and one piece of reading; what can be said then. Nothing happens if it is idle.

        Raises:
            ProviderError: ONNX Runtime failed: nobody knows what the cache holds. What goes wrong with one text is told
                in a piece of it.
        """
        while self._arrived:
            self._waiting.append(self._arrived.popleft())
        return [*self._end_interrupted(), *self._write(), *self._read()]

    def run(self, requests: Sequence[Request]) -> Iterator[Piece]:
        """The pieces of all texts, as they come; closing the iterator ends all of them.

        Raises:
            UsageError: As `add`.
            ProviderError: ONNX Runtime failed.
        """
        try:
            for request in requests:
                self.add(request)
            while self.busy:
                for piece in self.step():
                    if piece.error is not None:
                        raise piece.error
                    yield piece
        finally:
            self._active.clear()
            self._waiting.clear()
            self._arrived.clear()
            self._reading = None

    def _end_interrupted(self) -> list[Piece]:
        """Texts that were cancelled, or whose time is over, give up their slots."""
        reading = self._reading.rows if self._reading is not None else []
        rows = (*self._active, *reading, *self._waiting)
        pieces = [row.end(why) for row in rows if (why := row.job.interrupted()) is not None]
        if not pieces:
            return []
        self._leave()
        if any(row.finish is not None for row in reading):
            self._reading = None
        self._waiting = deque(row for row in self._waiting if row.finish is None)
        return pieces

    def _write(self) -> list[Piece]:
        """A token of every text, or several where guesses are right."""
        pieces = self._make_room()
        rows = self._active
        if not rows:
            return pieces
        begin = time.perf_counter()
        last, lengths = [row.tokens[-1] for row in rows], [row.length for row in rows]
        adapters = [row.job.adapter for row in rows]
        drafts = self._speculator.plan(rows, self._decoder.cache.capacity) if self._speculator is not None else []
        start = time.perf_counter()
        if drafts:
            told = [[token, *draft] for token, draft in zip(last, drafts, strict=True)]
            logits = self._decoder.verify(told, lengths, adapters)
            pieces += self._check(drafts, logits, time.perf_counter() - start)
        else:
            logits = self._decoder.step(last, lengths, adapters)
            if self._speculator is not None:
                self._speculator.costs.stepped(len(rows), time.perf_counter() - start)
            pieces += self._advance(rows, logits)
        self._leave()
        self._speed.wrote(time.perf_counter() - begin)
        return pieces

    def _advance(self, rows: Sequence[Row], logits: Sequence[Floats] | Floats) -> list[Piece]:
        pieces = []
        for row, values in zip(rows, logits, strict=True):
            if row.finish is None:
                pieces += self._go_on(row, (), values[None])
                self._written_tokens += 1
        return pieces

    def _go_on(self, row: Row, draft: Sequence[int], logits: Floats) -> list[Piece]:
        """A text goes on; where it cannot, those of its request end, and no others."""
        try:
            return row.check(draft, logits)
        except HastenError as error:
            if self._reading is not None and self._reading.rows[0].request is row.request:
                self._reading = None
            for one in (*self._active, *self._waiting):
                one.finish = "cancelled" if one.request is row.request else one.finish
            self._waiting = deque(one for one in self._waiting if one.finish is None)
            return [Piece("", row.request.number, row.index, error=error)]

    def _check(self, drafts: Sequence[Sequence[int]], logits: Floats, seconds: float) -> list[Piece]:
        """Every text goes on as far as its guess was right, and by one token more."""
        pieces: list[Piece] = []
        right: list[int] = []
        for row, draft, values in zip(self._active, drafts, logits, strict=True):
            before, count = row.accepted, len(row.tokens)
            pieces += self._go_on(row, draft, values) if row.finish is None else []
            right.append(row.accepted - before)
            self._written_tokens += max(1, len(row.tokens) - count)
        if self._speculator is not None:
            self._speculator.note(drafts, right, seconds)
        self._drafted += sum(map(len, drafts))
        self._accepted += sum(right)
        return pieces

    def _leave(self) -> None:
        """Texts that ended give up their slots, which the last ones take."""
        rows = self._active
        for slot in reversed(range(len(rows))):
            if rows[slot].finish is None:
                continue
            self._keep(rows[slot], rows[slot].held, slot)
            last = rows.pop()
            if slot < len(rows):
                self._decoder.cache.copy(len(rows), slot, last.length)
                rows[slot] = last

    def _keep(self, row: Row, tokens: Sequence[int], slot: int) -> None:
        """Let the prefix cache know what a slot holds of a text."""
        if self._prefixes is not None:
            self._prefixes.keep(tokens, self._decoder.cache, slot, adapter=row.job.adapter)

    def _read(self) -> list[Piece]:
        """At most one call that reads: a piece of a prompt, or some short prompts."""
        if self._reading is None:
            families = self._take()
            if not families:
                return self._refuse()
            if len(families) > 1:
                return self._read_together(families)
            self._reading = self._begin(families[0])
        return self._read_piece(self._reading)

    def _take(self) -> list[list[Row]]:
        """The texts that are read next, by prompt, taken from those who wait: of one prompt, or of some short ones."""
        if not self._waiting or not self._fits(self._waiting[0]):
            return []
        cache, most = self._decoder.cache, self._speed.piece(writing=bool(self._active))
        coming = islice(self._waiting, cache.rows - len(self._active))
        families = [list(rows) for _, rows in groupby(coming, key=lambda row: id(row.request))]
        lengths = [len(family[0].request.prompt) for family in families]
        taken = families[:1]
        known = [self._known(family[0]) for family in families]
        if lengths[0] <= most and not known[0]:
            # As with pieces: a call for single tokens is not rounded as one for several.
            fitting = min(most, cache.capacity) if lengths[0] > 1 else 1
            least = min(lengths[0], 2)
            short = [index for index, one in enumerate(lengths) if least <= one <= fitting and not known[index]]
            groups = grouped([lengths[index] for index in short], most)
            taken = [families[short[place]] for place in next(group for group in groups if 0 in group)]
        left = {id(row) for family in taken for row in family}
        self._waiting = deque(row for row in self._waiting if id(row) not in left)
        return taken

    def _known(self, row: Row) -> int:
        """Tokens of its prompt that need not be read: prompts that go on behind some are read one by one."""
        if self._held or self._prefixes is None:
            return self._held
        return self._prefixes.longest(row.request.prompt, adapter=row.job.adapter)

    def _refuse(self) -> list[Piece]:
        """The text that would be next ends, where there is no memory for it though nothing else is written."""
        if not self._waiting or self._active:
            return []
        return [self._waiting.popleft().end("length")]

    def _begin(self, rows: list[Row]) -> _Reading:
        first, slot = rows[0], len(self._active)
        first.read, self._held = self._held, 0
        if self._prefixes is not None and not first.read:
            cache, adapter = self._decoder.cache, first.job.adapter
            first.read = self._prefixes.restore(first.request.prompt, cache, slot, adapter=adapter)
        self._first = self._first or first
        return _Reading(rows, slot)

    def _read_piece(self, reading: _Reading) -> list[Piece]:
        first = reading.rows[0]
        prompt, start = first.request.prompt, first.read
        end = piece_end(start, self._speed.piece(writing=bool(self._active)), len(prompt))
        begin = time.perf_counter()
        logits = self._decoder.read(reading.slot, [prompt[start:end]], start, [first.job.adapter])
        first.read = end
        self._keep(first, prompt[:end], reading.slot)
        self._note_reading(end - start, end - start, begin)
        if end < len(prompt):
            return []
        self._reading, base = None, len(self._active)
        if reading.slot != base:
            self._decoder.cache.copy(reading.slot, base, end)
        return self._join([reading.rows], logits)

    def _read_together(self, families: list[list[Row]]) -> list[Piece]:
        """Some prompts in one call, padded, into the slots behind the texts that are written."""
        prompts = [family[0].request.prompt for family in families]
        self._first = self._first or families[0][0]
        begin = time.perf_counter()
        logits = self._decoder.read(len(self._active), prompts, 0, [family[0].job.adapter for family in families])
        for index, prompt in enumerate(prompts):
            self._keep(families[index][0], prompt, len(self._active) + index)
        padded = len(prompts) * max(map(len, prompts))
        self._note_reading(sum(map(len, prompts)), padded, begin)
        return self._join(families, logits)

    def _note_reading(self, tokens: int, padded: int, begin: float) -> None:
        self._read_tokens += tokens
        self._speed.read(padded, time.perf_counter() - begin)

    def _join(self, families: Sequence[list[Row]], logits: Floats) -> list[Piece]:
        """Prompts were read, in the slots behind the texts that are written: their texts begin.

        Args:
            families: Texts of each prompt.
            logits: Of the token after each prompt, float32 [prompts, vocabulary].
        """
        base = len(self._active)
        placed = [family[0] for family in families]
        values = [logits[index].copy() for index in range(len(families))]
        for index, family in enumerate(families):
            for row in family[1:]:
                self._decoder.cache.copy(base + index, base + len(placed), len(row.request.prompt))
                placed.append(row)
                values.append(logits[index].copy())
        for row in placed:
            row.read = len(row.request.prompt)
        self._active.extend(placed)
        pieces = self._advance(placed, values)
        self._leave()
        return pieces

    def _make_room(self) -> list[Piece]:
        """A larger cache where a text has reached the end of its slot; without memory for it the text ends."""
        capacity, rows = self._decoder.cache.capacity, self._active
        if all(row.length < capacity for row in rows) or self._grow(2 * capacity):
            return []
        pieces = [row.end("length") for row in rows if row.length >= capacity]
        self._leave()
        return pieces

    def _fits(self, row: Row) -> bool:
        """Find a slot for the prompt of a text; False: there is none, nor memory for it beside the others."""
        cache, (slots, usual) = self._decoder.cache, self._shape
        if not self._active and (cache.rows, cache.capacity) != self._shape:
            self._decoder.grow(usual, (), rows=slots)
        needed = len(row.request.prompt)
        if len(self._active) == cache.rows:
            # Slots that were given up for lack of memory come back when there is some.
            longest = max(needed, usual, *(one.length for one in self._active))
            return cache.rows < slots and self._grow(longest, free=1)
        if needed <= cache.capacity:
            return True
        return any(self._grow(needed + more, free=1) for more in (min(row.request.limit, _AHEAD), 0))

    def _grow(self, capacity: int, *, free: int = 0) -> bool:
        """Make room for so many tokens a text, with fewer slots if memory is short.

        Args:
            capacity: Tokens of a slot.
            free: Slots that have to be left beside those in use.

        Returns:
            Whether there is memory for it.
        """
        layout, slots = self._decoder.cache.layout, self._shape[0]
        lengths = [row.length for row in self._active]
        if self._reading is not None:
            lengths += [0] * (self._reading.slot - len(lengths)) + [self._reading.rows[0].read]
        rows = rows_that_fit(layout, slots, capacity)
        if rows < max(1, len(lengths) + free):
            return False
        self._decoder.grow(capacity, lengths, rows=rows)
        return True
