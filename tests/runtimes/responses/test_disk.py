"""Values in a folder: limits, crashes, damage, and what others put there."""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import signal
import sqlite3
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from real_command import environment
from response_caches import run

from artifacts.errors import InstallationError, UsageError
from runtimes.responses import ResponseCache, open_cache
from runtimes.responses import cache as caching

MIB = 1 << 20


async def no_answer() -> bytes:
    raise AssertionError("it was there")


def test_values_outlive_the_process(tmp_path: Path) -> None:
    async def write(cache: ResponseCache) -> None:
        for index in range(5):
            await cache.put(f"key {index}", b"%d" % index)

    async def read(cache: ResponseCache) -> None:
        assert [await cache.get(f"key {index}") for index in range(6)] == [b"0", b"1", b"2", b"3", b"4", None]
        stats = cache.stats()
        assert (stats.hits, stats.misses, stats.errors, stats.entries) == (5, 1, 0, 5)
        assert stats.bytes > 0
        assert stats.to_dict()["working"] is True

    run(tmp_path / "new" / "cache", write)
    run(tmp_path / "new" / "cache", read)


def test_the_folder_is_its_owners(tmp_path: Path) -> None:
    async def write(cache: ResponseCache) -> None:
        await cache.put("k", b"answer")

    run(tmp_path / "cache", write)
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700


def test_the_size_is_bounded_and_what_is_used_stays(tmp_path: Path) -> None:
    value = os.urandom(10_000)

    async def fill(cache: ResponseCache) -> None:
        for index in range(70):
            await cache.put(f"key {index}", value)

    async def use(cache: ResponseCache) -> None:
        assert await cache.get("key 0") == value

    async def overflow(cache: ResponseCache) -> None:
        for index in range(70, 110):
            await cache.put(f"key {index}", value)
            assert cache.stats().bytes <= MIB

    async def mix(cache: ResponseCache) -> None:
        """Small values, ten for a large one, do not let large ones pile up."""
        for index in range(500):
            await cache.put(f"small {index}", b"x" * 100)
        for index in range(150):
            await cache.put(f"large {index}", value)
            assert cache.stats().bytes <= MIB
        assert cache.stats().errors == 0

    async def look(cache: ResponseCache) -> None:
        assert await cache.get("key 1") is None
        assert await cache.get("large 149") == value

    for step in (fill, use, overflow, use, mix, look):
        run(tmp_path, step, max_bytes=MIB)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2 * MIB


def test_a_value_used_from_memory_counts_as_used_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caching, "_UNSEEN", 0.0)
    value = os.urandom(10_000)

    async def test(cache: ResponseCache) -> None:
        await cache.put("hot", value)
        for index in range(150):
            assert await cache.single("hot", no_answer) == (value, True)
            await cache.put(f"key {index}", value)

    async def look(cache: ResponseCache) -> None:
        assert await cache.get("hot") == value
        assert await cache.get("key 0") is None

    run(tmp_path, test, max_bytes=MIB)
    run(tmp_path, look, max_bytes=MIB)


