from __future__ import annotations

import asyncio

import numpy as np
import pytest

from artifacts.errors import UsageError
from runtimes.responses.opening import open_cache


def with_cache(serve, bundle, folder, work):
    async def inside(engine):
        try:
            return await work(engine)
        finally:
            await engine.cache.close()

    return serve(bundle, inside, responses=open_cache(str(folder / "answers")))


def test_an_answer_is_computed_once(sentences, serve, tmp_path):
    async def work(engine):
        first = await engine.ask("embed", ["a text", "another"])
        again = await engine.ask("embed", ["a text", "another"])
        rows = [await engine.ask("rows", ["a text"]) for _ in range(2)]
        feeds = {spec.name: np.ones((1, 3), np.int64) for spec in engine.bundle.manifest.inputs}
        runs = [await engine.ask("run", feeds) for _ in range(2)]
        return first, again, rows, runs, engine.stats()

    first, again, rows, runs, stats = with_cache(serve, sentences, tmp_path, work)
    assert (first.cached, again.cached) == (False, True)
    assert again.tokens == first.tokens
    np.testing.assert_array_equal(first.arrays["embedding"], again.arrays["embedding"])
    assert again.arrays["embedding"].flags.writeable
    assert rows[0].rows == rows[1].rows
    assert [one.cached for one in runs] == [False, True]
    for name, array in runs[0].arrays.items():
        np.testing.assert_array_equal(array, runs[1].arrays[name])
    assert (stats.cache_hits, stats.cache_misses, stats.batches) == (3, 3, 3)


def test_equal_requests_at_once_are_computed_once(slow, serve, tmp_path):
    async def work(engine):
        found = await asyncio.gather(*(engine.ask("embed", ["a text"]) for _ in range(20)))
        return found, engine.stats()

    found, stats = with_cache(serve, slow, tmp_path, work)
    assert sum(not answer.cached for answer in found) == 1
    assert stats.accepted == 1


def test_errors_are_not_kept(sentences, serve, tmp_path):
    async def work(engine):
        for _ in range(2):
            with pytest.raises(UsageError):
                await engine.run({"nothing": np.zeros(1)})
        return engine.stats()

    assert with_cache(serve, sentences, tmp_path, work).failed == 2


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, True),
        ({"temperature": 0.0}, True),
        ({"temperature": 1.0, "seed": 3}, True),
        ({"temperature": 1.0, "seed": 3, "n": 2}, True),
        ({"beams": 2}, True),
        ({"temperature": 1.0}, False),
        ({"seconds": 30.0}, False),
    ],
)
def test_texts_that_would_be_the_same_are_kept(decoder_bundle, serve, tmp_path, options, kept):
    async def work(engine):
        made = [await engine.generate("hello", max_new_tokens=6, **options) for _ in range(2)]
        return made, engine.stats()

    made, stats = with_cache(serve, decoder_bundle, tmp_path, work)
    if kept:
        assert made[0] == made[1]
    assert stats.accepted == (1 if kept else 2)
    assert stats.cache_hits == int(kept)


def test_a_stream_is_kept_and_told_in_one_piece(decoder_bundle, serve, tmp_path):
    async def work(engine):
        first = [piece async for piece in engine.stream(["hello", "you"], max_new_tokens=6)]
        again = [piece async for piece in engine.stream(["hello", "you"], max_new_tokens=6)]
        return first, again, await engine.generate("you", max_new_tokens=6), engine.stats()

    first, again, text, stats = with_cache(serve, decoder_bundle, tmp_path, work)
    wanted = {piece.prompt: piece.result for piece in first if piece.result is not None}
    assert [(piece.prompt, piece.text, piece.result) for piece in again] == [
        (prompt, wanted[prompt].text, wanted[prompt]) for prompt in (0, 1)
    ]
    assert text == wanted[1]
    assert stats.accepted == 2
