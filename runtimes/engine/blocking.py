"""The engine without ``await``: its event loop runs on a thread of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from artifacts.bundle import Bundle
from artifacts.errors import UsageError

from ..generate.results import Piece
from .calls import Answer, Call, Items, Method
from .stats import Stats

if TYPE_CHECKING:
    from ..tasks.classify import Classification
    from .engine import Engine

T = TypeVar("T")
_CALL = Call()


class BlockingEngine:
    """An `Engine` for code that does not await; its methods may be called from several threads.

    Args:
        engine: Not started.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        loop = asyncio.new_event_loop()
        # A daemon: an interpreter that ends without leaving the context must not wait for it. The workers end with us.
        self._thread = threading.Thread(target=loop.run_forever, name="hasten-engine", daemon=True)
        self._loop = loop
        self._thread.start()
        try:
            self._wait(self._engine.start())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._wait(self._engine.close(drain=30.0 if kind is None else 0.0))
        finally:
            self._end()

    @property
    def bundle(self) -> Bundle:
        """What is served."""
        return self._engine.bundle

    @property
    def ready(self) -> bool:
        """As `Engine.ready`."""
        return self._engine.ready

    def ask(self, method: Method, items: Items, call: Call = _CALL) -> Answer:
        """As `Engine.ask`."""
        return self._wait(self._engine.ask(method, items, call))

    def embed(self, texts: Iterable[str], *, call: Call = _CALL) -> NDArray[np.float32]:
        """As `Engine.embed`."""
        return self._wait(self._engine.embed(texts, call=call))

    def embed_iter(self, texts: Iterable[str], *, call: Call = _CALL) -> Iterator[NDArray[np.float32]]:
        """As `Engine.embed_iter`; ``texts`` is read on the engine's thread."""
        return self._each(self._engine.embed_iter(texts, call=call))

    def classify(self, items: Iterable[str | tuple[str, str]], *, call: Call = _CALL) -> list[Classification]:
        """As `Engine.classify`."""
        return self._wait(self._engine.classify(items, call=call))

    def rows(self, records: Sequence[Any], *, call: Call = _CALL) -> list[dict[str, Any]]:
        """As `Engine.rows`."""
        return self._wait(self._engine.rows(records, call=call))

    def map(self, records: Iterable[Any], *, call: Call = _CALL) -> Iterator[dict[str, Any]]:
        """As `Engine.map`; ``records`` is read on the engine's thread."""
        return self._each(self._engine.map(records, call=call))

    def run(self, feeds: Mapping[str, NDArray[Any]], *, call: Call = _CALL) -> dict[str, NDArray[Any]]:
        """As `Engine.run`."""
        return self._wait(self._engine.run(feeds, call=call))

    def generate(self, prompt: object, *, call: Call = _CALL, **options: Any) -> Any:
        """As `Engine.generate`."""
        return self._wait(self._engine.generate(prompt, call=call, **options))

    def stream(self, prompt: object, *, call: Call = _CALL, **options: Any) -> Iterator[Piece]:
        """As `Engine.stream`; closing the iterator ends the work."""
        return self._each(self._engine.stream(prompt, call=call, **options))

    def encode_prompt(self, prompt: object, **options: Any) -> tuple[int, ...]:
        """As `Engine.encode_prompt`."""
        return self._wait(self._engine.encode_prompt(prompt, **options))

    def count_tokens(self, prompt: object, **options: Any) -> int:
        """As `Engine.count_tokens`."""
        return self._wait(self._engine.count_tokens(prompt, **options))

    def stats(self) -> Stats:
        """As `Engine.stats`."""

        async def look() -> Stats:
            return self._engine.stats()

        return self._wait(look())

    def explain(self) -> str:
        """As `Engine.explain`."""
        return self._engine.explain()

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop is None or threading.current_thread() is self._thread:
            work.close()
            raise UsageError("the engine is not running", "Use it inside `with`, and not from its own thread")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # An interrupt, maybe: nobody waits for it any more.
            raise

    def _each(self, source: AsyncIterator[T]) -> Iterator[T]:
        async def following() -> tuple[bool, T | None]:
            try:
                return True, await anext(source)
            except StopAsyncIteration:
                return False, None

        async def close() -> None:
            ending = getattr(source, "aclose", None)
            if ending is not None:
                await ending()

        try:
            while True:
                there, value = self._wait(following())
                if not there:
                    return
                yield value  # type: ignore[misc]  # there says that it is no None of ours
        finally:
            self._wait(close())

    def _end(self) -> None:
        loop = self._loop
        if loop is not None and self._thread is not None:
            self._wait(_wind_up(loop))
            self._loop = None
            loop.call_soon_threadsafe(loop.stop)
            self._thread.join()
            loop.close()


async def _wind_up(loop: asyncio.AbstractEventLoop) -> None:
    """What `asyncio.run` does at its end."""
    await loop.shutdown_asyncgens()
    await loop.shutdown_default_executor()
