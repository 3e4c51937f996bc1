"""Many texts at once: prompts take slots as they become free, rows go on by one token a step, rows that end leave.

A row's tokens depend on its own prompt, seed and settings; its neighbours only change the rounding of the logits.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from threading import Event

from .cache import rows_that_fit
from .decoder import Decoder, Floats, grouped
from .detokenize import Detokenizer, Vocabulary
from .results import Finish, Generated, Piece, TokenLogprob, token_logprob
from .sampling import Sampler, Sampling
from .stopping import StopStrings


@dataclass(frozen=True)
class Request:
    """A prompt.

    Attributes:
        prompt: Token ids, at least one.
        limit: Most tokens to write, at least 1.
        number: Which prompt of the call, from 0.
    """

    prompt: tuple[int, ...]
    limit: int
    number: int = 0


@dataclass(frozen=True)
class Job:
    """What is the same for all rows of a call.

    Attributes:
        sampling: How tokens are chosen.
        end: Token ids that end a text.
        stop: Strings that end a text.
        n: Texts of each prompt.
        logprobs: -1: none; else how many of the likeliest tokens to tell beside the chosen one.
        deadline: On the clock of `time.monotonic`; infinite: none.
        cancel: Set by the caller to end all texts.
    """

    sampling: Sampling
    end: frozenset[int]
    stop: tuple[str, ...] = ()
    n: int = 1
    logprobs: int = -1
    deadline: float = float("inf")
    cancel: Event = field(default_factory=Event)

    def interrupted(self) -> Finish | None:
        """Why everything has to end now; None: it has not to."""
        if self.cancel.is_set():
            return "cancelled"
        return "time" if time.monotonic() >= self.deadline else None


class Row:
    """One text as it is written.

    Args:
        job: Of the call.
        request: Its prompt.
        index: Which of the texts of that prompt.
        vocabulary: Of the tokenizer.
    """

    def __init__(self, job: Job, request: Request, index: int, vocabulary: Vocabulary) -> None:
        self.request = request
        self.index = index
        self.tokens: list[int] = []
        self.finish: Finish | None = None
        self._job = job
        self._sampler = Sampler(job.sampling, request.prompt, index)
        self._detokenizer = Detokenizer(vocabulary)
        self._stop = StopStrings(job.stop)
        self._said: list[str] = []
        self._logprobs: list[TokenLogprob] = []

    @property
    def length(self) -> int:
        """Tokens in the cache: all but the last one written."""
        return len(self.request.prompt) + len(self.tokens) - 1

    def advance(self, logits: Floats) -> Piece | None:
        """Choose a token from ``logits`` float32 [vocabulary], which are altered; what can be said now."""
        before = logits.copy() if self._job.logprobs >= 0 else logits
        token = self._sampler.choose(logits)
        if token in self._job.end:
            return self.end("stop")
        if self._job.logprobs >= 0:
            self._logprobs.append(token_logprob(before, token, self._job.logprobs))
        self._sampler.add(token)
        self.tokens.append(token)
        text = self._stop.push(self._detokenizer.push(token))
        if self._stop.found:
            return self._ended("stop", text)
        if len(self.tokens) >= self.request.limit:
            return self.end("length", text)
        if not text:
            return None
        self._said.append(text)
        return Piece(text, self.request.number, self.index)

    def end(self, finish: Finish, text: str = "") -> Piece:
        """The last piece: ``text`` and what was held back."""
        text += self._stop.push(self._detokenizer.flush())
        if self._stop.found:
            return self._ended("stop", text)
        return self._ended(finish, text + self._stop.flush())

    def _ended(self, finish: Finish, text: str) -> Piece:
        self.finish = finish
        self._said.append(text)
        result = Generated(
            "".join(self._said), tuple(self.tokens), finish, len(self.request.prompt), tuple(self._logprobs)
        )
        return Piece(text, self.request.number, self.index, result)


class Loop:
    """Writes the texts of some requests.

    Args:
        decoder: Its slots say how many texts are written at once.
        vocabulary: Of the tokenizer.
        job: What is asked of all.
        held: Tokens of the first request that slot 0 of the cache holds already.
    """

    def __init__(self, decoder: Decoder, vocabulary: Vocabulary, job: Job, *, held: int = 0) -> None:
        self._decoder = decoder
        self._vocabulary = vocabulary
        self._job = job
        self._held = held
        self._first: Row | None = None
        self._active: list[Row] = []
        self._waiting: deque[Row] = deque()

    @property
    def held(self) -> tuple[int, ...]:
        """Token ids that slot 0 holds, for a loop of one row."""
        return () if self._first is None else (*self._first.request.prompt, *self._first.tokens[:-1])

    def run(self, requests: Sequence[Request]) -> Iterator[Piece]:
        """The pieces of all texts, as they come; closing the iterator ends all of them.

        Raises:
            ProviderError: ONNX Runtime failed.
        """
        self._waiting.extend(
            Row(self._job, request, index, self._vocabulary) for request in requests for index in range(self._job.n)
        )
        while self._active or self._waiting:
            if (finish := self._job.interrupted()) is not None:
                yield from self._end_all(finish)
                return
            if self._waiting and len(self._active) < self._decoder.cache.rows:
                yield from self._admit()
            if self._active:
                yield from self._step()

    def _step(self) -> Iterator[Piece]:
        yield from self._make_room()
        rows = self._active
        if not rows:
            return
        logits = self._decoder.step([row.tokens[-1] for row in rows], [row.length for row in rows])
        pieces = [row.advance(logits[slot]) for slot, row in enumerate(rows)]
        self._leave()
        yield from (piece for piece in pieces if piece is not None)

    def _make_room(self) -> Iterator[Piece]:
        """A larger cache where a row has reached the end of its slot; the row ends where there is no memory for it."""
        cache, rows = self._decoder.cache, self._active
        lengths = [row.length for row in rows]
        if max(lengths) < cache.capacity:
            return
        wanted = 2 * cache.capacity
        if rows_that_fit(cache.layout, cache.rows, wanted) == cache.rows:
            self._decoder.grow(wanted, lengths)
            return
        pieces = [row.end("length") for row in rows if row.length >= cache.capacity]
        self._leave()
        yield from pieces

    def _leave(self) -> None:
        """Rows that ended give up their slots, which the last rows take."""
        rows = self._active
        for slot in reversed(range(len(rows))):
            if rows[slot].finish is None:
                continue
            last = rows.pop()
            if slot < len(rows):
                self._decoder.cache.copy(len(rows), slot, last.length)
                rows[slot] = last

    def _admit(self) -> Iterator[Piece]:
        """Waiting rows take the free slots; each prompt is read once for all its texts that are admitted together."""
        free = self._decoder.cache.rows - len(self._active)
        taken = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
        families: dict[int, list[Row]] = {}
        for row in taken:
            families.setdefault(row.request.number, []).append(row)
        left = list(families.values())
        for group in grouped([len(family[0].request.prompt) for family in left]):
            # What is not read in time goes back to those who wait, and ends with them.
            if self._job.interrupted() is not None or not (yield from self._read([left[index] for index in group])):
                self._waiting.extend(row for row in taken if row.finish is None and row not in self._active)
                return

    def _read(self, families: Sequence[list[Row]]) -> Generator[Piece, None, bool]:
        """Prefill the prompts of some families into the slots after the active rows; False if it was interrupted."""
        base = len(self._active)
        prompts = [family[0].request.prompt for family in families]
        logits = self._decoder.prefill(
            base, prompts, start=self._held, stop=lambda: self._job.interrupted() is not None
        )
        self._held = 0
        if logits is None:
            return False
        self._first = self._first or families[0][0]
        placed: list[Row] = [family[0] for family in families]
        values: list[Floats] = [logits[index].copy() for index in range(len(families))]
        for index, family in enumerate(families):
            for row in family[1:]:
                self._decoder.cache.copy(base + index, base + len(placed), len(row.request.prompt))
                placed.append(row)
                values.append(logits[index].copy())
        self._active.extend(placed)
        pieces = [row.advance(value) for row, value in zip(placed, values, strict=True)]
        self._leave()
        yield from (piece for piece in pieces if piece is not None)
        return True

    def _end_all(self, finish: Finish) -> Iterator[Piece]:
        rows = [*self._active, *self._waiting]
        self._active.clear()
        self._waiting.clear()
        yield from (row.end(finish) for row in rows)
