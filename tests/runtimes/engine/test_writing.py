from __future__ import annotations

import asyncio
import os
import signal

import numpy as np
import pytest

from artifacts.errors import DataError, DeadlineError, HastenError, UsageError, WorkerError
from runtimes.engine.calls import Call
from runtimes.engine.streams import Writing
from runtimes.load import load


@pytest.fixture(scope="module")
def model(decoder_bundle):
    with load(decoder_bundle.path, cache=False) as loaded:
        yield loaded


OPTIONS = [
    {"max_new_tokens": 12},
    {"max_new_tokens": 12, "temperature": 0.9, "seed": 7},
    {"max_new_tokens": 8, "temperature": 1.0, "seed": 1, "n": 3},
    {"max_new_tokens": 12, "logprobs": 2, "bias": {3: -1.0}, "stop_ids": {5}, "stop": ["q", "z"]},
    {"max_new_tokens": 6, "beams": 3},
    {"max_new_tokens": 6, "beams": 3, "n": 2},
    {"max_new_tokens": 5, "parse_special": True, "repetition_penalty": 1.2},
]
PROMPTS = ["hello", [3, 4, 5], ["hello", "a longer one than that", "x"], []]


@pytest.mark.parametrize("options", OPTIONS, ids="-".join)
def test_texts_are_those_of_a_loaded_bundle(decoder_bundle, model, serve, options):
    async def work(engine):
        return [await engine.generate(prompt, **options) for prompt in PROMPTS]

    assert serve(decoder_bundle, work) == [model.generate(prompt, **options) for prompt in PROMPTS]


def test_many_texts_at_once_are_those_of_each_alone(decoder_bundle, model, serve):
    async def work(engine):
        asked = (engine.generate(f"text {n}", max_new_tokens=5 + n % 20) for n in range(60))
        return await asyncio.gather(*asked), engine.stats()

    found, stats = serve(decoder_bundle, work, slots=4)
    assert found == [model.generate(f"text {n}", max_new_tokens=5 + n % 20) for n in range(60)]
    assert stats.done == 60
    assert stats.tokens_out == sum(len(text.tokens) for text in found)


def test_two_workers_share_the_texts(decoder_bundle, model, serve):
    async def work(engine):
        found = await asyncio.gather(*(engine.generate(f"text {n}", max_new_tokens=30) for n in range(40)))
        return found, engine.stats()

    found, stats = serve(decoder_bundle, work, slots=4, workers=2, threads=1)
    assert found == [model.generate(f"text {n}", max_new_tokens=30) for n in range(40)]
    assert len(stats.workers) == 2


def test_pieces_add_up_to_the_text(decoder_bundle, model, serve):
    async def work(engine):
        alone = [piece async for piece in engine.stream("hello", max_new_tokens=20)]
        many = [
            piece async for piece in engine.stream(["hello", "you"], max_new_tokens=20, temperature=1.0, seed=3, n=2)
        ]
        return alone, many

    alone, many = serve(decoder_bundle, work)
    assert "".join(piece.text for piece in alone) == alone[-1].result.text
    assert alone[-1].result == model.generate("hello", max_new_tokens=20)
    wanted = model.generate(["hello", "you"], max_new_tokens=20, temperature=1.0, seed=3, n=2)
    for prompt in range(2):
        for index in range(2):
            mine = [piece for piece in many if (piece.prompt, piece.index) == (prompt, index)]
            assert mine[-1].result == wanted[prompt][index]
            assert "".join(piece.text for piece in mine) == mine[-1].result.text


def test_a_stream_that_is_closed_ends_the_work(decoder_bundle, serve):
    async def work(engine):
        source = engine.stream("hello", max_new_tokens=120)
        async for _ in source:
            break
        await source.aclose()
        for _ in range(500):
            if not engine._live.crew.hosts[0].texts:
                break
            await asyncio.sleep(0.01)
        return engine._live.crew.hosts[0].texts, engine.stats(), await engine.generate("hello", max_new_tokens=3)

    texts, stats, after = serve(decoder_bundle, work)
    assert texts == 0
    assert (stats.cancelled, stats.done, stats.outstanding) == (1, 0, 0)
    assert len(after.tokens) == 3


def test_a_cancelled_text_frees_its_slot(decoder_bundle, serve):
    async def work(engine):
        asked = [asyncio.create_task(engine.generate(f"text {n}", max_new_tokens=120)) for n in range(30)]
        await asyncio.sleep(0.05)
        for one in asked:
            one.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        return await engine.generate("hello", max_new_tokens=3), engine.stats()

    found, stats = serve(decoder_bundle, work, slots=2)
    assert len(found.tokens) == 3
    assert stats.queue_requests == 0


