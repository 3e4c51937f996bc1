"""An engine: one bundle, served to many callers at once by worker processes."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

import numpy as np
from numpy.typing import NDArray

from artifacts.bundle import Bundle, open_bundle
from artifacts.errors import UsageError, WorkerError

from ..generate.prompts import is_one
from ..generate.results import Generated, Piece
from ..items import check_texts
from .calls import Answer, Call, EngineOptions, Items, Method
from .dispatch import Dispatcher
from .estimate import Lengths, rows_of
from .memory import Remembered
from .ordered import in_order, portions, together
from .rows import form_of
from .shape import shapes
from .stats import Stats
from .streams import Writing, payload_of, pieces_of
from .waiting import Work
from .wishes import check_writing

if TYPE_CHECKING:
    from ..responses.cache import ResponseCache
    from ..tasks.classify import Classification
    from .blocking import BlockingEngine

CUT = ("feature-extraction", "text-classification", "token-classification")
"""Tasks that cut each input to the model's longest."""
WRITES = "text-generation"
_CALL = Call()
_OPTIONS = EngineOptions()
_ITEMS, _PROMPTS = 256, 16


class Engine:
    """Serves a bundle. ``async with Engine(path) as engine`` starts and closes it; all methods are for one event loop.

    ``with Engine(path) as engine`` gives a `BlockingEngine` instead: the same without ``await``, for any thread.

    Args:
        path: The bundle's folder.
        options: How it works.
        cache: Keeps answers to deterministic requests; the caller closes it. None: nothing is kept.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        options: EngineOptions = _OPTIONS,
        cache: ResponseCache | None = None,
    ) -> None:
        self.path = Path(path)
        self.options = options
        self.cache = cache
        self._bundle: Bundle | None = None
        self._dispatcher: Dispatcher | None = None
        self._remembered: Remembered | None = None
        self._lengths = Lengths()
        self._blocking: BlockingEngine | None = None
        self._closed = False

    @property
    def bundle(self) -> Bundle:
        """What is served.

        Raises:
            UsageError: The engine was not started.
        """
        if self._bundle is None:
            raise UsageError("the engine was not started", "Use `async with`, or await start()")
        return self._bundle

    @property
    def task(self) -> str:
        """Task of the bundle; see `bundle`."""
        return self.bundle.manifest.task

    @property
    def ready(self) -> bool:
        """Whether it takes requests and a worker runs, or would if there were work."""
        running = self._dispatcher is not None and not self._closed
        return running and any(host.state in ("ready", "idle") for host in self._live.crew.hosts)

    @property
    def wait(self) -> float:
        """Seconds until a request of the usual priority would begin, as expected; 0 where nothing is known."""
        return self._dispatcher.expected_wait(0) if self._dispatcher is not None else 0.0

    async def start(self) -> None:
        """Open the bundle and start the workers.

        Raises:
            UsageError: It was started before, or there is no such device, provider or variant.
            BundleError: Not a bundle, or a damaged one.
            ProviderError: Nothing here runs the bundle correctly.
            WorkerError: The workers died while they loaded it.
        """
        if self._dispatcher is not None or self._closed:
            raise UsageError("the engine was started before", "Make another one")
        bundle = await asyncio.to_thread(open_bundle, self.path, verify=self.options.verify)
        loads = await shapes(bundle, self.options)
        longest = bundle.manifest.processor.max_length if bundle.manifest.processor is not None else 0
        self._lengths = Lengths(longest if bundle.manifest.task in CUT else 0)
        dispatcher = Dispatcher(self.options, loads)
        try:
            await dispatcher.start()
        except BaseException:
            await dispatcher.crew.close()
            raise
        self._bundle, self._dispatcher = bundle, dispatcher
        self._remembered = Remembered(self.cache, bundle, dispatcher.counters)

    async def close(self, *, drain: float = 30.0) -> None:
        """Take no more requests, finish those that were accepted, and end the workers. Calling it again does nothing.

        Args:
            drain: Seconds after which what is left fails with a WorkerError.
        """
        self._closed = True
        if self._dispatcher is not None:
            await self._dispatcher.close(drain)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close(drain=30.0 if kind is None else 0.0)

    def __enter__(self) -> BlockingEngine:
        from .blocking import BlockingEngine

        self._blocking = BlockingEngine(self)
        return self._blocking.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._blocking is not None:
            self._blocking.__exit__(kind, error, trace)

    async def ask(self, method: Method, items: Items, call: Call = _CALL) -> Answer:
        """Have items computed, in batches with those of others.

        Args:
            method: ``embed``: texts to vectors, ``rows``: records to what `hasten run` says of them, ``run``: plain
                tensors through the graph.
            items: Texts, records, or arrays by input name.
            call: How the request is treated.

        Raises:
            UsageError: The items make no sense, or the model has no such method.
            DataError: A record is not what the task takes.
            ProviderError: ONNX Runtime failed.
            OverloadError: There is no room for it now, or its time is too short.
            DeadlineError: Its time was over.
            WorkerError: The workers that ran it died, or the engine was closed.
        """
        if method == "run":
            if not isinstance(items, Mapping):
                raise UsageError(f"run takes arrays by input name, got {type(items).__name__}", "Pass {name: array}")
            feeds = {name: np.asarray(value) for name, value in items.items()}
            return await self._known.answer("run", feeds, lambda: self._work("run", [feeds], [rows_of(feeds)], call))
        if method == "embed":
            if self.task != "feature-extraction":
                raise UsageError(f"this is a {self.task} model: it has no .embed()", "Use .rows(records)")
            checked: list[Any] = list(check_texts(items, method="embed"))
        elif isinstance(items, str | bytes | Mapping) or not isinstance(items, Iterable):
            raise UsageError(f"rows takes a list of records, got {type(items).__name__}", "Pass [record]")
        else:
            checked = list(items)
        if method == "rows" and self.task == WRITES:
            return await self._written_rows(checked, call)
        costs = [self._lengths.tokens(item) for item in checked]
        return await self._known.answer(method, checked, lambda: self._work(method, checked, costs, call))

    async def embed(self, texts: Iterable[str], *, call: Call = _CALL) -> NDArray[np.float32]:
        """A vector for each text: float32 [n, d]; see `Embedder.embed`, and `ask` for the errors."""
        return (await self.ask("embed", cast("Items", texts), call)).arrays["embedding"]

    async def classify(self, items: Iterable[str | tuple[str, str]], *, call: Call = _CALL) -> list[Classification]:
        """The class of each text; see `Classifier.classify`, and `ask` for the errors."""
        from ..tasks.classify import Classification

        if self.task != "text-classification":
            raise UsageError(f"this is a {self.task} model: it has no .classify()", "Use .rows(records)")
        checked = check_texts(items, method="classify", pairs=True)
        records = [one if isinstance(one, str) else {"text": one[0], "text_pair": one[1]} for one in checked]
        rows = (await self.ask("rows", records, call)).rows
        return [Classification(row["label"], row["score"], row["scores"]) for row in rows]

    async def rows(self, records: Sequence[Any], *, call: Call = _CALL) -> list[dict[str, Any]]:
        """One JSON-ready object a record, in order: what the task's ``rows`` gives; see `ask` for the errors."""
        return (await self.ask("rows", records, call)).rows

    async def run(self, feeds: Mapping[str, NDArray[Any]], *, call: Call = _CALL) -> dict[str, NDArray[Any]]:
        """Outputs of the graph by name; see `Task.run`, and `ask` for the errors."""
        return (await self.ask("run", feeds, call)).arrays

    async def embed_iter(
        self, texts: Iterable[str] | AsyncIterable[str], *, call: Call = _CALL
    ) -> AsyncIterator[NDArray[np.float32]]:
        """The vectors of texts, float32 [d] each, in order and at constant memory; ``texts`` may be endless.

        It waits where the queue is full. ``call`` is for each portion of some hundred texts by itself.
        """
        async for vectors in in_order(portions(texts, _ITEMS), lambda some: self.embed(some, call=call), self._ahead):
            for vector in vectors:
                yield vector.copy()  # A vector that the caller keeps must not keep its whole portion.

    async def map(
        self, records: Iterable[Any] | AsyncIterable[Any], *, call: Call = _CALL
    ) -> AsyncIterator[dict[str, Any]]:
        """What `hasten run` gives for each record, in order and at constant memory; its ``id`` is carried over.

        It waits where the queue is full. ``call`` is for each portion of some hundred records by itself.
        """

        async def work(some: list[Any]) -> list[dict[str, Any]]:
            rows = await self.rows(some, call=call)
            return [
                {"id": record["id"], **row} if isinstance(record, Mapping) and "id" in record else row
                for record, row in zip(some, rows, strict=True)
            ]

        size = _PROMPTS if self.task == WRITES else _ITEMS
        async for rows in in_order(portions(records, size), work, self._ahead):
            for row in rows:
                yield row

    async def generate(self, prompt: object, *, call: Call = _CALL, **options: Any) -> Any:
        """Texts that go on from a prompt, or from each of several; prompts, options and shapes of `Generator.generate`.

        Raises:
            UsageError: As there; ``cache`` and ``cancel`` are for one process and refused.
            OverloadError, DeadlineError, WorkerError: As `ask`.
        """
        alone = is_one(prompt)
        prompts = [prompt] if alone else list(cast("Sequence[object]", prompt))
        self._check_writes()
        found = await together([self._texts(one, call, options) for one in prompts])
        shaped = [texts if (options.get("n") or 1) > 1 else texts[0] for texts in found]
        return shaped[0] if alone else shaped

    async def stream(self, prompt: object, *, call: Call = _CALL, **options: Any) -> AsyncIterator[Piece]:
        """The pieces of the texts as they are written. Closing it ends the work.

        Errors come from the first piece on; see `generate`.
        """
        self._check_writes()
        prompts = [prompt] if is_one(prompt) else list(cast("Sequence[object]", prompt))
        if (options.get("beams") or 1) != 1:
            raise UsageError("beam search cannot stream: its texts are known at the end", "Leave out one")
        writings: list[Writing] = []
        memory = self._known
        try:
            for index, one in enumerate(prompts):
                known = await memory.texts(one, options)
                if known is None:
                    pieces = (writings[0].pieces, writings[0].woken) if writings else ()
                    writings.append(self._submit_writing(one, call, options, index, pieces))
                    continue
                for place, text in enumerate(known):
                    yield Piece(text.text, index, place, text)
            async for piece in pieces_of(writings):
                yield piece
            for writing in writings:
                await memory.keep_texts(prompts[writing.prompt], options, writing.finished)
        finally:
            for writing in writings:
                self._live.give_up(writing)

    async def encode_prompt(self, prompt: object, **options: Any) -> tuple[int, ...]:
        """Token ids of a prompt as `generate` would read it, or of a text as the model's tokenizer cuts it.

        Raises:
            UsageError: It is no prompt, or an option makes no sense.
            WorkerError: No worker runs.
        """
        payload = payload_of(prompt, options)
        host = await self._live.crew.any()
        return tuple((await host.ask({"op": "encode", **payload}))["ids"])

    async def count_tokens(self, prompt: object, **options: Any) -> int:
        """How many `encode_prompt` gives."""
        return len(await self.encode_prompt(prompt, **options))

    def stats(self) -> Stats:
        """What it does, and did since it was started."""
        return self._live.stats()

    def explain(self) -> str:
        """Which variant runs where, and why: several lines for each kind of worker."""
        told = [str(host.told.get("explanation", "")) for host in self._live.crew.hosts]
        return "\n".join(dict.fromkeys(text for text in told if text))

    @property
    def _live(self) -> Dispatcher:
        if self._dispatcher is None:
            raise UsageError("the engine was not started", "Use `async with`, or await start()")
        return self._dispatcher

    @property
    def _known(self) -> Remembered:
        if self._remembered is None:
            raise UsageError("the engine was not started", "Use `async with`, or await start()")
        if self._closed:
            raise WorkerError("the engine was closed", "Make another one")
        return self._remembered

    @property
    def _ahead(self) -> int:
        return 2 * len(self._live.crew.hosts) + 1

    def _check_writes(self) -> None:
        if self.task != WRITES:
            raise UsageError(f"this is a {self.task} model: it has no .generate()", "Use .rows(records)")

    async def _work(self, method: str, items: Sequence[Any], costs: Sequence[int], call: Call) -> Answer:
        live, cost = self._live, sum(costs)
        expected = live.admit(call, cost)
        loop = asyncio.get_running_loop()
        work = Work(
            *(live.next_number(), method, call, loop.time(), cost, self.options.aging, loop.create_future()),
            expected=expected,
            items=items,
            costs=costs,
            form=form_of(items[0]) if method == "run" else "",
        )
        live.submit(work)
        try:
            answer: Answer = await work.future
        except asyncio.CancelledError:
            live.give_up(work)
            raise
        if method != "run":
            self._lengths.learn(items, answer.tokens)
        return answer

    async def _texts(self, prompt: object, call: Call, options: Mapping[str, Any]) -> list[Generated]:
        async def make() -> list[Generated]:
            writing = self._submit_writing(prompt, call, options, 0)
            try:
                await writing.future
            finally:
                self._live.give_up(writing)
            return writing.finished

        return await self._known.written(prompt, options, make)

    async def _written_rows(self, records: Sequence[Any], call: Call) -> Answer:
        """Records of a language model, each a prompt with options of its own."""
        from ..tasks.generate import read_record

        async def row(record: Any) -> tuple[dict[str, Any], int]:
            prompt, options = read_record(record)
            texts = await self._texts(prompt, call, options)
            told = [text.to_dict() for text in texts]
            return ({"texts": told} if (options.get("n") or 1) > 1 else told[0]), texts[0].prompt_tokens

        found = await together([row(record) for record in records])
        return Answer({}, [told for told, _ in found], sum(tokens for _, tokens in found))

    def _submit_writing(
        self, prompt: object, call: Call, options: Mapping[str, Any], index: int, shared: tuple[Any, ...] = ()
    ) -> Writing:
        payload = payload_of(prompt, options)
        check_writing(self.bundle, prompt, options)
        cost, live = self._lengths.writing(prompt, options), self._live
        expected = live.admit(call, cost)
        loop = asyncio.get_running_loop()
        writing = Writing(
            *(live.next_number(), "generate", call, loop.time(), cost, self.options.aging, loop.create_future()),
            expected=expected,
            payload=payload,
            texts=_count(options.get("n")),
            prompt=index,
        )
        if shared:
            writing.pieces, writing.woken = shared
        live.submit(writing)
        return writing


def _count(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 1
