"""What generation returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from artifacts.errors import HastenError

Finish = Literal["stop", "length", "time", "cancelled", "constraint"]


@dataclass(frozen=True)
class TokenLogprob:
    """How likely a token was, by the model itself: before penalties, bias, temperature and cut-offs.

    Attributes:
        token: Token id that was chosen.
        logprob: Natural logarithm of its probability.
        top: (token id, logarithm) of the likeliest ones, from the likeliest down.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]

    def to_dict(self) -> dict[str, object]:
        """As JSON."""
        top = [{"token": token, "logprob": logprob} for token, logprob in self.top]
        return {"token": self.token, "logprob": self.logprob, "top": top}


@dataclass(frozen=True)
class Generated:
    """One text.

    Attributes:
        text: What was written, without the prompt and without what ended it.
        tokens: Its token ids; an id that ended it is left out, the tokens of a stop string are there.
        finish: ``stop``: the model, a stop string or a constraint that is satisfied ended it; ``length``:
            max_new_tokens or the model's context did; ``time``: the seconds were over; ``cancelled``; ``constraint``:
            it is not what was asked for, and no token could make it so.
        prompt_tokens: Tokens of the prompt.
        logprobs: One a token, where they were asked for.
        drafted: Tokens that were guessed and checked; it depends on measured times.
        accepted: How many of them were right.
        score: Of a beam: its log-probability over its length to the power of the length penalty; otherwise 0.
    """

    text: str
    tokens: tuple[int, ...]
    finish: Finish
    prompt_tokens: int
    logprobs: tuple[TokenLogprob, ...] = ()
    score: float = 0.0
    drafted: int = field(default=0, compare=False)
    accepted: int = field(default=0, compare=False)

    def to_dict(self) -> dict[str, object]:
        """As JSON."""
        found: dict[str, object] = {
            "text": self.text,
            "finish": self.finish,
            "tokens": len(self.tokens),
            "prompt_tokens": self.prompt_tokens,
        }
        if self.logprobs:
            found["logprobs"] = [one.to_dict() for one in self.logprobs]
        return found


@dataclass(frozen=True)
class Piece:
    """A piece of a text, as it is streamed.

    Attributes:
        text: Whole characters; the pieces of a text add up to it. May be empty in the last one.
        prompt: Which prompt of a list, from 0.
        index: Which of the texts of that prompt, from 0.
        result: The whole text, in its last piece; None before.
        error: Why the texts of the prompt cannot go on; there are no other pieces then. Of a loop for all comers: what
            `generate` returns has none.
    """

    text: str
    prompt: int = 0
    index: int = 0
    result: Generated | None = None
    error: HastenError | None = None


@dataclass(frozen=True)
class LoopStats:
    """What a loop does and did.

    Attributes:
        active: Texts that are being written.
        reading: Texts whose prompt is being read.
        waiting: Texts that wait for a slot.
        read: Tokens of prompts read so far.
        written: Tokens written so far.
        hits: Prompts of which the prefix cache held something.
        saved: Tokens of prompts that were therefore not read.
        prefix_bytes: Bytes of keys and values in the prefix cache.
        drafted: Tokens that were guessed and checked.
        accepted: How many of them were right.
    """

    active: int
    reading: int
    waiting: int
    read: int
    written: int
    hits: int = 0
    saved: int = 0
    prefix_bytes: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts texts.

    Attributes:
        value: ``exp(loss)``.
        loss: Mean negative log-likelihood of a token, in nats.
        tokens: Tokens predicted.
    """

    value: float
    loss: float
    tokens: int

    def to_dict(self) -> dict[str, object]:
        """As JSON."""
        return {"perplexity": self.value, "loss": self.loss, "tokens": self.tokens}


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Natural logarithm of the softmax over the last axis, in float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


def token_logprob(logits: NDArray[np.float32], token: int, top: int) -> TokenLogprob:
    """Of the token chosen from ``logits`` float32 [vocabulary], with the ``top`` likeliest."""
    logs = log_softmax(logits)
    likeliest = np.argsort(-logs, kind="stable")[:top] if top else ()
    return TokenLogprob(token, float(logs[token]), tuple((int(one), float(logs[one])) for one in likeliest))