def test_too_large_a_value_is_not_kept(tmp_path: Path) -> None:
    async def test(cache: ResponseCache) -> None:
        await cache.put("k", bytes(MIB // 64 + 1))
        assert await cache.get("k") is None
        await cache.put("k", bytes(MIB // 64))
        assert await cache.get("k") == bytes(MIB // 64)

    run(tmp_path, test, max_bytes=MIB)


def test_values_age(tmp_path: Path) -> None:
    async def write(cache: ResponseCache) -> None:
        await cache.put("k", b"answer")
        assert await cache.get("k") == b"answer"
        await asyncio.sleep(0.6)
        assert await cache.get("k") is None
        await cache.put("new", b"answer")

    async def young(cache: ResponseCache) -> None:
        assert await cache.get("k") is None
        assert await cache.get("new") == b"answer"

    async def old(cache: ResponseCache) -> None:
        assert await cache.get("new") is None

    run(tmp_path, write, max_age=0.5)
    run(tmp_path, young, max_age=0.5)
    # A shorter limit counts for what was kept under a longer one.
    time.sleep(0.1)
    run(tmp_path, old, max_age=0.05)


_WRITER = """
import asyncio, sys
from runtimes.responses import open_cache
async def main():
    cache = open_cache(sys.argv[1], max_bytes=1 << 28)
    index = 0
    while True:
        await cache.put(f"key {index}", index.to_bytes(4, "little") * 50_000)
        print(index, flush=True)
        index += 1
asyncio.run(main())
"""


@pytest.mark.parametrize("after", [3, 17, 40])
def test_killed_in_the_middle_of_writing(tmp_path: Path, after: int) -> None:
    command = [sys.executable, "-c", _WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment(), text=True) as child:
        assert child.stdout is not None
        last = -1
        for line in child.stdout:
            last = int(line)
            if last == after:
                # The next value of 200 kB is being written now.
                time.sleep(0.0005)
                child.send_signal(signal.SIGKILL)
    assert last >= after

    async def read(cache: ResponseCache) -> None:
        for index in range(last + 1):
            assert await cache.get(f"key {index}") == index.to_bytes(4, "little") * 50_000
        half = await cache.get(f"key {last + 1}")
        assert half in {None, (last + 1).to_bytes(4, "little") * 50_000}
        await cache.put("after", b"the crash")
        assert cache.stats().errors == 0

    run(tmp_path, read, max_bytes=1 << 28)
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".val"]


@pytest.mark.parametrize("content", [b"this is no database" * 1000, b"SQLite format 3\0" + os.urandom(8000)])
def test_a_file_that_is_no_database(tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "cache.db").write_bytes(content)

    async def test(cache: ResponseCache) -> None:
        async def make() -> bytes:
            return b"answer"

        for index in range(4):
            assert await cache.single(f"k{index}", make) == (b"answer", False)
        # What this process computed it still has in memory.
        assert await cache.single("k0", make) == (b"answer", True)
        stats = cache.stats()
        assert stats.errors >= 1
        assert not stats.working

    with caplog.at_level(logging.WARNING):
        run(tmp_path, test)
    assert [record.name for record in caplog.records] == ["hasten.responses"]
    assert str(tmp_path) in caplog.text
    assert (tmp_path / "cache.db").read_bytes() == content


def test_damaged_bytes_are_no_answer(tmp_path: Path) -> None:
    async def write(cache: ResponseCache) -> None:
        await cache.put("k", b"answer" * 100)

    run(tmp_path, write)
    with sqlite3.connect(tmp_path / "cache.db") as database:
        ((value,),) = database.execute("SELECT value FROM Cache WHERE key = 'k'").fetchall()
        broken = bytearray(value)
        broken[100] ^= 1
        database.execute("UPDATE Cache SET value = ? WHERE key = 'k'", (bytes(broken),))
    database.close()

    async def read(cache: ResponseCache) -> None:
        assert await cache.get("k") is None
        assert cache.stats().errors == 1
        assert cache.stats().working

    run(tmp_path, read)


class _Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.target),)


def test_nothing_is_unpickled_and_no_other_file_is_touched(tmp_path: Path) -> None:
    """Someone who can write the database can plant answers, and no more."""
    folder, secret, bomb = tmp_path / "cache", tmp_path / "secret", tmp_path / "bomb"
    secret.write_bytes(b"secret")

    async def write(cache: ResponseCache) -> None:
        for key in ("pickle", "file", "fine"):
            await cache.put(key, b"answer")

    run(folder, write, max_bytes=MIB)
    with sqlite3.connect(folder / "cache.db") as database:
        pickled = pickle.dumps(_Bomb(bomb))
        database.execute("UPDATE Cache SET mode = 4, value = ? WHERE key = 'pickle'", (pickled,))
        database.execute("UPDATE Cache SET mode = 2, value = NULL, filename = '../secret' WHERE key = 'file'")
        # Under a key of bytes, which diskcache would unpickle where it walks over the keys.
        insert = (
            "INSERT INTO Cache (key, raw, store_time, access_time, mode, filename, value) VALUES (?, 0, 0, 0, 4, ?, ?)"
        )
        database.execute(insert, (pickled, "../secret", pickled))
    database.close()

    async def read(cache: ResponseCache) -> None:
        assert await cache.get("pickle") is None
        assert await cache.get("file") is None
        assert await cache.get("fine") == b"answer"
        for index in range(150):
            await cache.put(f"key {index}", bytes(10_000))

    run(folder, read, max_bytes=MIB)
    assert secret.read_bytes() == b"secret"
    assert not bomb.exists()


_FULL = """
import asyncio, logging, os, resource, sys
from runtimes.responses import open_cache
logging.basicConfig(level=logging.INFO, format="%(name)s %(message)s")
async def main():
    cache = open_cache(sys.argv[1], max_bytes=1 << 26)
    async def make():
        return os.urandom(200_000)
    await cache.single("first", make)
    await asyncio.sleep(0.3)
    # As on a full disk: files do not grow any more. There is room for the probe, and not for a value.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    for index in range(20):
        value, cached = await cache.single(f"key {index}", make)
        assert len(value) == 200_000 and not cached
        await asyncio.sleep(0.05)
    assert cache.stats().errors >= 1, cache.stats()
    assert (await cache.single("first", make))[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    while not cache.stats().working:
        await asyncio.sleep(0.05)
    await cache.put("later", os.urandom(200_000))
    await cache.close()
asyncio.run(main())
"""


def test_a_full_disk(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", _FULL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=60)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("hasten.responses")]
    assert len(lines) == 2, done.stderr
    assert "requests are served without it" in lines[0]
    assert "is back" in lines[1]

    async def look(cache: ResponseCache) -> None:
        assert await cache.get("first") is not None
        assert await cache.get("later") is not None

    run(tmp_path, look)


def test_two_processes_share_a_folder(tmp_path: Path) -> None:
    code = """
import asyncio, sys
from runtimes.responses import open_cache
async def main():
    cache = open_cache(sys.argv[1])
    for index in range(100):
        await cache.put(f"{sys.argv[2]} {index}", b"x" * 5000)
    assert cache.stats().errors == 0, cache.stats()
    await cache.close()
asyncio.run(main())
"""
    children = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name], env=environment()) for name in "ab"]
    assert [child.wait(60) for child in children] == [0, 0]

    async def look(cache: ResponseCache) -> None:
        assert [await cache.get(f"{name} {index}") for name in "ab" for index in range(100)] == [b"x" * 5000] * 200
        assert cache.stats().entries == 200

    run(tmp_path, look)


def test_what_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="is a file, and a cache is a folder"):
        open_cache(tmp_path / "file")
    with pytest.raises(UsageError, match="no cache at memcached://"):
        open_cache("memcached://localhost")
    with pytest.raises(UsageError, match="too small"):
        open_cache(tmp_path, max_bytes=1000)
    for age in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match="max_age"):
            open_cache(tmp_path, max_age=age)


def test_without_diskcache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from runtimes.responses import disk

    monkeypatch.setitem(sys.modules, "diskcache", None)
    disk._disk.cache_clear()
    try:
        with pytest.raises(InstallationError, match=r"diskcache is not installed. pip install 'hasten\[serve\]'"):
            open_cache(tmp_path)
    finally:
        disk._disk.cache_clear()
