"""A long stream of items through an engine: in portions, some at once, in order, at constant memory."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from artifacts.errors import OverloadError, UsageError

from .estimate import characters

S = TypeVar("S")
T = TypeVar("T")

_CHARACTERS = 1 << 17
_LONGEST_WAIT = 0.5


async def portions(source: Iterable[S] | AsyncIterable[S], size: int) -> AsyncIterator[list[S]]:
    """The items of a source in lists of at most ``size``, and of bounded length in all; read lazily.

    Raises:
        UsageError: It cannot be read item by item.
    """
    taken: list[S] = []
    room = _CHARACTERS
    async for item in _each(source):
        taken.append(item)
        room -= characters(item)
        if len(taken) >= size or room <= 0:
            yield taken
            taken, room = [], _CHARACTERS
    if taken:
        yield taken


async def in_order(sources: AsyncIterator[S], work: Callable[[S], Awaitable[T]], ahead: int) -> AsyncIterator[T]:
    """``work(source)`` of each source, in order, ``ahead`` of them at once; what is refused for now is tried again."""
    started: deque[asyncio.Task[T]] = deque()

    async def patiently(source: S) -> T:
        while True:
            try:
                return await work(source)
            except OverloadError as error:
                await asyncio.sleep(min(error.retry_after, _LONGEST_WAIT))

    try:
        async for source in sources:
            started.append(asyncio.create_task(patiently(source)))
            if len(started) >= ahead:
                yield await started.popleft()
        while started:
            yield await started.popleft()
    finally:
        for task in started:
            task.cancel()
        await asyncio.gather(*started, return_exceptions=True)


async def _each(source: Iterable[S] | AsyncIterable[S]) -> AsyncIterator[S]:
    if isinstance(source, str | bytes):
        raise UsageError(f"a list is needed, got one {type(source).__name__}", "Pass [text]")
    if isinstance(source, AsyncIterable):
        async for item in source:
            yield item
    elif isinstance(source, Iterable):
        for item in source:
            yield item
    else:
        raise UsageError(f"a list is needed, got {type(source).__name__}", "Pass a list, or any iterable")


async def together(work: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results; where one fails, the others are given up."""
    if len(work) == 1:
        return [await work[0]]
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
