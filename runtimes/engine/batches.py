"""The half of a worker process that computes batches."""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np

from artifacts.errors import DataError, HastenError, ProviderError, UsageError

from ..items import Item, check_text
from ..tasks.base import Task, TextTask
from ..text import TextEncoder, Tokens
from .rows import pack, run_together, unpack
from .wire import Arrays, Message, told_error

Send = Callable[..., None]

_TOGETHER = ("feature-extraction", "text-classification", "token-classification")
_BENCH_TEXTS = 20
_SENTENCE = "while two small dogs were running along the old river a man in a green coat sat there reading"
_WARM_TEXTS = ("a", "the quick brown fox jumps over the lazy dog " * 2)


class CountingEncoder(TextEncoder):
    """A `TextEncoder` that remembers how many tokens each item had."""

    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__(encoder.processor, encoder._path, encoder.inputs)
        self.counted: dict[Item, int] = {}
        self.total = 0

    def encode(self, items: Sequence[Item], *, offsets: bool = False) -> list[Tokens]:
        """As `TextEncoder.encode`."""
        rows = super().encode(items, offsets=offsets)
        for item, row in zip(items, rows, strict=True):
            self.counted[item] = len(row)
            self.total += len(row)
        return rows

    def windows(self, question: str, context: str) -> Iterator[Tokens]:
        """As `TextEncoder.windows`."""
        for window in super().windows(question, context):
            self.total += len(window)
            yield window

    def forget(self) -> None:
        """Begin to count anew."""
        self.counted.clear()
        self.total = 0


