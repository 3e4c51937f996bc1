from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from real_command import environment

from artifacts.errors import BundleError, HastenError, UsageError, WorkerError
from runtimes.engine.calls import Call, EngineOptions
from runtimes.engine.engine import Engine

TEXTS = [f"sentence {n} " * (1 + n % 9) for n in range(300)]


def pids(engine):
    return [worker.pid for worker in engine.stats().workers]


async def until(said, seconds=20.0):
    end = time.monotonic() + seconds
    while not said():
        assert time.monotonic() < end
        await asyncio.sleep(0.01)


def gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_worker_that_is_killed_is_replaced_and_loses_no_request(slow, serve):
    async def work(engine):
        wanted = await engine.embed(TEXTS)
        asked = [asyncio.create_task(engine.embed([text])) for text in TEXTS]
        await until(lambda: engine.stats().outstanding)
        (old,) = pids(engine)
        os.kill(old, signal.SIGKILL)
        found = np.concatenate(await asyncio.gather(*asked))
        return wanted, found, old, engine.stats()

    wanted, found, old, stats = serve(slow, work)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    (worker,) = stats.workers
    assert worker.pid not in (0, old)
    assert worker.restarts == stats.restarts == 1
    assert "SIGKILL" in worker.error
    assert stats.retried > 0
    assert (stats.failed, stats.done) == (0, 301)


def test_a_request_that_kills_two_workers_fails_and_those_beside_it_do_not(slow, serve):
    async def work(engine):
        asked = asyncio.create_task(engine.embed(TEXTS * 20))
        for _ in range(2):
            await until(lambda: engine.stats().outstanding and pids(engine)[0] and engine._live.crew.hosts[0].batches)
            os.kill(pids(engine)[0], signal.SIGKILL)
            await until(lambda: not engine._live.crew.hosts[0].batches)
        with pytest.raises(WorkerError, match=r"SIGKILL.*and so did the one before it"):
            await asked
        return await engine.embed(["still here"]), engine.stats()

    found, stats = serve(slow, work)
    assert len(found) == 1
    assert stats.failed == 1


def test_a_worker_that_hangs_is_replaced(sentences, serve):
    async def work(engine):
        (old,) = pids(engine)
        os.kill(old, signal.SIGSTOP)
        found = await engine.embed(["a text"])
        return found, old, engine.stats()

    found, old, stats = serve(sentences, work, hang_timeout=0.5)
    assert len(found) == 1
    assert gone(old)
    assert "no sign of life for 0.5 s" in stats.workers[0].error
    assert stats.retried == 1


def test_another_worker_takes_over_at_once(sentences, serve):
    async def work(engine):
        os.kill(pids(engine)[0], signal.SIGKILL)
        asked = await asyncio.gather(*(engine.embed([text]) for text in TEXTS))
        return len(asked), engine.stats()

    count, stats = serve(sentences, work, workers=2, threads=1)
    assert count == len(TEXTS)
    assert stats.failed == 0


def test_a_folder_that_is_no_bundle_does_not_start(tmp_path):
    async def work():
        async with Engine(tmp_path):
            pass

    with pytest.raises(BundleError):
        asyncio.run(work())


def test_what_the_workers_say_of_a_bundle_reaches_the_caller(sentences, tmp_path):
    async def work(path, **options):
        engine = Engine(path, options=EngineOptions(workers=1, **options))
        try:
            with pytest.raises(HastenError) as refused:
                await engine.start()
        finally:
            await engine.close()
        assert not engine.ready
        return refused.value

    assert isinstance(asyncio.run(work(sentences.path, variant="none")), UsageError)
    damaged = shutil.copytree(sentences.path, tmp_path / "damaged")
    for model in damaged.glob("*.onnx"):
        model.write_bytes(b"damage")
    error = asyncio.run(work(damaged, verify=False))
    assert "\n" not in str(error)
    assert error.what


