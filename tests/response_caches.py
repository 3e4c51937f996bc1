"""A response cache opened for a test, on a loop of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from runtimes.responses import ResponseCache, open_cache


async def make() -> bytes:
    """What is kept."""
    return b"answer"


def run(where: str | Path, test: Callable[[ResponseCache], Awaitable[None]], **options: float) -> None:
    """The test with a cache just opened: what it finds was there before."""

    async def main() -> None:
        cache = open_cache(where, **options)
        try:
            async with asyncio.timeout(30):
                await test(cache)
        finally:
            await cache.close()

    asyncio.run(main())
