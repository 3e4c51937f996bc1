"""Texts that decoders write: which worker writes which, and their pieces on the way to who asked."""

from __future__ import annotations

import asyncio
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from artifacts.errors import HastenError, UsageError, WorkerError

from ..generate.results import Generated, Piece, TokenLogprob
from .host import Host
from .stats import Counters
from .waiting import Ticket, Waiting
from .wire import Message, read_error

_SPARE_TEXTS = 2
_MEMORY = 0.1
_LEAST_SECONDS = 1e-3


@dataclass(eq=False)
class Writing(Ticket):
    """A prompt, and its texts as they are written.

    Attributes:
        payload: The prompt and its options, as a worker takes them.
        texts: How many texts.
        prompt: Which prompt of the caller's list.
        pieces: What was written and not yet taken, of all prompts of the caller's list.
        woken: Set when there is something new, of any of them.
        open: Texts that a worker has not ended.
    """

    payload: Message = field(default_factory=dict)
    texts: int = 1
    prompt: int = 0
    pieces: deque[Piece] = field(default_factory=deque)
    woken: asyncio.Event = field(default_factory=asyncio.Event)
    open: int = 0

    def __post_init__(self) -> None:
        """Nothing was said yet."""
        super().__post_init__()
        self.results: dict[int, Generated] = {}
        self._said: dict[int, str] = {}
        self._again: dict[int, str] = {}

    def begin_again(self) -> None:
        """It is written anew from the beginning: what was said already is not to be said twice."""
        self._again = dict(self._said)
        self.open = self.texts

    def push(self, index: int, text: str, result: Generated | None) -> bool:
        """A piece came; False if it is not what was said the first time."""
        known = self._again.pop(index, "")
        if known:
            same = min(len(known), len(text))
            if known[:same] != text[:same] or (result is not None and len(known) > len(text)):
                return False
            self._again[index] = known[same:]
            text = text[same:]
        if index in self.results or not (text or result is not None):
            return True
        self._said[index] = self._said.get(index, "") + text
        if result is not None:
            self.results[index] = result
        self.pieces.append(Piece(text, self.prompt, index, result))
        self.woken.set()
        return True

    @property
    def finished(self) -> list[Generated]:
        """Its texts, in order."""
        return [self.results[index] for index in sorted(self.results)]

    def ended(self) -> None:
        """The future has its error now."""
        self.woken.set()


class Streams:
    """The texts that are being written.

    Args:
        counters: Of the engine.
        settle: Called with a request that ended, and how.
        fail: Called with a request that went wrong.
    """

    def __init__(
        self,
        counters: Counters,
        settle: Callable[[Ticket, str], None],
        fail: Callable[[Ticket, HastenError], None],
    ) -> None:
        self._counters = counters
        self._settle = settle
        self._fail = fail
        self._seconds = 0.0

    def place(self, writing: Writing, ready: Sequence[Host]) -> Host | None:
        """The worker with the largest share of free slots, not the one that it died on; None: all are full."""
        free = [host for host in ready if host.texts == 0 or host.texts + writing.texts <= slots(host) + _SPARE_TEXTS]
        chosen = [host for host in free if host is not writing.avoid] or free
        return min(chosen, key=lambda host: host.texts / slots(host), default=None)

    def send(self, host: Host, writing: Writing) -> None:
        """Let a worker write it.

        Raises:
            UsageError: The prompt or an option cannot be sent.
        """
        writing.begin_again()
        options = dict(writing.payload["options"])
        if isinstance(options.get("seconds"), int | float):  # Its clock began when the request came.
            options["seconds"] -= asyncio.get_running_loop().time() - writing.arrived
            options["seconds"] = max(options["seconds"], _LEAST_SECONDS)
        host.send({"op": "write", "id": writing.number, "prompt": writing.payload["prompt"], "options": options})
        host.writing[writing.number] = writing
        host.texts += writing.texts

    def heard(self, host: Host, message: Message) -> None:
        """A worker wrote something, or ended a text."""
        host.report = message.get("report") or host.report
        for number, index, text, told in message.get("pieces", ()):
            writing = host.writing.get(number)
            if writing is None:
                continue
            result = read_result(told)
            if not writing.done and not writing.push(index, text, result):
                self._fail(writing, WorkerError("a worker died, and another wrote something else", "Try again"))
            if result is not None:
                writing.open -= 1
                if not writing.open:
                    self._finish(host, writing)
        for number, error in message.get("errors", ()):
            writing = host.writing.get(number)
            if writing is not None:
                self._release(host, writing)
                self._fail(writing, read_error(error))

    def lost(self, host: Host) -> list[Writing]:
        """What a worker was writing when it died."""
        writings = list(host.writing.values())
        host.writing.clear()
        host.texts = 0
        return writings

    def stop(self, hosts: Sequence[Host], writing: Writing) -> None:
        """Nobody waits for it any more: the worker ends it at its next step."""
        for host in hosts:
            if writing.number in host.writing:
                host.send({"op": "cancel", "id": writing.number})

    def expected_wait(self, waiting: Waiting, ready: Sequence[Host], priority: int) -> float:
        """Seconds until a newcomer would have a slot."""
        room = sum(slots(host) for host in ready)
        ahead = sum(one.texts for one in waiting if isinstance(one, Writing) and one.call.priority >= priority)
        busy = sum(host.texts for host in ready)
        return max(0.0, ahead + busy - room + 1) * self._seconds / room if busy >= room else 0.0

    def _finish(self, host: Host, writing: Writing) -> None:
        self._release(host, writing)
        if writing.done:
            return
        results = list(writing.results.values())
        self._counters.add("tokens_in", results[0].prompt_tokens)
        self._counters.add("tokens_out", sum(len(one.tokens) for one in results))
        started = writing.arrived if writing.started is None else writing.started
        seconds = asyncio.get_running_loop().time() - started
        self._seconds += (_MEMORY if self._seconds else 1.0) * (seconds - self._seconds)
        writing.future.set_result(None)
        writing.woken.set()
        self._settle(writing, "done")

    def _release(self, host: Host, writing: Writing) -> None:
        del host.writing[writing.number]
        host.texts -= writing.texts


