"""Values in a real Redis server, which may go away and come back."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import time
from pathlib import Path

import pytest
from redis_server import Server
from response_caches import make, run

from artifacts.errors import InstallationError, UsageError
from runtimes.responses import ResponseCache, open_cache
from runtimes.responses import cache as caching
from runtimes.responses.front import Front
from runtimes.responses.seal import seal


def test_values_are_shared(server: Server) -> None:
    async def write(cache: ResponseCache) -> None:
        assert await cache.single("k", make) == (b"answer", False)

    async def read(cache: ResponseCache) -> None:
        assert await cache.single("k", make) == (b"answer", True)
        assert await cache.get("other") is None
        stats = cache.stats()
        assert (stats.hits, stats.misses, stats.errors, stats.entries) == (1, 1, 0, 1)

    run(server.url, write)
    run(server.url, read)
    assert server.command("EXISTS", "hasten:k") == b":1\r\n"
    assert server.command("PTTL", "hasten:k") == b":-1\r\n"


def test_redis_forgets_by_age(server: Server) -> None:
    async def write(cache: ResponseCache) -> None:
        await cache.put("k", b"answer")
        assert 0 < int(server.command("PTTL", "hasten:k")[1:]) <= 300
        await asyncio.sleep(0.4)
        assert await cache.get("k") is None
        assert server.command("EXISTS", "hasten:k") == b":0\r\n"

    run(server.url, write, max_age=0.3)


def test_redis_goes_away_and_comes_back(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(caching, "_FIRST_REST", 0.05)
    monkeypatch.setattr(caching, "_LONGEST_REST", 0.1)

    async def test(cache: ResponseCache) -> None:
        assert await cache.single("before", make) == (b"answer", False)
        await asyncio.sleep(0.05)
        server.kill()
        begin = time.monotonic()
        for index in range(50):
            assert await cache.single(f"during {index}", make) == (b"answer", False)
        assert time.monotonic() - begin < 2.0
        assert await cache.single("before", make) == (b"answer", True)
        stats = cache.stats()
        assert stats.errors >= 1
        assert not stats.working
        server.start()
        while not cache.stats().working:
            await asyncio.sleep(0.01)
        await cache.put("after", b"answer")

    with caplog.at_level(logging.INFO, "hasten.responses"):
        run(server.url, test)
    assert len(caplog.records) == 2, caplog.text
    assert "served without it" in caplog.text
    assert "is back" in caplog.text
    assert server.command("EXISTS", "hasten:after") == b":1\r\n"


def test_a_restart_between_two_requests_is_not_noticed(server: Server) -> None:
    async def test(cache: ResponseCache) -> None:
        await cache.put("k", b"answer")
        server.kill()
        server.start()
        await cache.put("new", b"answer")
        assert cache.stats().errors == 0

    run(server.url, test)
    assert server.command("EXISTS", "hasten:new") == b":1\r\n"


def test_redis_that_is_not_there(caplog: pytest.LogCaptureFixture) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    async def test(cache: ResponseCache) -> None:
        assert await cache.single("k", make) == (b"answer", False)
        assert cache.stats().errors == 1

    run(f"redis://someone:secret@127.0.0.1:{port}/0", test)
    assert f"redis://127.0.0.1:{port}/0 fails" in caplog.text
    assert "secret" not in caplog.text
    assert "someone" not in caplog.text


def test_redis_that_does_not_answer() -> None:
    """A host that takes connections and is silent holds nobody up for longer than a moment, and only once."""
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()

        async def test(cache: ResponseCache) -> None:
            begin = time.monotonic()
            for index in range(10):
                assert await cache.single(f"k{index}", make) == (b"answer", False)
            assert time.monotonic() - begin < 6.0
            assert not cache.stats().working

        run(f"redis://127.0.0.1:{silent.getsockname()[1]}", test)


def test_a_full_redis(tmp_path: Path) -> None:
    server = Server(tmp_path, "--maxmemory", "1mb", "--maxmemory-policy", "noeviction")
    try:

        async def test(cache: ResponseCache) -> None:
            await cache.put("k", bytes(1 << 21))
            assert cache.stats().errors == 1
            assert await cache.single("other", make) == (b"answer", False)

        run(server.url, test)
    finally:
        server.kill()


def test_what_others_wrote_is_no_answer(server: Server) -> None:
    server.command("SET", "hasten:text", "hello")
    server.command("SET", "hasten:cut", seal("cut", b"x" * 50, 0.0)[:-1].decode("latin-1"))
    server.command("LPUSH", "hasten:list", "a")

    async def test(cache: ResponseCache) -> None:
        assert await cache.get("text") is None
        assert await cache.get("cut") is None
        assert await cache.single("list", make) == (b"answer", False)
        assert cache.stats().errors == 3

    run(server.url, test)


def test_a_value_under_another_key_is_no_answer(server: Server) -> None:
    async def test(cache: ResponseCache) -> None:
        await cache.put("mine", b"secret")

    async def look(cache: ResponseCache) -> None:
        assert await cache.get("yours") is None
        assert await cache.get("mine") == b"secret"
        assert cache.stats().errors == 1

    run(server.url, test)
    assert server.command("COPY", "hasten:mine", "hasten:yours") == b":1\r\n"
    run(server.url, look)


def test_requests_that_are_cancelled_leave_no_answers_to_others(server: Server) -> None:
    """A connection that is given back with an answer still to come would give it to the next one who asks."""

    async def write(cache: ResponseCache) -> None:
        for index in range(50):
            await cache.put(f"k{index}", b"%d" % index * 2000)

    async def test(cache: ResponseCache) -> None:
        for turn in range(30):
            tasks = [asyncio.create_task(cache.single(f"k{index}", make)) for index in range(50)]
            for _ in range(turn % 10):
                await asyncio.sleep(0)
            for task in tasks[::2]:
                task.cancel()
            answers = await asyncio.gather(*tasks, return_exceptions=True)
            for index, answer in list(enumerate(answers))[1::2]:
                assert answer == (b"%d" % index * 2000, True)
            # What is in memory now would hide the rest.
            cache._front = Front(1 << 20)  # type: ignore[attr-defined]
        assert cache.stats().errors == 0

    run(server.url, write)
    run(server.url, test)


@pytest.mark.parametrize("url", ["redis://localhost:port", "redis://localhost:99999999/0", "redis://[::1"])
def test_what_is_no_url(url: str) -> None:
    with pytest.raises(UsageError, match="is no Redis URL"):
        open_cache(url)


def test_without_redis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    with pytest.raises(InstallationError, match=r"redis is not installed. pip install 'hasten\[serve\]'"):
        open_cache("redis://localhost")
