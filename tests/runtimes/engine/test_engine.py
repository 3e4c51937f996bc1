from __future__ import annotations

import asyncio
import tracemalloc

import numpy as np
import pytest
from task_graphs import classifier, write_bundle

from artifacts.errors import DataError, UsageError, WorkerError
from runtimes.engine.calls import Call, EngineOptions, Place
from runtimes.engine.engine import Engine
from runtimes.load import load

TEXTS = [f"sentence {n} " * (1 + n % 9) for n in range(200)]
CLOSE = {"rtol": 0, "atol": 0.02}
"""Dynamic int8 takes its scales from the whole batch, so vectors depend on the company; see `Embedder.embed`."""


def test_vectors_of_a_compiled_bundle_are_those_of_a_loaded_one(encoder_bundle, serve):
    async def work(engine):
        return await engine.embed(TEXTS), await engine.ask("embed", TEXTS[:1]), await engine.embed([])

    many, one, none = serve(encoder_bundle, work)
    with load(encoder_bundle.path) as model:
        np.testing.assert_allclose(many, model.embed(TEXTS), **CLOSE)
        np.testing.assert_allclose(one.arrays["embedding"], model.embed(TEXTS[:1]), rtol=0, atol=1e-6)
        assert one.tokens == len(model.encoder.encode(TEXTS[:1])[0])
        assert none.shape == model.embed([]).shape
    assert many.dtype == np.float32
    assert many.flags.c_contiguous


def test_tokens_are_counted_for_each_request_by_itself(sentences, serve):
    texts = ["a", "b c d e f", "b c d e f", "a \ud800"]

    async def work(engine):
        return await asyncio.gather(*(engine.ask("embed", [text]) for text in texts)), await engine.ask("embed", texts)

    each, together = serve(sentences, work)
    with load(sentences.path) as model:
        clean = [text.replace("\ud800", "\ufffd") for text in texts]
        wanted = [len(row) for row in model.encoder.encode(clean)]
    assert [answer.tokens for answer in each] == wanted
    assert together.tokens == sum(wanted)


def test_rows_and_plain_tensors_are_those_of_a_loaded_bundle(sentences, serve):
    feeds = {name: np.ones((2, 5), np.int64) for name in ("input_ids", "attention_mask")}

    async def work(engine):
        fed = {spec.name: feeds.get(spec.name, np.zeros((2, 5), np.int64)) for spec in engine.bundle.manifest.inputs}
        return await engine.rows(["a", {"text": "b"}]), fed, await engine.run(fed), await engine.rows([])

    rows, fed, outputs, none = serve(sentences, work)
    with load(sentences.path) as model:
        for found, wanted in zip(rows, model.rows(["a", "b"]), strict=True):
            np.testing.assert_allclose(found["embedding"], wanted["embedding"], **CLOSE)
        for name, wanted in model.run(fed).items():
            np.testing.assert_array_equal(outputs[name], wanted)
    assert none == []


def test_bad_input_fails_alone(sentences, serve):
    async def work(engine):
        asked = [
            *(engine.rows(["good"]), engine.rows([{"txt": 1}]), engine.rows([3]), engine.rows([{"text": {1, 2}}])),
            *(engine.embed("text"), engine.embed([1]), engine.rows({"text": "a"}), engine.run({"input_ids": [1.5]})),
            *(engine.run([1]), engine.classify(["a"]), engine.generate("a"), engine.rows(["good too"])),
            engine.run({"input_ids": np.array([object()])}),
        ]
        return await asyncio.gather(*asked, return_exceptions=True)

    found = serve(sentences, work)
    assert len(found[0]) == len(found[11]) == 1
    assert isinstance(found[1], DataError)
    assert "txt" in str(found[1])
    assert isinstance(found[2], DataError)
    for index in (3, 4, 5, 6, 7, 8, 9, 10, 12):
        assert isinstance(found[index], UsageError), (index, found[index])


def test_a_stream_of_texts_comes_in_order_and_is_read_no_further_than_needed(sentences, serve):
    read = []

    def texts():
        for index in range(100_000):
            read.append(index)
            yield f"text {index}"

    async def work(engine):
        found = []
        source = engine.embed_iter(texts())
        async for vector in source:
            found.append(vector)
            if len(found) == 600:
                break
        await source.aclose()
        return found, await engine.embed([f"text {index}" for index in range(600)])

    found, wanted = serve(sentences, work)
    np.testing.assert_allclose(np.stack(found), wanted, **CLOSE)
    assert len(read) < 6000


def test_map_keeps_the_order_and_the_ids_and_reads_what_is_asynchronous(sentences, serve):
    async def records():
        for index in range(700):
            yield {"id": index, "text": f"text {index} " * (index % 5)}

    async def work(engine):
        return [row async for row in engine.map(records())]

    found = serve(sentences, work)
    assert [row["id"] for row in found] == list(range(700))
    assert all(len(row["embedding"]) == len(found[0]["embedding"]) for row in found)


