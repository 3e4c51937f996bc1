"""What the commands of text generation share: options of ``generate``, prompts, and a text shown as it is written."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from artifacts.errors import DataError, ProviderError, UsageError

if TYPE_CHECKING:
    from artifacts.manifest import Manifest
    from runtimes.generate.results import Generated, Piece
    from runtimes.jsonl import Numbered
    from runtimes.tasks.generate import Generator

GENERATION = "text-generation"
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""What a terminal obeys or reorders, but for line breaks and tabs."""
_MOST_BYTES = 64 << 20
_MOST_SCHEMA = 1 << 20

SAMPLING = (
    ("max_new_tokens", click.IntRange(min=1), "Most tokens to write.  [default: what the context leaves]"),
    ("temperature", click.FLOAT, "Above 1 more varied, below 1 less; 0: always the likeliest.  [default: the model's]"),
    ("top_k", click.INT, "Draw from so many of the likeliest tokens; 0: all."),
    ("top_p", click.FLOAT, "Draw from the fewest likeliest tokens whose probabilities reach this."),
    ("min_p", click.FLOAT, "Draw from tokens at least this likely, as a share of the likeliest."),
    ("repetition_penalty", click.FLOAT, "Above 1: tokens of the prompt and the text become less likely."),
    ("frequency_penalty", click.FLOAT, "Above 0: tokens become less likely each time they are written."),
    ("presence_penalty", click.FLOAT, "Above 0: tokens become less likely once they were written."),
    ("seed", click.INT, "The same seed gives the same text."),
    ("speculate", click.IntRange(0, 16), "Guess so many tokens at once, and check them in one step, where that pays."),
)
"""Name, type and help of each option that goes to ``generate`` as it is."""
FORMS: tuple[tuple[str, dict[str, Any]], ...] = (
    (
        "schema",
        {"metavar": "FILE", "type": click.Path(path_type=Path), "help": "JSON that is valid against this schema."},
    ),
    ("regex", {"metavar": "TEXT", "help": "A text that this regular expression matches, all of it."}),
    ("choice", {"metavar": "TEXT", "multiple": True, "help": "One of these texts; repeatable."}),
)
"""Name and settings of each option that says what a text has to look like."""


@dataclass(frozen=True)
class Wishes:
    """What a user said of the texts to write.

    Attributes:
        options: Arguments of ``generate``; those not given are left to the model.
        chat: Make messages of prompts; None: where the model has a chat template.
        system: Message before them; None: none.
    """

    options: Mapping[str, Any]
    chat: bool | None = None
    system: str | None = None

    @property
    def any(self) -> bool:
        """Whether anything was said at all."""
        return bool(self.options) or self.chat is not None or self.system is not None

    def talks(self, manifest: Manifest) -> bool:
        """Whether prompts become messages.

        Raises:
            UsageError: It does not fit the model, or what else was said.
        """
        has_template = manifest.generation is not None and bool(manifest.generation.chat_template)
        talks = has_template if self.chat is None else self.chat
        if talks and not has_template:
            raise UsageError(f"{manifest.name} has no chat template", "Leave out --chat: it goes on with a text")
        if not talks and (self.system is not None or "template_variables" in self.options):
            which = "--system" if self.system is not None else "--template-option"
            raise UsageError(f"{which} is for chat, and this prompt is a text to go on with", "Leave one out")
        return talks

    def messages(self, prompt: str) -> list[dict[str, str]]:
        """The prompt as a conversation."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*first, {"role": "user", "content": prompt}]


def generation_options(command: Any) -> Any:
    """The options of ``generate`` and of the chat template; `wishes` takes them out of what click passes."""
    command = click.option(
        "--template-option",
        "variables",
        metavar="NAME=VALUE",
        multiple=True,
        callback=_variables,
        help="A variable of the chat template, as JSON or text: enable_thinking=false; repeatable.",
    )(command)
    command = click.option("--system", metavar="TEXT", help="What the model is told before the conversation.")(command)
    for name, told in reversed(FORMS):
        command = click.option(f"--{name}", **told)(command)
    command = click.option("--adapter", metavar="NAME", help="A LoRA adapter of the bundle; see `hasten adapter`.")(
        command
    )
    command = click.option("--stop", metavar="TEXT", multiple=True, help="Ends the text; repeatable.")(command)
    for name, kind, text in reversed(SAMPLING):
        command = click.option(f"--{name.replace('_', '-')}", type=kind, help=text)(command)
    return command


def draft_option(command: Any) -> Any:
    """The option ``draft`` of loading."""
    text = "A smaller bundle of the same tokenizer that guesses how texts go on."
    return click.option("--draft", metavar="BUNDLE", type=click.Path(path_type=Path), help=text)(command)


def wishes(options: dict[str, Any]) -> Wishes:
    """Take what `generation_options` added, and ``chat``, out of ``options``."""
    told = {name: options.pop(name) for name, *_ in SAMPLING}
    told["stop"] = list(options.pop("stop")) or None
    told["adapter"] = options.pop("adapter")
    told["template_variables"] = options.pop("variables") or None
    schema = options.pop("schema")
    told |= {"schema": None if schema is None else read_schema(schema), "regex": options.pop("regex")}
    told["choices"] = list(options.pop("choice")) or None
    given = {name: value for name, value in told.items() if value is not None}
    return Wishes(given, options.pop("chat", None), options.pop("system"))


def _variables(context: click.Context, parameter: click.Parameter, value: tuple[str, ...]) -> dict[str, object]:
    found: dict[str, object] = {}
    for text in value:
        name, equals, said = text.partition("=")
        if not equals or not name.isidentifier():
            raise click.BadParameter(f"{text!r} is not NAME=VALUE", context, parameter)
        try:
            found[name] = json.loads(said)
        except ValueError:
            found[name] = said
    return found


def read_schema(path: Path) -> str:
    """The text of a file that holds a JSON schema; more than may be compiled is not read.

    Raises:
        DataError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            return decode(file.read(_MOST_SCHEMA), str(path))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "Name a file that holds a JSON schema") from error


