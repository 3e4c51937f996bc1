"""The decoder's half of a worker process: one loop that writes the texts of all comers.

Prompts are rendered and tokenized on the reading thread, so that no text waits for another's prompt. What a step of the
loop said goes out in one frame.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from artifacts.errors import HastenError

from ..generate.cache import rows_that_fit
from ..generate.loop import Loop
from ..generate.pace import Pace
from ..generate.results import Generated
from ..tasks.generate import Generator
from .batches import Batches, as_known
from .streams import tell_result
from .wire import Arrays, Message, told_error

SLOTS = 8
"""Texts at once, where nobody says."""
_FIRST_TOKENS = 512


class Writer:
    """Writes texts.

    Args:
        task: The loaded bundle.
        send: Sends a frame.
        slots: Texts at once; 0: `SLOTS`. Fewer where memory is short.
        prefix_bytes: Of keys and values kept of prompts; 0: none.
        pause: Longest gap in seconds that reading a prompt may put between two tokens of the others.
    """

    def __init__(
        self, task: Generator, send: Callable[..., None], *, slots: int, prefix_bytes: int, pause: float
    ) -> None:
        self._task = task
        self._send = send
        # All that lies in the bundle is read now: another may lie there when it is first asked for.
        _ = task.encoder.plain, task.encoder.parsing, task.chat_template
        self._capacity = min(_FIRST_TOKENS, task.context)
        self.slots = max(1, rows_that_fit(task.layout, slots or SLOTS, self._capacity))
        self._make: Callable[[], Loop] = lambda: task.loop(
            self.slots, self._capacity, pace=Pace(pause), prefix_bytes=prefix_bytes
        )
        self._loop = self._make()
        self._batches = Batches(task, send)
        self._work: deque[tuple[Message, Arrays]] = deque()
        self._changed = threading.Condition()
        self._cancels: dict[int, threading.Event] = {}
        self._left: dict[int, int] = {}
        self._searches: queue.SimpleQueue[tuple[int, object, dict[str, Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._search, name="hasten-beams", daemon=True).start()

    def receive(self, message: Message, arrays: Arrays) -> None:
        """A prompt, the end of one, a question about one, or plain tensors."""
        operation = message["op"]
        if operation == "cancel":
            if (cancel := self._cancels.get(message["id"])) is not None:
                cancel.set()
        elif operation == "encode":
            self._send({"op": "reply", "id": message["id"], **self._encoded(message)})
        elif operation == "write":
            self._begin(message)
        else:
            with self._changed:
                self._work.append((message, arrays))
                self._changed.notify()

    def run(self) -> NoReturn:
        """Write what is asked for, for ever."""
        while True:
            with self._changed:
                while not (self._loop.busy or self._work):
                    self._changed.wait()
                work = list(self._work)
                self._work.clear()
            for message, arrays in work:
                self._send(*self._batches.execute(message, arrays))
            if self._loop.busy:
                self._step()

    def _step(self) -> None:
        try:
            pieces = self._loop.step()
        except HastenError as error:
            # Nobody knows what the cache holds now: all its texts end, and a new one begins.
            with self._changed:
                numbers, self._loop = list(self._left), self._make()
                for number in numbers:
                    self._forget(number)
            self._send({"op": "wrote", "errors": [[number, told_error(error)] for number in numbers]})
            return
        told, errors = [], []
        for piece in pieces:
            if piece.error is not None:
                errors.append([piece.prompt, told_error(piece.error)])
                self._forget(piece.prompt)
                continue
            told.append([piece.prompt, piece.index, piece.text, _told(piece.result)])
            if piece.result is not None:
                self._left[piece.prompt] -= 1
                if not self._left[piece.prompt]:
                    self._forget(piece.prompt)
        if told or errors:
            stats = self._loop.stats
            report = {"active": stats.active, "prefix_hits": stats.hits, "tokens_saved": stats.saved}
            self._send({"op": "wrote", "pieces": told, "errors": errors, "report": report})

    def _begin(self, message: Message) -> None:
        number = int(message["id"])
        try:
            options = _options(message["options"])
            options["cancel"] = self._cancels[number] = threading.Event()
            if (options.get("beams") or 1) != 1:
                self._searches.put((number, message["prompt"], options))
                return
            requests = self._task.requests(message["prompt"], first=number, **options)
            with self._changed:
                self._left[number] = requests[0].job.n
                self._loop.add(requests[0])
                self._changed.notify()
        except Exception as error:  # noqa: BLE001 - a prompt that breaks a library must not end the texts of others
            self._forget(number)
            self._send({"op": "wrote", "errors": [[number, told_error(as_known(error))]]})

    def _search(self) -> NoReturn:
        """Beam searches, one after another, beside the loop."""
        while True:
            number, prompt, options = self._searches.get()
            try:
                found = self._task.generate(prompt, **options)
                texts = found if isinstance(found, list) else [found]
                told = [[number, index, text.text, _told(text)] for index, text in enumerate(texts)]
                self._send({"op": "wrote", "pieces": told})
            except Exception as error:  # noqa: BLE001 - as in _begin
                self._send({"op": "wrote", "errors": [[number, told_error(as_known(error))]]})
            finally:
                self._forget(number)

    def _encoded(self, message: Message) -> Message:
        try:
            return {"ids": self._task.requests(message["prompt"], **_options(message["options"]))[0].prompt}
        except Exception as error:  # noqa: BLE001 - as in _begin
            return {"error": told_error(as_known(error))}

    def _forget(self, number: int) -> None:
        self._cancels.pop(number, None)
        self._left.pop(number, None)


def _told(result: Generated | None) -> Message | None:
    return None if result is None else tell_result(result)


def _options(told: Mapping[str, Any]) -> dict[str, Any]:
    """Options as `Generator` takes them, of those that came through JSON."""
    options = dict(told)
    if isinstance(options.get("bias"), list):
        options["bias"] = dict(options["bias"])
    return options