def test_map_needs_no_more_memory_for_a_longer_stream(sentences, serve):
    async def peak(engine, count):
        tracemalloc.reset_peak()
        seen = 0
        async for _ in engine.map(f"text {index}" for index in range(count)):
            seen += 1
        assert seen == count
        return tracemalloc.get_traced_memory()[1]

    async def work(engine):
        tracemalloc.start()
        try:
            await peak(engine, 2000)
            return await peak(engine, 2000), await peak(engine, 8000)
        finally:
            tracemalloc.stop()

    short, long = serve(sentences, work)
    assert long < 1.3 * short


def test_map_waits_where_the_queue_is_full(sentences, serve):
    async def work(engine):
        return [row async for row in engine.map(f"text {index}" for index in range(1500))], engine.stats()

    rows, stats = serve(sentences, work, queue_requests=1)
    assert len(rows) == 1500
    assert stats.failed == 0


def test_a_stream_that_is_no_stream_is_refused(sentences, serve):
    async def work(engine):
        for bad in ("text", 3):
            with pytest.raises(UsageError):
                async for _ in engine.map(bad):
                    pass
        with pytest.raises(UsageError, match="element 1 is int"):
            async for _ in engine.embed_iter(["a", 3]):
                pass

    serve(sentences, work)


def test_many_callers_share_batches(sentences, serve):
    async def work(engine):
        found = await asyncio.gather(*(engine.embed([text]) for text in TEXTS))
        return np.concatenate(found), engine.stats()

    found, stats = serve(sentences, work)
    with load(sentences.path) as model:
        np.testing.assert_allclose(found, model.embed(TEXTS), **CLOSE)
    assert stats.batches < len(TEXTS) / 4
    assert (stats.accepted, stats.done, stats.queue_requests, stats.outstanding) == (200, 200, 0, 0)
    assert sum(stats.total_seconds.counts) == sum(stats.queue_seconds.counts) == 200


def test_a_large_request_runs_on_all_workers(sentences, serve):
    async def work(engine):
        found = await engine.embed(TEXTS * 5)
        return found, engine.stats(), [len(host.speeds["embed"].__dict__) for host in engine._live.crew.hosts]

    found, stats, _ = serve(sentences, work, workers=2, threads=1)
    with load(sentences.path) as model:
        np.testing.assert_allclose(found, model.embed(TEXTS * 5), **CLOSE)
    assert len({worker.pid for worker in stats.workers}) == 2
    assert stats.accepted == 1
    assert stats.batches > 2


def test_workers_of_two_kinds_serve_together(sentences):
    variants = [variant.id for variant in sentences.manifest.variants]
    places = tuple(Place(provider="cpu", variant=variant, workers=1, threads=1) for variant in variants)

    async def work():
        async with Engine(sentences.path, options=EngineOptions(places=places)) as engine:
            await asyncio.gather(*(engine.embed(TEXTS) for _ in range(10)))
            return engine.stats(), engine.explain()

    stats, told = asyncio.run(work())
    assert {worker.variant for worker in stats.workers} == set(variants)
    assert all(variant in told for variant in variants)


def test_a_classifier_gives_classes(tmp_path, serve):
    bundle = write_bundle(tmp_path / "b", "text-classification", classifier())
    items = ["a", ("a", "b")]

    async def work(engine):
        with pytest.raises(UsageError, match="text-classification model"):
            await engine.embed(["a"])
        return await engine.classify(items)

    with load(bundle.path) as model:
        assert serve(bundle, work) == model.classify(items)


def test_stats_are_numbers_that_json_takes(sentences, serve):
    import json

    async def work(engine):
        await engine.embed(["a"])
        return engine.stats()

    stats = serve(sentences, work)
    told = json.loads(json.dumps(stats.to_dict()))
    (worker,) = told["workers"]
    assert worker["state"] == "ready"
    assert worker["pid"] > 0
    assert worker["rss"] > 1 << 20
    assert worker["throughput"] > 0
    assert worker["provider"] == "CPUExecutionProvider"
    assert told["tokens_in"] > 0


def test_an_engine_lives_once(sentences):
    async def work():
        engine = Engine(sentences.path, options=EngineOptions(workers=1))
        await engine.start()
        assert engine.ready
        with pytest.raises(UsageError, match="started before"):
            await engine.start()
        await engine.close()
        await engine.close()
        assert not engine.ready
        with pytest.raises(WorkerError, match="closed"):
            await engine.embed(["a"])
        assert [worker.state for worker in engine.stats().workers] == ["closed"]

    asyncio.run(work())


def test_tokens_of_a_text(sentences, serve):
    async def work(engine):
        return await engine.encode_prompt("a sentence"), await engine.count_tokens("a sentence")

    ids, count = serve(sentences, work)
    with load(sentences.path) as model:
        assert list(ids) == model.encoder.encode(["a sentence"])[0].ids.tolist()
    assert count == len(ids)


def test_calls_have_a_priority_and_a_timeout(sentences, serve):
    async def work(engine):
        return await engine.embed(["a"], call=Call(priority=3, timeout=30.0))

    assert serve(sentences, work).shape[0] == 1