WRONG = [
    *[("", {}), ("a", {"temperature": -1.0}), ("a", {"nonsense": 1}), ("a", {"cache": 1}), ("a", {"n": 0})],
    *[([{"content": "x"}], {}), ([10**6], {}), (3, {}), (b"x", {}), ("a" * 500, {}), ("a", {"seconds": "x"})],
    *[("a", {"stop": {1, 2}}), ("a", {"bias": {"x": 1}}), ("a", {"seed": "s"}), (["a", ""], {})],
    *[("a", {"template_variables": {"x": object()}}), ("a", {"max_new_tokens": 0}), ([["a"], 3], {})],
]


def test_what_makes_no_sense_is_refused_and_the_others_go_on(decoder_bundle, serve):
    async def work(engine):
        other = asyncio.create_task(engine.generate("hello", max_new_tokens=100))
        for prompt, options in WRONG:
            try:
                await engine.generate(prompt, **options)
            except UsageError:
                continue
            raise AssertionError((prompt, options))
        return await other, engine.stats()

    text, stats = serve(decoder_bundle, work)
    assert len(text.tokens) == 100
    assert stats.restarts == 0


BAD = [
    ("x", {"temperature": -1.0}),
    ("x", {"temperature": np.float32(1000.0)}),
    ("x", {"max_new_token": 3}),
    ("x", {"n": 3}),
    ("x", {"beams": 2, "stop": ["a"]}),
    ("x", {"bias": {1 << 20: 1.0}}),
    ("x", {"stop_ids": [1 << 20]}),
    ("x", {"schema": {}, "regex": "a"}),
    ("x", {"regex": "a" * 9000}),
    ("x", {"adapter": "none"}),
    ("", {}),
    (np.array([1 << 20]), {}),
    ([3] * 4096, {}),
]


def test_what_makes_no_sense_is_refused_before_it_waits(decoder_bundle, model, serve):
    """A worker that is stopped says nothing: what is refused here, the parent refuses; in the worker's words."""

    async def work(engine):
        os.kill(engine.stats().workers[0].pid, signal.SIGSTOP)
        try:
            for prompt, options in BAD:
                with pytest.raises(UsageError) as early:
                    await asyncio.wait_for(engine.generate(prompt, **options), 10.0)
                with pytest.raises(UsageError) as late:
                    model.generate(prompt, **options)
                assert str(early.value) == str(late.value)
            with pytest.raises(UsageError):
                await anext(engine.stream("x", top_p=2.0))
            return engine.stats().accepted
        finally:
            os.kill(engine.stats().workers[0].pid, signal.SIGCONT)

    assert serve(decoder_bundle, work) == 0


def test_numbers_of_numpy_are_options(decoder_bundle, model, serve):
    options = {"max_new_tokens": np.int64(5), "temperature": np.float32(0.5), "bias": {np.int64(3): np.float32(-1.0)}}

    async def work(engine):
        return await engine.generate("hello", seed=np.int64(4), stop_ids=np.array([5]), **options)

    plain = {"max_new_tokens": 5, "temperature": 0.5, "bias": {3: -1.0}, "seed": 4, "stop_ids": [5]}
    assert serve(decoder_bundle, work) == model.generate("hello", **plain)


def test_beams_do_not_stream_and_encoders_do_not_write(decoder_bundle, sentences, serve):
    async def stream(engine):
        with pytest.raises(UsageError, match="cannot stream"):
            async for _ in engine.stream("a", beams=2):
                pass

    async def write(engine):
        with pytest.raises(UsageError, match=r"no \.generate"):
            await engine.generate("a")

    serve(decoder_bundle, stream)
    serve(sentences, write)


def test_records_are_answered_as_hasten_run_does(decoder_bundle, model, serve):
    records = ["hi", {"prompt": "x", "max_new_tokens": 3, "n": 2, "temperature": 1.0, "seed": 4}, {"text": "y"}]

    async def work(engine):
        with pytest.raises(DataError):
            await engine.rows([{"nothing": 1}])
        return await engine.rows(records), [row async for row in engine.map({"id": n, "text": "a"} for n in range(40))]

    rows, mapped = serve(decoder_bundle, work)
    assert rows == model.rows(records)
    assert [row["id"] for row in mapped] == list(range(40))