class Batches:
    """Runs batches, the most urgent first.

    Args:
        task: The loaded bundle.
        send: Sends a frame.
    """

    def __init__(self, task: Task, send: Send) -> None:
        self._task = task
        self._send = send
        self._heap: list[tuple[int, int, Message, Arrays]] = []
        self._changed = threading.Condition()
        self._count: CountingEncoder | None = None
        if isinstance(task, TextTask):
            self._count = task.encoder = CountingEncoder(task.encoder)

    def receive(self, message: Message, arrays: Arrays) -> None:
        """A batch, or the number of one that is not wanted any more."""
        if message["op"] == "encode":
            self._send({"op": "reply", "id": message["id"], **self._encoded(message["prompt"])})
            return
        with self._changed:
            if message["op"] == "drop":
                self._heap = [one for one in self._heap if one[1] != message["id"]]
                heapq.heapify(self._heap)
                self._send({"op": "done", "id": message["id"], "dropped": True})
                return
            heapq.heappush(self._heap, (-message["priority"], message["id"], message, arrays))
            self._changed.notify()

    def run(self) -> NoReturn:
        """Run what comes, for ever."""
        while True:
            with self._changed:
                while not self._heap:
                    self._changed.wait()
                _, _, message, arrays = heapq.heappop(self._heap)
            self._send(*self.execute(message, arrays))

    def execute(self, message: Message, arrays: Arrays) -> tuple[Message, Arrays]:
        """The reply to a batch: a result or an error for each of its parts, and the seconds that it took."""
        begin = time.perf_counter()
        if message["method"] == "bench":
            tokens = self._bench(begin + float(message["seconds"]))
            return {"op": "done", "id": message["id"], "tokens": tokens, "seconds": time.perf_counter() - begin}, {}
        parts: list[list[Any]] = message["parts"]
        compute = self._compute if self._task.task in _TOGETHER else self._one_by_one
        try:
            told, outputs = compute(message["method"], parts, arrays)
        except Exception as error:  # noqa: BLE001 - what breaks a library must not break the worker for the others
            if isinstance(error, DataError | UsageError) or (message["method"] == "run" and len(parts) > 1):
                # One request's bad input must not fail those that came along.
                told, outputs = self._one_by_one(message["method"], parts, arrays)
            else:
                told, outputs = [{"error": told_error(as_known(error))} for _ in parts], {}
        reply = {"op": "done", "id": message["id"], "parts": told, "seconds": time.perf_counter() - begin}
        return reply, outputs

    def _encoded(self, text: object) -> Message:
        if self._count is None:
            return {"error": told_error(UsageError("this model reads no texts", "Use .run(feeds)"))}
        try:
            return {"ids": TextEncoder.encode(self._count, [check_text(text, "the text")])[0].ids.tolist()}
        except HastenError as error:
            return {"error": told_error(error)}

    def _one_by_one(self, method: str, parts: list[list[Any]], arrays: Arrays) -> tuple[list[Message], Arrays]:
        told: list[Message] = []
        vectors: list[Any] = []
        found: Arrays = {}
        feeds = unpack(arrays, len(parts)) if method == "run" else [{} for _ in parts]
        for index, part in enumerate(parts):
            try:
                one, outputs = self._compute(method, [part], pack([(0, feeds[index])]))
                told += one
                if method == "embed":
                    vectors.append(outputs["embedding"])
                elif method == "run":
                    found |= pack([(index, unpack(outputs, 1)[0])])
            except Exception as error:  # noqa: BLE001 - as in execute
                told.append({"error": told_error(as_known(error))})
        return told, {"embedding": np.concatenate(vectors)} if vectors else found

    def _compute(self, method: str, parts: list[list[Any]], arrays: Arrays) -> tuple[list[Message], Arrays]:
        if method == "run":
            outputs = run_together(unpack(arrays, len(parts)), self._task.run)
            return [{"tokens": 0} for _ in parts], pack(enumerate(outputs))
        if self._count is not None:
            self._count.forget()
        if method == "embed":
            vectors = self._task.embed([text for part in parts for text in part])
            return [{"tokens": self._tokens(part)} for part in parts], {"embedding": vectors}
        rows = self._task.rows([record for part in parts for record in part])
        told, start = [], 0
        for part in parts:
            told.append({"tokens": self._tokens(part), "rows": rows[start : start + len(part)]})
            start += len(part)
        return told, {}

    def _tokens(self, part: list[Any]) -> int:
        """Tokens of the items of a part."""
        if self._count is None:
            return 0
        if self._task.task not in _TOGETHER:
            return self._count.total
        return sum(self._count.counted.get(_item(one), 0) for one in part)

    def _bench(self, end: float) -> int:
        """Tokens of ordinary batches that were done by then."""
        texts = [f"{_SENTENCE[: 15 + 23 * index % 80]} {index}" for index in range(_BENCH_TEXTS)]
        method, tokens = ("embed" if self._task.task == "feature-extraction" else "rows"), 0
        while time.perf_counter() < end:
            tokens += sum(one["tokens"] for one in self._compute(method, [texts], {})[0])
        return tokens

    def warm(self) -> list[tuple[int, float]]:
        """(characters, seconds) of a few short runs, which also make the first request as fast as the others."""
        if self._count is None or self._task.task not in ("feature-extraction", "text-classification"):
            return []
        method = "embed" if self._task.task == "feature-extraction" else "rows"
        found = []
        for text in (*_WARM_TEXTS, *_WARM_TEXTS):
            begin = time.perf_counter()
            self._compute(method, [[text]], {})
            found.append((self._tokens([text]), time.perf_counter() - begin))
        return found[len(_WARM_TEXTS) :]


def _item(record: object) -> Item:
    """What the tokenizer was given of a record."""
    if isinstance(record, Mapping):
        text, pair = record.get("text"), record.get("text_pair")
        first = check_text(text, "the text") if isinstance(text, str) else ""
        return (first, check_text(pair, "the pair")) if isinstance(pair, str) else first
    return check_text(record, "the text") if isinstance(record, str) else ""


def as_known(error: Exception) -> HastenError:
    """The error, as one that can be told."""
    if isinstance(error, HastenError):
        return error
    return ProviderError(f"the worker failed: {type(error).__name__}: {error}")
