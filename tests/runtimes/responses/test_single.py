"""Of equal requests one is computed, whatever becomes of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from response_caches import run

from runtimes.responses import ResponseCache, open_cache


class Work:
    """A computation that can be held up and made to fail, and counts."""

    def __init__(self, value: bytes = b"value") -> None:
        self.value = value
        self.started = 0
        self.go = asyncio.Event()
        self.errors: list[Exception] = []

    async def __call__(self) -> bytes:
        self.started += 1
        await self.go.wait()
        if self.errors:
            raise self.errors.pop()
        return self.value


async def settle(work: Work, started: int = 1) -> None:
    """Until the work has started, and those who wait for it wait."""
    while work.started < started:
        await asyncio.sleep(0.001)
    for _ in range(5):
        await asyncio.sleep(0)


def test_equal_requests_are_computed_once(tmp_path: Path) -> None:
    async def test(cache: ResponseCache) -> None:
        work = Work()
        tasks = [asyncio.create_task(cache.single("k", work)) for _ in range(50)]
        held = Work(b"else")
        other = asyncio.create_task(cache.single("other", held))
        await settle(work)
        await settle(held)
        work.go.set()
        answers = await asyncio.gather(*tasks)
        assert work.started == 1
        assert {value for value, _ in answers} == {b"value"}
        assert sorted(cached for _, cached in answers) == [False] + [True] * 49
        assert await cache.single("k", work) == (b"value", True)
        stats = cache.stats()
        assert (stats.hits, stats.misses, stats.errors) == (50, 2, 0)
        other.cancel()

    run(tmp_path, test)


def test_another_takes_over_where_the_first_is_cancelled(tmp_path: Path) -> None:
    async def test(cache: ResponseCache) -> None:
        work = Work()
        tasks = [asyncio.create_task(cache.single("k", work)) for _ in range(4)]
        await settle(work)
        tasks[0].cancel()
        await settle(work, 2)
        assert tasks[0].cancelled()
        work.go.set()
        answers = await asyncio.gather(*tasks[1:])
        assert work.started == 2
        assert sorted(cached for _, cached in answers) == [False, True, True]

    run(tmp_path, test)


def test_one_that_waits_and_is_cancelled_stops_nobody(tmp_path: Path) -> None:
    async def test(cache: ResponseCache) -> None:
        work = Work()
        tasks = [asyncio.create_task(cache.single("k", work)) for _ in range(3)]
        await settle(work)
        tasks[1].cancel()
        await asyncio.sleep(0)
        work.go.set()
        assert await tasks[0] == (b"value", False)
        assert await tasks[2] == (b"value", True)
        assert tasks[1].cancelled()
        assert work.started == 1

    run(tmp_path, test)


def test_errors_are_not_kept(tmp_path: Path) -> None:
    async def test(cache: ResponseCache) -> None:
        work = Work()
        work.errors = [RuntimeError("second"), ValueError("first")]
        work.go.set()
        answers = await asyncio.gather(*(cache.single("k", work) for _ in range(4)), return_exceptions=True)
        assert [type(answer) for answer in answers] == [ValueError, RuntimeError, tuple, tuple]
        assert work.started == 3
        assert await cache.get("k") == b"value"

    run(tmp_path, test)


def test_all_fail_where_all_attempts_do(tmp_path: Path) -> None:
    async def test(cache: ResponseCache) -> None:
        async def fail() -> bytes:
            await asyncio.sleep(0)
            raise ValueError("no")

        answers = await asyncio.gather(*(cache.single("k", fail) for _ in range(20)), return_exceptions=True)
        assert [str(answer) for answer in answers] == ["no"] * 20
        assert await cache.get("k") is None

    run(tmp_path, test)


@pytest.mark.parametrize("value", [b"", b"\0" * 100, bytes(range(256)) * 5000])
def test_values_of_any_bytes(tmp_path: Path, value: bytes) -> None:
    async def test(cache: ResponseCache) -> None:
        work = Work(value)
        work.go.set()
        assert await cache.single("k", work) == (value, False)
        assert await cache.single("k", work) == (value, True)
        await cache.close()
        again = open_cache(tmp_path)
        assert await again.single("k", work) == (value, True)
        assert await again.get("k") == value
        await again.close()

    run(tmp_path, test)


def test_a_value_is_there_while_it_is_still_being_written(tmp_path: Path) -> None:
    async def test(cache: ResponseCache) -> None:
        work = Work()
        work.go.set()
        await cache.single("k", work)
        assert await cache.get("k") == b"value"

    run(tmp_path, test)


def test_after_close_requests_are_computed(tmp_path: Path) -> None:
    async def test(cache: ResponseCache) -> None:
        await cache.close()
        await cache.close()
        work = Work()
        work.go.set()
        assert await cache.single("k", work) == (b"value", False)
        await cache.put("k", b"more")
        assert await cache.get("k") is None
        assert cache.stats().errors == 0

    run(tmp_path, test)


def test_closed_on_another_loop_than_it_was_used_on(tmp_path: Path) -> None:
    """As after an engine without await, whose loop ends with it."""
    cache = open_cache(tmp_path)

    async def use() -> None:
        work = Work()
        work.go.set()
        assert await cache.single("k", work) == (b"value", False)
        await asyncio.sleep(0.2)

    async def look() -> None:
        again = open_cache(tmp_path)
        assert await again.get("k") == b"value"
        await again.close()

    asyncio.run(use())
    asyncio.run(cache.close())
    asyncio.run(look())