def test_a_deadline_ends_a_text(decoder_bundle, serve):
    async def work(engine):
        asked = [asyncio.create_task(engine.generate(f"a{n}", max_new_tokens=120)) for n in range(50)]
        with pytest.raises(DeadlineError):
            await engine.generate("late", max_new_tokens=120, call=Call(timeout=0.02))
        await asyncio.gather(*asked)
        return engine.stats()

    stats = serve(decoder_bundle, work, slots=2)
    assert stats.deadline_missed == 1


def test_plain_tensors_run_beside_texts(decoder_bundle, model, serve):
    feeds = {}
    for spec in model.bundle.manifest.inputs:
        shape = tuple(size if isinstance(size, int) else 1 for size in spec.shape)
        feeds[spec.name] = np.zeros(shape, spec.dtype)

    async def work(engine):
        asked = [engine.generate("hello", max_new_tokens=20), engine.run(feeds)]
        return await asyncio.gather(*asked, return_exceptions=True)

    text, outputs = serve(decoder_bundle, work)
    assert len(text.tokens) == 20
    assert isinstance(outputs, dict | HastenError)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 50}], ids=["greedy", "drawn"])
def test_a_worker_that_dies_in_the_middle_of_a_text_is_replaced_and_nothing_is_said_twice(
    decoder_bundle, serve, options
):
    async def work(engine):
        pieces = []
        async for piece in engine.stream("hello", max_new_tokens=120, **options):
            pieces.append(piece)
            if len(pieces) == 5:
                os.kill(engine.stats().workers[0].pid, signal.SIGKILL)
        return pieces, engine.stats()

    pieces, stats = serve(decoder_bundle, work, slots=2)
    assert "".join(piece.text for piece in pieces) == pieces[-1].result.text
    assert sum(piece.result is not None for piece in pieces) == 1
    assert (stats.done, stats.failed) == (1, 0)
    assert stats.restarts == 1


def test_a_text_whose_workers_keep_dying_fails(decoder_bundle, serve):
    async def work(engine):
        async def kill():
            async for piece in engine.stream("hello", max_new_tokens=120):
                if piece.result is None and engine.stats().workers[0].pid:
                    os.kill(engine.stats().workers[0].pid, signal.SIGKILL)

        with pytest.raises(WorkerError, match="so did the one before it"):
            await kill()
        return await engine.generate("hello", max_new_tokens=3)

    assert len(serve(decoder_bundle, work).tokens) == 3


def test_what_a_second_worker_says_differently_is_not_said():
    loop = asyncio.new_event_loop()
    call = Call()
    writing = Writing(1, "generate", call, 0.0, 10, 1.0, loop.create_future())
    writing.begin_again()
    assert writing.push(0, "hel", None)
    writing.begin_again()
    assert writing.push(0, "h", None)
    assert writing.push(0, "ello", None)
    assert [piece.text for piece in writing.pieces] == ["hel", "lo"]
    writing.begin_again()
    assert writing.push(0, "he", None)
    assert not writing.push(0, "y", None)
    loop.close()


def test_prompts_that_begin_alike_are_read_once(decoder_bundle, serve):
    prompt = "the same beginning of quite some length, " * 2

    async def work(engine):
        for n in range(3):
            await engine.generate(prompt + str(n), max_new_tokens=3)
        return engine.stats().workers[0]

    worker = serve(decoder_bundle, work)
    assert worker.prefix_hits >= 1
    assert worker.tokens_saved > 0


def test_the_tokens_of_a_prompt(decoder_bundle, model, serve):
    async def work(engine):
        with pytest.raises(UsageError):
            await engine.count_tokens("")
        return await engine.encode_prompt("hello"), await engine.count_tokens([1, 2, 3])

    ids, count = serve(decoder_bundle, work)
    assert ids == model.encoder.encode("hello")
    assert count == 3


def test_a_draft_guesses_and_the_texts_stay_the_same(decoder_bundle, sentences, model, serve):
    async def work(engine):
        return [await engine.generate(f"hello {n}", max_new_tokens=30) for n in range(3)]

    async def nothing(engine):
        raise AssertionError

    wanted = [model.generate(f"hello {n}", max_new_tokens=30) for n in range(3)]
    assert serve(decoder_bundle, work, draft=decoder_bundle.path) == wanted
    with pytest.raises(UsageError, match="a draft is a language model"):
        serve(sentences, nothing, draft=decoder_bundle.path)
