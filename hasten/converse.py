"""``hasten chat``: a conversation with a language model, in the terminal or with lines of standard input."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any, cast

import click

from artifacts.errors import DataError, OutputError, UsageError

from .generation import GENERATION, SAMPLING, Clock, Wishes, draft_option, generation_options, show, wishes
from .use import machine_options

if TYPE_CHECKING:
    from runtimes.tasks.generate import Generator

_FENCE = '"""'
_LEAST_ROOM = 256
"""Tokens that are kept free for an answer, or a quarter of the model's context: old messages are forgotten for them."""


@click.command("chat", short_help="Talk with a language model.")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--stats", is_flag=True, help="Say on standard error after each answer what it took.")
@generation_options
@draft_option
@machine_options
def chat_command(bundle: Path, stats: bool, threads: int | None, **options: Any) -> None:
    """Talk with BUNDLE: a line is a message, answered as it is written, and the conversation is remembered.

    /help lists the commands. Ctrl-C stops an answer, Ctrl-D ends the conversation. Where standard input is no
    terminal, each of its lines is a message, and only the answers go to standard output.
    """
    from artifacts.bundle import open_bundle
    from runtimes.load import load

    manifest = open_bundle(bundle, verify=False).manifest
    if manifest.generation is None:
        raise UsageError(f"{bundle} is a {manifest.task} model: it writes no answers", f"Use a {GENERATION} model")
    if not manifest.generation.chat_template:
        remedy = f"Let it go on with a text: hasten run {bundle} --prompt TEXT"
        raise UsageError(f"{manifest.name} has no chat template: it was not made to talk", remedy)
    wished = wishes(options)
    signal.signal(signal.SIGTERM, _terminate)  # Ctrl-C stops an answer, and this ends the program
    with load(bundle, threads=threads or 0, **options) as model:
        Conversation(cast("Generator", model), wished, stats=stats).run()


def _terminate(*_: object) -> None:
    raise SystemExit(128 + signal.SIGTERM)