def slots(host: Host) -> int:
    """Texts that a worker writes at once."""
    return max(1, int(host.told.get("slots", 1)))


def payload_of(prompt: object, options: Mapping[str, Any]) -> Message:
    """A prompt and its options as they are sent; a seed is chosen here where none was given, so that a worker that dies
    in the middle of a text can be replaced by one that writes the same.

    Raises:
        UsageError: An option that only makes sense within one process.
    """
    told = {name: value for name, value in options.items() if value is not None}
    for name in ("cache", "cancel"):
        if name in told:
            raise UsageError(f"an engine's generate has no option {name!r}", "Close the stream to cancel it")
    if isinstance(told.get("bias"), Mapping):
        told["bias"] = list(told["bias"].items())
    if isinstance(told.get("stop_ids"), Collection) and not isinstance(told["stop_ids"], str):
        told["stop_ids"] = list(told["stop_ids"])
    told.setdefault("seed", int.from_bytes(os.urandom(4), "little"))
    return {"prompt": _sendable(prompt), "options": told}


def _sendable(prompt: object) -> object:
    if isinstance(prompt, np.ndarray):
        return prompt.tolist()
    return list(prompt) if isinstance(prompt, tuple) else prompt


def tell_result(result: Generated) -> Message:
    """A text as a message."""
    logprobs = [(one.token, one.logprob, one.top) for one in result.logprobs]
    told = {"text": result.text, "tokens": result.tokens, "finish": result.finish, "prompt": result.prompt_tokens}
    return {**told, "logprobs": logprobs, "score": result.score}


def read_result(told: Mapping[str, Any] | None) -> Generated | None:
    """The text of a message; None: the message has none."""
    if told is None:
        return None
    logprobs = tuple(
        TokenLogprob(token, logprob, tuple((one, value) for one, value in top))
        for token, logprob, top in told["logprobs"]
    )
    return Generated(
        told["text"], tuple(told["tokens"]), told["finish"], told["prompt"], logprobs, float(told["score"])
    )


async def pieces_of(writings: Sequence[Writing]) -> AsyncIterator[Piece]:
    """The pieces of all, as they come.

    Raises:
        HastenError: What became of one of them instead.
    """
    left = list(writings)
    while left:
        first = left[0]
        while first.pieces:
            yield first.pieces.popleft()
        for writing in left:
            if writing.future.done():
                writing.future.result()
        left = [writing for writing in left if not writing.future.done()]
        if left and not first.pieces:
            first.woken.clear()
            await first.woken.wait()
    while writings and writings[0].pieces:
        yield writings[0].pieces.popleft()
