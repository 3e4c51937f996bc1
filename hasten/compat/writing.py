"""transformers' text-generation pipeline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, cast

from tokenizers import Tokenizer

from artifacts.errors import UsageError
from runtimes.generate.results import Generated

from .calls import Pipeline
from .source import count_of

MAX_NEW_TOKENS = 256
"""Tokens written where no number is named, as in transformers' pipeline."""
_NAMES = {
    "do_sample": "sample",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "num_return_sequences": "n",
    "num_beams": "beams",
    "length_penalty": "length_penalty",
    "max_time": "seconds",
    "seed": "seed",
    "tools": "tools",
}
_OWN = ("max_new_tokens", "stop_sequence", "stop_strings", "eos_token_id", "return_full_text", "return_text", "prefix")


@dataclass(frozen=True)
class _Options:
    full: bool
    prefix: str
    stops: bool
    generate: dict[str, Any]


class TextGeneration(Pipeline):
    """What follows on texts, or answers to chats: a list of ``{"generated_text": …}`` for each.

    Differences from transformers: without ``do_sample`` the model's own default counts, which is greedy where its
    generation_config.json says nothing; ``seed`` makes a text repeatable; ``max_new_tokens`` is cut to the context.
    """

    task: ClassVar[str] = "text-generation"
    options: ClassVar[tuple[str, ...]] = (*_OWN, *_NAMES)

    def __call__(self, text_inputs: Any, **options: Any) -> Any:  # type: ignore[override]  # transformers' name
        """As `Pipeline.__call__`; an input is a text, or a chat: a list of ``{"role": …, "content": …}``."""
        return super().__call__(text_inputs, **options)

    def alone(self, inputs: object) -> bool:
        """A text, or the messages of one chat."""
        messages = isinstance(inputs, list | tuple) and bool(inputs) and isinstance(inputs[0], Mapping)
        return messages or isinstance(inputs, str)

    def read(self, options: Mapping[str, Any]) -> _Options:
        """Options of transformers' generation by the names of hasten's."""
        given = {name: value for name, value in options.items() if value is not None}
        if "return_full_text" in given and "return_text" in given:
            raise UsageError("return_text and return_full_text exclude each other", "Leave one out")
        if not given.get("return_text", True):
            raise UsageError("hasten's pipeline returns texts", "Use generate() for token ids")
        generate = {ours: given[theirs] for theirs, ours in _NAMES.items() if theirs in given}
        generate["max_new_tokens"] = count_of(given.get("max_new_tokens", MAX_NEW_TOKENS), "max_new_tokens")
        stop = given.get("stop_sequence", given.get("stop_strings"))
        if stop is not None:
            generate["stop"] = stop
        if "eos_token_id" in given:
            ids = given["eos_token_id"]
            generate["stop_ids"] = [ids] if isinstance(ids, int) else list(ids)
        return _Options(bool(given.get("return_full_text", True)), given.get("prefix", ""), stop is not None, generate)

    def answers(self, inputs: Sequence[Any], options: Any) -> list[Any]:
        """The texts of each prompt."""
        prompts = [_prompt(one, options.prefix) for one in inputs]
        if not prompts:
            return []
        found = self.source.model.generate(prompts, **options.generate)
        return [
            [self._record(one, text, options) for text in (texts if isinstance(texts, list) else [texts])]
            for one, texts in zip(inputs, found, strict=True)
        ]

    def _record(self, prompt: Any, answer: Generated, options: _Options) -> dict[str, object]:
        text = answer.text
        if options.stops and answer.finish == "stop":
            # transformers leaves the stop string in the text; its tokens are still there.
            text = self._tokenizer.decode(list(answer.tokens), skip_special_tokens=True)
        if not options.full:
            return {"generated_text": text}
        if isinstance(prompt, str):
            return {"generated_text": prompt + text}
        return {"generated_text": [*prompt, {"role": "assistant", "content": text}]}

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(str(self.source.bundle.path / self.source.processor.tokenizer))


def _prompt(one: object, prefix: str) -> object:
    if isinstance(one, str):
        return prefix + one
    if not isinstance(one, list | tuple) or not one or not all(isinstance(message, Mapping) for message in one):
        raise UsageError("an input is neither a text nor a chat", 'Pass "…", or [{"role": "user", "content": "…"}]')
    messages = cast("Sequence[Mapping[str, object]]", one)
    if messages[-1].get("role") == "assistant":
        raise UsageError("hasten does not continue the last message of a chat", "End the chat with the user's message")
    return list(messages)
