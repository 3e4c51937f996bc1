"""Many batches through a model: the next chunk is tokenized while one runs, and batches run in lanes, all in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, islice
from typing import TypeVar

from .pool import Arrays, Runner, SessionPool
from .text import Batch

S = TypeVar("S")
T = TypeVar("T")


def ahead(make: Callable[[S], T], sources: Iterable[S]) -> Iterator[T]:
    """``make(source)`` for each source, in order; while one is used, the next is made on a second thread.

    One is made ahead and no more, so memory stays bounded, and the thread is never left waiting for the caller. The
    sources are read on the caller's thread, one further than what is made. What ``make`` raises reaches the caller when
    that item is due. A single source needs no thread. An abandoned generator waits for the item being made, if any, and
    ends its thread.
    """
    left = iter(sources)
    first = list(islice(left, 2))
    if len(first) < 2:
        yield from map(make, first)
        return
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1, "hasten-ahead") as thread:
        ready = make(first[0])
        for source in chain(first[1:], left):
            coming = thread.submit(make, source)
            yield ready
            ready = coming.result()
        yield ready


def in_lanes(work: Callable[[S], T], items: Iterable[S], lanes: int) -> Iterator[tuple[S, T]]:
    """Each item with ``work(item)``, in order; so many at once, each on a thread of its own.

    Items are read on the caller's thread, at most twice ``lanes`` further than what was yielded. What ``work`` raises
    reaches the caller when that item is due. An abandoned generator drops what did not start and waits for what did.
    """
    from concurrent.futures import Future, ThreadPoolExecutor

    started: deque[tuple[S, Future[T]]] = deque()
    with ThreadPoolExecutor(lanes, "hasten-lane") as threads:
        try:
            for item in items:
                started.append((item, threads.submit(work, item)))
                if len(started) == 2 * lanes:
                    due, result = started.popleft()
                    yield due, result.result()
            while started:
                due, result = started.popleft()
                yield due, result.result()
        finally:
            for _, unwanted in started:
                unwanted.cancel()


def flow(
    chunks: Iterable[Sequence[Batch]], pool: SessionPool, run: Callable[[Runner, Batch], Arrays]
) -> Iterator[tuple[Batch, Arrays]]:
    """Each batch with its outputs, in order, on the session that the pool chooses.

    Once a chunk runs in lanes, so does all that follows: lanes do not wait for each other between chunks.
    """
    left = iter(chunks)
    for chunk in left:
        runner, lanes = pool.choose(len(chunk))
        work = partial(run, runner)
        if lanes > 1:
            yield from in_lanes(work, chain(chunk, chain.from_iterable(left)), lanes)
            return
        for batch in chunk:
            yield batch, work(batch)


def in_order(found: Iterable[tuple[Sequence[int], Iterable[T]]]) -> Iterator[T]:
    """Values whose indices 0, 1, 2... come in any order, by index; each as soon as all before it are there."""
    waiting: dict[int, T] = {}
    due = 0
    for indices, values in found:
        waiting.update(zip(indices, values, strict=True))
        while due in waiting:
            yield waiting.pop(due)
            due += 1