def test_a_bundle_that_was_replaced_is_not_mixed_with_the_old_one(sentences, decoder_bundle, tmp_path):
    place = tmp_path / "bundle"
    shutil.copytree(sentences.path, place)

    async def work():
        async with Engine(place, options=EngineOptions(workers=1)) as engine:
            shutil.rmtree(place)
            shutil.copytree(decoder_bundle.path, place)
            os.kill(pids(engine)[0], signal.SIGKILL)
            with pytest.raises(WorkerError, match="holds another bundle now"):
                await engine.embed(["a"])
            assert not engine.ready
            with pytest.raises(WorkerError, match="no worker runs"):
                await engine.embed(["a"])
            shutil.rmtree(place)
            shutil.copytree(sentences.path, place)
            await until(lambda: engine.ready)
            return await engine.embed(["a"]), engine.stats()

    found, stats = asyncio.run(work())
    assert len(found) == 1
    assert stats.failed == 1


def test_idle_workers_end_and_come_back(sentences, serve):
    async def work(engine):
        (old,) = pids(engine)
        first = await engine.embed(["a"])
        await until(lambda: gone(old))
        stats = engine.stats()
        assert stats.workers[0].state == "idle"
        assert (stats.workers[0].pid, stats.workers[0].rss) == (0, 0)
        assert engine.ready
        again = await engine.embed(["a"])
        count = await engine.count_tokens("a")
        return first, again, count, engine.stats()

    first, again, count, stats = serve(sentences, work, idle_timeout=0.3)
    np.testing.assert_allclose(first, again, rtol=0, atol=1e-6)
    assert count > 0
    assert stats.restarts == 0


def test_a_worker_that_is_ended_while_it_computes_what_nobody_wants_comes_back_free(slow, serve):
    async def work(engine):
        asked = asyncio.create_task(engine.embed(TEXTS * 3))
        await until(lambda: engine._live.crew.hosts[0].batches)
        asked.cancel()
        await until(lambda: engine.stats().workers[0].state == "idle")
        return len(await engine.embed(["a"])), engine.stats()

    count, stats = serve(slow, work, idle_timeout=0.01)
    assert count == 1
    assert (stats.cancelled, stats.restarts, stats.workers[0].outstanding) == (1, 0, 0)


def test_no_worker_outlives_its_engine(sentences, serve):
    async def work(engine):
        return pids(engine)

    for pid in serve(sentences, work, workers=2, threads=1):
        assert gone(pid)


@pytest.mark.parametrize("stopped", [False, True])
def test_no_worker_outlives_a_killed_parent(sentences, stopped):
    code = f"""
import asyncio
from runtimes.engine.calls import EngineOptions
from runtimes.engine.engine import Engine
async def main():
    async with Engine({str(sentences.path)!r}, options=EngineOptions(workers=2, threads=1)) as engine:
        await engine.embed(["a"])
        print(*[worker.pid for worker in engine.stats().workers], flush=True)
        await asyncio.sleep(60)
asyncio.run(main())
"""
    root = str(Path(__file__).resolve().parents[3])
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment(PYTHONPATH=root), cwd=root
    )
    with parent:
        children = [int(word) for word in parent.stdout.readline().split()]
        assert len(children) == 2
        if stopped:
            os.kill(children[0], signal.SIGSTOP)
        parent.kill()
    end = time.monotonic() + 10.0
    while not all(gone(pid) for pid in children):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_signals_to_the_whole_group_leave_the_workers_to_the_parent(sentences, serve):
    async def work(engine):
        (pid,) = pids(engine)
        for one in (signal.SIGINT, signal.SIGTERM):
            os.kill(pid, one)
        await engine.embed(["a"])
        return pid, pids(engine)

    old, now = serve(sentences, work)
    assert now == [old]


def test_an_engine_whose_worker_is_stopped_closes_all_the_same(sentences):
    async def work():
        engine = Engine(sentences.path, options=EngineOptions(workers=1))
        await engine.start()
        (pid,) = pids(engine)
        os.kill(pid, signal.SIGSTOP)
        asked = asyncio.create_task(engine.embed(["a"], call=Call(timeout=50.0)))
        await asyncio.sleep(0.05)
        begin = time.monotonic()
        await engine.close(drain=0.2)
        with pytest.raises(WorkerError, match="closed"):
            await asked
        return pid, time.monotonic() - begin

    pid, seconds = asyncio.run(work())
    assert gone(pid)
    assert seconds < 10.0
