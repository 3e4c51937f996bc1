"""What is asked of a language model, and one text as it is written."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from threading import Event
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from .detokenize import Detokenizer, Vocabulary
from .results import Finish, Generated, Piece, TokenLogprob, token_logprob
from .sampling import Sampler, Sampling
from .stopping import StopStrings

Floats = NDArray[np.float32]


class Matcher(Protocol):
    """What one text may go on with, token by token."""

    @property
    def finish(self) -> Finish | None:
        """Why the text ends here: it is complete, or nothing may follow though it is not; None: it goes on."""

    def mask(self, logits: Floats) -> None:
        """Set the logits float32 [vocabulary] of tokens that may not follow to -inf, in place; may set `finish`."""

    def accept(self, token: int) -> None:
        """Go on with a token that :meth:`mask` left; the next mask may be computed meanwhile."""

    def forced(self) -> list[int]:
        """Tokens that have to follow, where there is no choice."""

    def admissible(self, tokens: Sequence[int]) -> int:
        """How many of the tokens, from the first on, may follow one after the other."""

    def foresee(self, tokens: Sequence[int]) -> None:
        """The masks before and after these tokens, which may follow, are likely to be wanted next."""


class Constraint(Protocol):
    """What texts have to look like, see `Job`."""

    def start(self) -> Matcher:
        """For a text that has not begun."""


@dataclass(frozen=True)
class Job:
    """What is asked for a prompt.

    Attributes:
        sampling: How tokens are chosen.
        end: Token ids that end a text.
        stop: Strings that end a text.
        n: Texts of the prompt.
        logprobs: -1: none; else how many of the likeliest tokens to tell beside the chosen one.
        deadline: On the clock of `time.monotonic`; infinite: none.
        cancel: Set by the caller to end the texts.
        constraint: What the texts have to look like; None: nothing.
        speculate: Most tokens to guess at once; 0: none; None: what suits a draft, where the model has one.
        adapter: Name of the adapter that they are written with; empty: none.
    """

    sampling: Sampling
    end: frozenset[int]
    stop: tuple[str, ...] = ()
    n: int = 1
    logprobs: int = -1
    deadline: float = float("inf")
    cancel: Event = field(default_factory=Event)
    constraint: Constraint | None = None
    speculate: int | None = None
    adapter: str = ""

    def interrupted(self) -> Finish | None:
        """Why its texts have to end now; None: they have not to."""
        if self.cancel.is_set():
            return "cancelled"
        return "time" if time.monotonic() >= self.deadline else None


@dataclass(frozen=True)
class Request:
    """A prompt and what is asked for it.

    Attributes:
        prompt: Token ids, at least one.
        limit: Most tokens to write, at least 1.
        job: How.
        number: The caller's own; every `Piece` of its texts carries it.
    """

    prompt: tuple[int, ...]
    limit: int
    job: Job
    number: int = 0


class Row:
    """One text as it is written.

    Args:
        request: Its prompt, and how to go on.
        index: Which of the texts of that prompt.
        vocabulary: Of the tokenizer.

    Attributes:
        tokens: Written so far.
        finish: Why it ended; None: it has not.
        read: Tokens of its prompt that the cache holds.
        drafted: Tokens that were guessed and checked.
        accepted: How many of them were right.
    """

    def __init__(self, request: Request, index: int, vocabulary: Vocabulary) -> None:
        self.request = request
        self.job = request.job
        self.index = index
        self.tokens: list[int] = []
        self.finish: Finish | None = None
        self.read = self.drafted = self.accepted = 0
        self._sampler = Sampler(self.job.sampling, request.prompt, index)
        self._detokenizer = Detokenizer(vocabulary)
        self._stop = StopStrings(self.job.stop)
        self._matcher = self.job.constraint.start() if self.job.constraint is not None else None
        self._said: list[str] = []
        self._logprobs: list[TokenLogprob] = []

    @property
    def length(self) -> int:
        """Tokens in the cache once the prompt was read: all but the last one written."""
        return len(self.request.prompt) + len(self.tokens) - 1

    @property
    def held(self) -> tuple[int, ...]:
        """Ids of the tokens in the cache."""
        return (*self.request.prompt[: self.read], *self.tokens[:-1])

    def advance(self, logits: Floats, guess: int | None = None) -> Piece | None:
        """Choose a token from ``logits`` float32 [vocabulary], which are altered; what can be said now.

        ``guess`` is what was expected.
        """
        before = logits.copy() if self.job.logprobs >= 0 else logits
        token = self._choose(logits)
        if isinstance(token, str):
            return self.end(token)
        self.accepted += token == guess
        if self._matcher is not None:
            self._matcher.accept(token)
        if self.job.logprobs >= 0:
            self._logprobs.append(token_logprob(before, token, self.job.logprobs))
        self._sampler.add(token)
        self.tokens.append(token)
        text = self._stop.push(self._detokenizer.push(token))
        if self._stop.found:
            return self._ended("stop", text)
        if self._matcher is not None and self._matcher.finish is not None:
            return self.end(self._matcher.finish, text)
        if len(self.tokens) >= self.request.limit:
            return self.end("length", text)
        if not text:
            return None
        self._said.append(text)
        return Piece(text, self.request.number, self.index)

    def _choose(self, logits: Floats) -> int | Finish:
        """A token, or why the text ends before it."""
        if self._matcher is not None:
            self._matcher.mask(logits)
            if self._matcher.finish is not None:
                return self._matcher.finish
        token = self._sampler.choose(logits)
        return "stop" if token in self.job.end else token

    def check(self, draft: Sequence[int], logits: Floats) -> list[Piece]:
        """Go on as long as the text says what was guessed, and by one token more.

        Args:
            draft: Token ids that were guessed.
            logits: Behind the last token and each of the draft, float32 [1 + draft, vocabulary], which are altered.
        """
        pieces: list[Piece] = []
        self.drafted += len(draft)
        for guess, values in zip((*draft, None), logits, strict=False):
            right = self.accepted
            piece = self.advance(values, guess)
            pieces += [piece] if piece is not None else []
            if self.finish is not None or self.accepted == right:
                break
        return pieces

    def forced(self) -> list[int]:
        """Tokens that a constraint leaves no choice about."""
        return [] if self._matcher is None else self._matcher.forced()

    def admissible(self, tokens: Sequence[int]) -> int:
        """How many of the tokens, from the first on, a constraint lets follow."""
        return len(tokens) if self._matcher is None else self._matcher.admissible(tokens)

    def foresee(self, tokens: Sequence[int]) -> None:
        """These tokens are checked next."""
        if self._matcher is not None and tokens:
            self._matcher.foresee(tokens)

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
            "".join(self._said),
            tuple(self.tokens),
            finish,
            len(self.request.prompt),
            tuple(self._logprobs),
            drafted=self.drafted,
            accepted=self.accepted,
        )
        return Piece(text, self.request.number, self.index, result)
