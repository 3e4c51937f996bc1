"""What a caller may ask of a generation, checked before anything runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from threading import Event
from typing import Any

from artifacts.errors import UsageError
from artifacts.manifest import Generation

from .grammars import Form, form_of
from .reuse import PromptCache
from .rows import Constraint, Job
from .sampling import sampling_of
from .speculate import MOST
from .stopping import check_stop_ids, check_stops

Constrain = Callable[[Form, Collection[int], Collection[int]], Constraint]
"""(what a text has to look like, token ids that end it, ids that are never allowed) -> a constraint."""

MOST_TEXTS = 1024
"""Texts of one prompt, and beams."""
_MOST_LOGPROBS = 100
_MOST = 1 << 53
_CHOOSING = (
    *("sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "frequency_penalty"),
    *("presence_penalty", "bias", "seed"),
)
RECORD_OPTIONS = (
    *(name for name in _CHOOSING if name != "bias"),
    *("max_new_tokens", "stop", "stop_ids", "n", "beams", "length_penalty", "logprobs", "parse_special"),
    *("template_variables", "tools", "schema", "regex", "choices", "speculate", "adapter"),
)
"""Options that a record of `hasten run` may carry."""


@dataclass(frozen=True)
class Options:
    """Options of a generation; None stands for the model's own default (its generation_config.json).

    Attributes:
        max_new_tokens: Most tokens to write; None: what the model's context and the memory leave.
        stop: Texts that end the text; they are no part of it.
        stop_ids: Token ids that end it, beside the model's own.
        sample: Draw tokens instead of taking the likeliest. None: if a temperature above 0, top_k, top_p or min_p is
            given, or the model does by default.
        temperature: What logits are divided by, in [0, 100]; 0 takes the likeliest.
        top_k: Draw from that many likeliest tokens; 0: from all.
        top_p: Draw from the fewest likeliest tokens that reach this probability together, in [0, 1].
        min_p: Draw from tokens at least this likely, as a share of the likeliest, in [0, 1].
        repetition_penalty: Above 1: tokens of the prompt and the text become less likely.
        frequency_penalty: Subtracted from a token's logit for each time it was written.
        presence_penalty: Subtracted if it was written.
        bias: Token id -> what is added to its logit; -inf forbids it.
        seed: Same seed, same text, whatever else is in the batch.
        n: Texts of each prompt; the prompt is read once.
        beams: More than 1: beam search, which draws nothing; ``n`` of the beams are returned, the best first.
        length_penalty: Of beams; above 0 favours long texts.
        logprobs: Tell each token's log-probability, and that of so many likeliest tokens.
        seconds: Longest time for the whole call; what was written by then is returned.
        cancel: Set it, from another thread, to end the generation; what was written is returned.
        cache: Of one conversation (`Generator.new_cache`): what it holds of the prompt is not read again.
        adapter: Name of a LoRA adapter of the bundle; None: the model as it is.
        schema: JSON schema, as an object or as text, that the text is valid against; True: any JSON object.
        regex: Regular expression that all of the text matches.
        choices: Texts, one of which is written.
        speculate: Guess how the text goes on, and check several tokens in one step where that pays: how many at once,
            at most 16, or True. It changes the rounding of logits, and thereby a choice between two tokens that are
            as likely as each other. None: where the model was loaded with a draft.
        tools: JSON schemas of functions that the model may call, for the chat template; the calls are text.
        template_variables: What the chat template reads beside the messages, such as ``{"enable_thinking": False}``.
        parse_special: Make control tokens of text in the prompt that spells them (``</s>``).
    """

    max_new_tokens: int | None = None
    stop: str | Sequence[str] | None = None
    stop_ids: Collection[int] | None = None
    sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    bias: Mapping[int, float] | None = None
    seed: int | None = None
    n: int = 1
    beams: int = 1
    length_penalty: float = 1.0
    logprobs: int | None = None
    seconds: float | None = None
    cancel: Event = field(default_factory=Event)
    cache: PromptCache | None = None
    adapter: str | None = None
    schema: Mapping[str, object] | str | bool | None = None
    regex: str | None = None
    choices: Sequence[str] | None = None
    speculate: bool | int | None = None
    tools: Sequence[Mapping[str, object]] | None = None
    template_variables: Mapping[str, object] | None = None
    parse_special: bool = False

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """The options that a caller named; None counts as not given.

        Raises:
            UsageError: There is no such option.
        """
        names = [one.name for one in fields(cls)]
        if unknown := [name for name in given if name not in names]:
            raise UsageError(f"generate has no option {unknown[0]!r}", f"It has {', '.join(names)}")
        return cls(**{name: value for name, value in given.items() if value is not None})

    def job(self, generation: Generation, vocabulary: int, constrain: Constrain) -> Job:
        """What the loop has to know; the clock of ``seconds`` starts here.

        Args:
            generation: Of the model.
            vocabulary: Tokens that logits are given for.
            constrain: Compiles schema, regex or choices.

        Raises:
            UsageError: An option is out of its range, or contradicts another.
            InstallationError: schema, regex or choices need a library that is not installed.
        """
        if self.template_variables is not None and not isinstance(self.template_variables, Mapping):
            raise UsageError("template_variables is no mapping", 'Pass {"name": value}')
        counted(self.n, "n", 1, MOST_TEXTS)
        counted(self.beams, "beams", 1, MOST_TEXTS)
        if self.max_new_tokens is not None:
            counted(self.max_new_tokens, "max_new_tokens", 1, _MOST)
        chosen = {name: getattr(self, name) for name in _CHOOSING}
        if self.beams > 1:
            self._check_beams()
            chosen["sample"] = False
        sampling = sampling_of(generation, chosen)
        sampling.check(vocabulary)
        if self.beams == 1 and self.n > 1 and sampling.greedy:
            raise UsageError(
                f"n is {self.n}, and without sampling all texts are the same", "Pass a temperature, or n=1"
            )
        if self.beams == 1 and self.n > 1 and self.cache is not None:
            raise UsageError("a cache is for one text of one prompt", "Leave it out, or pass n=1")
        told = -1
        if self.logprobs is not None:
            told = counted(self.logprobs, "logprobs", 0, min(_MOST_LOGPROBS, vocabulary))
        end = frozenset(generation.eos) | check_stop_ids(self.stop_ids, vocabulary)
        form = form_of(self.schema, self.regex, self.choices)
        never = [token for token, value in sampling.bias.items() if value == -math.inf]
        return Job(
            sampling=sampling,
            end=end,
            stop=check_stops(self.stop),
            n=self.n,
            logprobs=told,
            deadline=_deadline(self.seconds),
            cancel=self.cancel,
            constraint=None if form is None else constrain(form, end, never),
            speculate=self._most_guesses(),
            adapter=self.adapter or "",
        )

    def _most_guesses(self) -> int | None:
        if self.speculate is None or isinstance(self.speculate, bool):
            return MOST if self.speculate else None if self.speculate is None else 0
        return counted(self.speculate, "speculate", 0, MOST)

    def _check_beams(self) -> None:
        drawing = [name for name in ("sample", "temperature", "top_k", "top_p", "min_p") if getattr(self, name)]
        if drawing:
            raise UsageError(f"beams and {drawing[0]} were both given: beam search draws nothing", "Leave one out")
        for name in ("cache", "stop", "logprobs", "schema", "regex", "choices"):
            if getattr(self, name) is not None:
                raise UsageError(f"beam search has no {name}", f"Leave out {name}, or beams")
        if self.speculate:
            raise UsageError("beam search guesses nothing", "Leave out speculate, or beams")
        if self.n > self.beams:
            raise UsageError(f"n is {self.n}, and there are {self.beams} beams", "Pass at least as many beams")
        if not -100.0 <= self.length_penalty <= 100.0:
            raise UsageError(f"length_penalty is {self.length_penalty}", "Pass a number in [-100, 100]")


def counted(value: object, name: str, low: int, high: int) -> int:
    """The value, a whole number in [low, high].

    Raises:
        UsageError: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise UsageError(f"{name} is {value!r}", f"Pass a whole number of at least {low} and at most {high}")
    return value


def _deadline(seconds: float | None) -> float:
    if seconds is None:
        return math.inf
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not seconds > 0.0:
        raise UsageError(f"seconds is {seconds!r}", "Pass a positive number")
    return time.monotonic() + seconds
