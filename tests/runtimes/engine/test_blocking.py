from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

import hasten
from artifacts.errors import BundleError, UsageError
from runtimes.load import load


def test_everything_without_await(sentences):
    with hasten.serve_engine(sentences.path, workers=1) as engine, load(sentences.path) as model:
        assert engine.ready
        assert engine.bundle.digest == sentences.digest
        wanted = model.embed(["a", "b"])
        np.testing.assert_allclose(engine.embed(["a", "b"]), wanted, atol=1e-6)
        np.testing.assert_allclose(engine.ask("embed", ["a"]).arrays["embedding"], wanted[:1], atol=1e-6)
        np.testing.assert_allclose(np.stack(list(engine.embed_iter(iter(["a", "b"])))), wanted, atol=1e-6)
        assert len(engine.rows(["a"])) == 1
        assert [row["id"] for row in engine.map({"id": n, "text": "a"} for n in range(3))] == [0, 1, 2]
        assert engine.count_tokens("a") == len(engine.encode_prompt("a"))
        assert engine.stats().done > 0
        assert "one" in engine.explain() or "two" in engine.explain()
        with pytest.raises(UsageError):
            engine.embed("a")
        with pytest.raises(UsageError):
            engine.generate("a")
        with pytest.raises(UsageError):
            engine.classify(["a"])
        with pytest.raises(UsageError):
            engine.run({})
    with pytest.raises(UsageError, match="not running"):
        engine.embed(["a"])
    assert "hasten-engine" not in [thread.name for thread in threading.enumerate()]


def test_many_threads_share_batches(slow):
    with hasten.serve_engine(slow.path, workers=1) as engine:
        with ThreadPoolExecutor(16) as threads:
            found = list(threads.map(lambda n: engine.embed([f"text {n}"]).shape, range(64)))
        stats = engine.stats()
    assert found == [found[0]] * 64
    assert stats.batches < 64


def test_texts_are_streamed_and_an_abandoned_stream_ends(decoder_bundle):
    with hasten.serve_engine(decoder_bundle.path, workers=1) as engine:
        pieces = list(engine.stream("hello", max_new_tokens=10))
        assert "".join(piece.text for piece in pieces) == engine.generate("hello", max_new_tokens=10).text
        source = engine.stream("hello", max_new_tokens=100)
        next(source)
        source.close()
        assert engine.stats().cancelled == 1


def test_a_bundle_that_does_not_open_leaves_no_thread(tmp_path):
    with pytest.raises(BundleError), hasten.serve_engine(tmp_path):
        pass
    assert "hasten-engine" not in [thread.name for thread in threading.enumerate()]