class Conversation:
    """Messages so far, and what is done with each line.

    Args:
        model: A loaded language model with a chat template.
        wished: How it is to answer.
        stats: Say after each answer what it took.
    """

    def __init__(self, model: Generator, wished: Wishes, *, stats: bool) -> None:
        self._model = model
        self._stats = stats
        self._cache = model.new_cache()
        self._live = sys.stdin.isatty()
        self._file: Path | None = None
        self.options: dict[str, Any] = dict(wished.options)
        self.messages: list[dict[str, str]] = []
        self.set_system(wished.system or "")

    def run(self) -> None:
        """Read and answer until the end of the input, or /exit."""
        if self._live:
            with suppress(ImportError):
                import readline  # noqa: F401 - importing it gives input() a history and keys to edit with
            self.say(f"{self._model.bundle.manifest.name}: /help lists the commands, Ctrl-D ends the conversation")
        while (line := self._read()) is not None:
            try:
                if self._obey(line):
                    return
            except (UsageError, DataError, OutputError) as error:
                if not self._live:
                    raise
                self.say(f"hasten: {error}")

    def answer(self) -> None:
        """Answer the last message as it is written; what came of an answer that was stopped is kept.

        Raises:
            UsageError: The message is too long, or an option makes no sense; the message is forgotten.
        """
        clock = Clock()
        try:
            ids = self._prompt()
            with _stop_on_interrupt() as stop:
                pieces = self._model.generate(ids, stream=True, cancel=stop, cache=self._cache, **self.options)
                result = show(clock.watch(pieces))
        except BaseException:
            self.messages.pop()
            raise
        click.echo()
        if result.finish == "cancelled" and not result.text:
            self.messages.pop()
            return
        self.messages.append({"role": "assistant", "content": result.text})
        if self._stats:
            self.say(clock.describe(result))
        elif result.finish == "length":
            self.say("(the answer reached its limit; /set max_new_tokens changes it)")

    def say(self, text: str) -> None:
        """Tell the user what is no answer."""
        click.echo(text, err=True)

    def set_system(self, text: str) -> None:
        """Put another system message first; an empty one takes it away."""
        self.messages = [message for message in self.messages if message["role"] != "system"]
        if text:
            self.messages.insert(0, {"role": "system", "content": text})

    def show_help(self, _: str) -> None:
        """/help: this list"""
        for method in COMMANDS.values():
            self.say(f"  {(method.__doc__ or '').strip()}")
        self.say(f"  {_FENCE} begins and ends a message of several lines; //text is the message /text")

    def reset(self, _: str) -> None:
        """/reset: forget the conversation, but for the system message"""
        self.messages = [message for message in self.messages if message["role"] == "system"]

    def system(self, text: str) -> None:
        """/system TEXT: another system message, and a new conversation; without TEXT: none"""
        self.reset("")
        self.set_system(text)

    def retry(self, _: str) -> None:
        """/retry: answer the last message again"""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise UsageError("there is no answer to try again", "Say something first")
        before = self.messages.pop()
        asked = self.messages[-1]
        try:
            self.answer()
        except BaseException:
            self.messages += [asked, before]
            raise

    def undo(self, _: str) -> None:
        """/undo: forget the last message and its answer"""
        while self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        if self.messages and self.messages[-1]["role"] == "user":
            self.messages.pop()

    def set(self, text: str) -> None:
        """/set NAME VALUE: change an option, such as temperature 0.7 or seed default; without NAME: show all"""
        name, _, value = text.replace("=", " ").partition(" ")
        name = name.replace("-", "_")
        known = [option for option, *_ in SAMPLING]
        if not name:
            for option in known:
                self.say(f"  {option} {self.options.get(option, 'default')}")
            return
        if name not in known:
            raise UsageError(f"there is no option {name!r}", f"Options are {', '.join(known)}")
        if value.strip() == "default":
            self.options.pop(name, None)
            return
        try:
            number = json.loads(value)
        except ValueError as error:
            raise UsageError(f"{value.strip()!r} is no number", f"Write /set {name} 1") from error
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise UsageError(f"{value.strip()!r} is no number", f"Write /set {name} 1")
        self.options[name] = number

    def save(self, text: str) -> None:
        """/save FILE: write the conversation as jsonl, a message a line"""
        from runtimes.jsonl import write_rows

        path = self._path(text)
        if path.exists() and path.resolve() != self._file:
            raise OutputError(f"{path} exists", "Name another file")
        count = write_rows(self.messages, path)
        self._file = path.resolve()
        self.say(f"{path}: {count} messages")

    def load(self, text: str) -> None:
        """/load FILE: go on with a conversation that was saved"""
        from runtimes.generate.chat import check_messages
        from runtimes.jsonl import read_records

        path = self._path(text)
        try:
            with path.open("rb") as stream:
                records = [record for _, record in read_records(stream, name=str(path), form="jsonl")]
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}", "Name a file that /save wrote") from error
        self.messages = cast("list[dict[str, str]]", check_messages(records))
        self._file = path.resolve()
        self.say(f"{path}: {len(self.messages)} messages")

    def exit(self, _: str) -> None:
        """/exit: end the conversation, as Ctrl-D does"""
        raise EOFError

    def _obey(self, line: str) -> bool:
        """Do what a line says; whether it ends the conversation."""
        if not line.strip():
            return False
        if not line.startswith("/") or line.startswith("//"):
            self.messages.append({"role": "user", "content": line.removeprefix("/") if line[0] == "/" else line})
            self.answer()
            return False
        name, _, rest = line[1:].partition(" ")
        if name.strip() not in COMMANDS:
            raise UsageError(f"there is no command /{name}", "/help lists them; write //text to say /text")
        try:
            COMMANDS[name.strip()](self, rest.strip())
        except EOFError:
            return True
        return False

    def _prompt(self) -> tuple[int, ...]:
        """Token ids of the conversation; its oldest exchanges are forgotten where they leave no room for an answer."""
        room = min(_LEAST_ROOM, self._model.context // 4)
        while True:
            told = self._model.chat_template.render(self.messages, variables=self.options.get("template_variables"))
            ids = self._model.encoder.encode_segments(told)
            if not ids:
                raise UsageError("the chat template makes an empty prompt of this", "Say something else")
            users = [index for index, message in enumerate(self.messages) if message["role"] == "user"]
            if len(ids) + room <= self._model.context or len(users) < 2:
                return ids
            del self.messages[users[0] : users[1]]
            self.say(f"(the oldest exchange is forgotten: the model takes {self._model.context} tokens)")

    def _read(self) -> str | None:
        """The next message or command; None at the end."""
        try:
            line = self._line("> ")
            if line is None or line.strip() != _FENCE:
                return line
            lines = []
            while (line := self._line(". ")) is not None and line.strip() != _FENCE:
                lines.append(line)
            return "\n".join(lines)
        except KeyboardInterrupt:
            if not self._live:
                raise
            self.say("\n(Ctrl-D or /exit ends the conversation)")
            return ""

    def _line(self, sign: str) -> str | None:
        if self._live:
            try:
                return input(sign)
            except EOFError:
                self.say("")
                return None
        line = sys.stdin.buffer.readline()
        return line.decode("utf-8", "replace").rstrip("\r\n") if line else None

    def _path(self, text: str) -> Path:
        if not text:
            raise UsageError("no file was named", "Write /save FILE or /load FILE")
        return Path(text).expanduser()


COMMANDS: dict[str, Callable[[Conversation, str], None]] = {
    "help": Conversation.show_help,
    "reset": Conversation.reset,
    "system": Conversation.system,
    "retry": Conversation.retry,
    "undo": Conversation.undo,
    "set": Conversation.set,
    "save": Conversation.save,
    "load": Conversation.load,
    "exit": Conversation.exit,
}
"""Name -> what it does with the rest of the line; its docstring is its line of /help."""


@contextmanager
def _stop_on_interrupt() -> Iterator[Event]:
    """Ctrl-C sets the event; a second one is an interrupt as anywhere else."""
    stop = Event()

    def on_interrupt(*_: object) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