def task_of(bundle: Path) -> str:
    """The task of a bundle, its files not hashed yet.

    Raises:
        BundleError: Not a bundle, or a damaged one.
    """
    from artifacts.bundle import open_bundle

    return open_bundle(bundle, verify=False).manifest.task


def read_prompt(prompt: str) -> str:
    """The prompt; standard input for ``-``.

    Raises:
        DataError: Standard input is not UTF-8, or longer than 64 MiB.
    """
    if prompt != "-":
        return prompt
    data = sys.stdin.buffer.read(_MOST_BYTES + 1)
    if len(data) > _MOST_BYTES:
        raise DataError(f"stdin is longer than {_MOST_BYTES >> 20} MiB", "Give a shorter prompt")
    return decode(data, "stdin")


def decode(data: bytes, name: str) -> str:
    """The text of a file.

    Raises:
        DataError: It is not UTF-8.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{name} is not UTF-8: {error.reason} at byte {error.start}", "Convert it to UTF-8") from error


def with_wishes(records: Iterable[Numbered], manifest: Manifest, wished: Wishes) -> Iterator[Numbered]:
    """Records for ``Generator.rows`` that carry the wishes; options that a record states itself go before them.

    A text, alone or as ``{"text": …}``, becomes a message where the model talks; a ``prompt`` and ``messages`` stay.
    """
    talks = wished.talks(manifest)
    for number, record in records:
        told: dict[str, object] = {"text": record} if isinstance(record, str) else dict(record)
        if talks and isinstance(told.get("text"), str):
            told["messages"] = wished.messages(str(told.pop("text")))
        yield number, {**wished.options, **told}


def run_prompt(model: Generator, prompt: str, wished: Wishes, *, stats: bool) -> None:
    """Go on with a prompt, or answer it, on standard output as it is written; ``stats`` go to standard error.

    Raises:
        UsageError: The prompt is empty or too long, or an option makes no sense.
    """
    if not prompt:
        raise UsageError("the prompt is empty", "Pass a text")
    clock = Clock()
    talks = wished.talks(model.bundle.manifest)
    given = wished.messages(prompt) if talks else prompt
    result = show(clock.watch(model.generate(given, stream=True, **wished.options)))
    if sys.stdout.isatty() or not result.text.endswith("\n"):
        click.echo()
    if stats:
        click.echo(clock.describe(result), err=True)


def show(pieces: Iterable[Piece]) -> Generated:
    """Write the one text of ``pieces`` to standard output as it comes; what a terminal would obey becomes U+FFFD."""
    terminal = sys.stdout.isatty()
    result = None
    for piece in pieces:
        click.echo(_OBEYED.sub("\ufffd", piece.text) if terminal else piece.text, nl=False)
        result = piece.result or result
    if result is None:
        raise ProviderError("the model ended without a text", "Run `hasten verify`")
    return result


_ENDED = {
    **{"stop": "ended", "length": "reached its limit", "time": "ran out of time", "cancelled": "was stopped"},
    "constraint": "could not become what was asked for",
}


class Clock:
    """How long a text took: until its first piece, and from there on."""

    def __init__(self) -> None:
        self._begin = self._first = self._last = time.perf_counter()
        self._seen = False

    def watch(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """The pieces, their times noted."""
        for piece in pieces:
            self._last = time.perf_counter()
            if not self._seen:
                self._seen, self._first = True, self._last
            yield piece

    def describe(self, result: Generated) -> str:
        """One line."""
        count, rest = len(result.tokens), self._last - self._first
        speed = f", then {(count - 1) / rest:.1f} tokens a second" if count > 1 and rest > 0.0 else ""
        ended = _ENDED[result.finish]
        first = f"first text after {self._first - self._begin:.2f} s"
        guessed = f", {result.accepted} of {result.drafted} guesses right" if result.drafted else ""
        return f"{result.prompt_tokens} tokens of prompt, {first}{speed}; {count} written{guessed}, {ended}"
