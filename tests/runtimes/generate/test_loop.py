"""Continuous batching: texts join and leave at any step, and none of them can tell."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest
from decoder_graphs import byte_level, tiny_llama, write_decoder

from artifacts.errors import ProviderError, UsageError
from runtimes.generate import loop as module
from runtimes.generate.cache import KVCache
from runtimes.generate.decoder import PREFILL_TOKENS, Decoder
from runtimes.generate.loop import Loop, Pace
from runtimes.generate.pace import Speed
from runtimes.generate.results import Generated
from runtimes.load import load

HASTY = Pace(pause=1e-9, share=1e-6)
"""Prompts are read in the smallest pieces while texts are written."""
NO_END = {2: -np.inf}


def ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(5, 300, count).tolist()


def add(loop: Loop, model: Any, prompt: list[int], number: int = 0, **options: Any) -> Any:
    (request,) = model.requests(prompt, first=number, **options)
    loop.add(request)
    return request


def finished(pieces: list[Any]) -> dict[tuple[int, int], Generated]:
    return {(piece.prompt, piece.index): piece.result for piece in pieces if piece.result is not None}


def drain(loop: Loop) -> dict[tuple[int, int], Generated]:
    pieces = []
    while loop.busy:
        pieces += loop.step()
    return finished(pieces)


@pytest.fixture(scope="module")
def roomy(tmp_path_factory):
    """A model of 1024 tokens of context."""
    folder = tmp_path_factory.mktemp("roomy")
    bundle = write_decoder(folder / "bundle", tiny_llama(context=1024), byte_level(folder / "tokenizer.json"))
    with load(bundle.path, cache=False) as model:
        yield model


# --- joining and leaving


def drawn_requests(rng: np.random.Generator) -> list[tuple[list[int], dict[str, Any]]]:
    """Prompts of 1 to 100 tokens, greedy or drawn, one text or several, ended by tokens, strings or their number."""
    found = []
    for number in range(14):
        options: dict[str, Any] = {"max_new_tokens": int(rng.integers(1, 20))}
        if rng.random() < 0.5:
            options |= {"temperature": 1.2, "seed": number, "n": int(rng.integers(1, 4))}
        if rng.random() < 0.3:
            options |= {"stop_ids": rng.integers(5, 300, 30).tolist()}
        if rng.random() < 0.2:
            options |= {"repetition_penalty": 1.3, "stop": "a"}
        length = int(rng.integers(1, 100) if rng.random() < 0.5 else rng.integers(1, 20))
        found.append((ids(length, number), options))
    return found


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("prefix_bytes", [0, 100_000])
def test_texts_that_join_and_leave_at_random_are_those_of_one_by_one(model, seed, prefix_bytes):
    rng = np.random.default_rng(seed)
    asked = drawn_requests(rng)
    loop = model.loop(int(rng.integers(1, 6)), 32, pace=HASTY if seed % 2 else Pace(), prefix_bytes=prefix_bytes)
    pieces, cancelled, left, requests = [], set(), list(enumerate(asked)), {}
    while left or loop.busy:
        while left and (not loop.busy or rng.random() < 0.4):
            number, (prompt, options) = left.pop(0)
            requests[number] = add(loop, model, prompt, number, **options)
        if rng.random() < 0.05:
            number = int(rng.choice(list(requests)))
            cancelled.add(number)
            requests[number].job.cancel.set()
        pieces += loop.step()
        stats = loop.stats
        assert stats.active + stats.reading <= loop._decoder.cache.rows
    results = finished(pieces)
    assert len(results) == sum(one.job.n for one in requests.values())
    for number, (prompt, options) in enumerate(asked):
        alone = model.generate(prompt, **options)
        for index, wanted in enumerate(alone if isinstance(alone, list) else [alone]):
            found = results[number, index]
            if found.finish == "cancelled":
                assert number in cancelled
                assert found.tokens == wanted.tokens[: len(found.tokens)]
            else:
                assert found == wanted
            told = "".join(one.text for one in pieces if (one.prompt, one.index) == (number, index))
            assert told == found.text


def test_the_caller_numbers_requests(model):
    loop = model.loop(2, 64)
    for prompt in (ids(4), ids(5)):
        add(loop, model, prompt, 7, max_new_tokens=3)
    pieces = []
    while loop.busy:
        pieces += loop.step()
    assert Counter(piece.prompt for piece in pieces if piece.result is not None) == {7: 2}


def test_an_idle_loop_does_nothing(model):
    loop = model.loop(2, 64)
    assert not loop.busy
    assert loop.step() == []


def test_more_requests_than_slots_begin_in_order(model):
    loop = model.loop(2, 64)
    for number in range(5):
        add(loop, model, ids(30, number), number, max_new_tokens=4, bias=NO_END)
    assert list(drain(loop)) == [(number, 0) for number in range(5)]


def test_requests_may_come_from_other_threads(model):
    loop, results = model.loop(3, 64), {}
    asked = [model.requests(ids(6, number), first=number, max_new_tokens=6)[0] for number in range(40)]
    threads = [
        threading.Thread(target=lambda some: [loop.add(one) for one in some], args=(asked[k::4],)) for k in range(4)
    ]
    for thread in threads:
        thread.start()
    while len(results) < 40:
        results |= finished(loop.step())
    for thread in threads:
        thread.join()
    assert all(results[number, 0] == model.generate(ids(6, number), max_new_tokens=6) for number in range(40))


def test_closing_a_run_ends_everything(model):
    loop = model.loop(1, 64)
    pieces = loop.run(model.requests([ids(4), ids(5)], bias=NO_END))
    next(pieces)
    pieces.close()
    assert not loop.busy


def test_it_counts(model):
    loop = model.loop(2, 64)
    for number in range(3):
        add(loop, model, ids(10, number), number, max_new_tokens=4, bias=NO_END)
    assert (loop.stats.active, loop.stats.reading, loop.stats.waiting) == (0, 0, 3)
    loop.step()
    assert (loop.stats.active, loop.stats.waiting, loop.stats.read) == (2, 1, 20)
    drain(loop)
    assert (loop.stats.active, loop.stats.waiting, loop.stats.read, loop.stats.written) == (0, 0, 30, 12)


# --- slots


@pytest.fixture
def copies(monkeypatch):
    """(source, target) of every copy within the cache."""
    found: list[tuple[int, int]] = []
    copy = KVCache.copy
    monkeypatch.setattr(KVCache, "copy", lambda self, s, t, length: found.append((s, t)) or copy(self, s, t, length))
    return found


def test_a_text_that_leaves_moves_one_other_at_most(model, copies):
    loop = model.loop(4, 64)
    for number, count in enumerate((9, 3, 9, 9)):
        add(loop, model, ids(10, number), number, max_new_tokens=count, bias=NO_END)
    drain(loop)
    # The second one left early, the last one took its slot; the others left together.
    assert copies == [(3, 1)]


def test_a_prompt_that_is_read_stays_where_it_is_while_others_leave(roomy, copies):
    loop = roomy.loop(3, 256, pace=HASTY)
    for number, count in enumerate((3, 40)):
        add(loop, roomy, ids(10, number), number, max_new_tokens=count, bias=NO_END)
    loop.step()
    add(loop, roomy, ids(200, 5), 5, max_new_tokens=4, bias=NO_END)
    results = drain(loop)
    # The second text takes the first one's slot, and the prompt, once read, the second one's.
    assert copies == [(1, 0), (2, 1)]
    for number, count, length in ((0, 3, 10), (1, 40, 10), (5, 4, 200)):
        assert results[number, 0] == roomy.generate(ids(length, number), max_new_tokens=count, bias=NO_END)


def test_a_prompt_that_is_read_survives_a_larger_cache(roomy):
    loop = roomy.loop(2, 96, pace=HASTY)
    add(loop, roomy, ids(40, 0), 0, max_new_tokens=100, bias=NO_END)
    for _ in range(54):
        loop.step()
    add(loop, roomy, ids(90, 1), 1, max_new_tokens=30, bias=NO_END)
    capacities = set()
    results = {}
    while loop.busy:
        results |= finished(loop.step())
        if loop.stats.reading:
            capacities.add(loop._decoder.cache.capacity)
    assert capacities == {96, 192}
    assert results[0, 0] == roomy.generate(ids(40, 0), max_new_tokens=100, bias=NO_END)
    assert results[1, 0] == roomy.generate(ids(90, 1), max_new_tokens=30, bias=NO_END)


def test_a_prompt_beyond_the_slots_makes_them_larger_and_they_shrink_again(roomy):
    loop = roomy.loop(2, 64)
    add(loop, roomy, ids(300, 1), 1, max_new_tokens=5, bias=NO_END)
    loop.step()
    assert loop._decoder.cache.capacity >= 305
    assert drain(loop)[1, 0] == roomy.generate(ids(300, 1), max_new_tokens=5, bias=NO_END)
    add(loop, roomy, ids(20, 2), 2, max_new_tokens=5)
    loop.step()
    assert loop._decoder.cache.capacity == 64


def test_where_memory_is_short_there_are_fewer_slots(roomy, monkeypatch):
    monkeypatch.setattr(module, "rows_that_fit", lambda _, rows, capacity: min(rows, 700 // capacity))
    loop = roomy.loop(4, 64)
    for number in range(3):
        add(loop, roomy, ids(300, number), number, max_new_tokens=5, bias=NO_END)
    most, results = 0, {}
    while loop.busy:
        results |= finished(loop.step())
        most = max(most, loop.stats.active)
    assert most == 2
    for number in range(3):
        assert results[number, 0] == roomy.generate(ids(300, number), max_new_tokens=5, bias=NO_END)


def test_slots_that_were_given_up_come_back(roomy, monkeypatch):
    room = [700]
    monkeypatch.setattr(module, "rows_that_fit", lambda _, rows, capacity: min(rows, room[0] // capacity))
    loop = roomy.loop(4, 64)
    for number, length in enumerate((300, 20, 21, 22)):
        add(loop, roomy, ids(length, number), number, max_new_tokens=20, bias=NO_END)
    for _ in range(6):
        loop.step()
    assert (loop.stats.active, loop.stats.waiting) == (2, 2)
    room[0] = 5000
    results = finished([*loop.step(), *loop.step()])
    assert (loop.stats.active, loop.stats.waiting) == (4, 0)
    results |= drain(loop)
    for number, length in enumerate((300, 20, 21, 22)):
        assert results[number, 0] == roomy.generate(ids(length, number), max_new_tokens=20, bias=NO_END)


def test_a_prompt_waits_for_memory(roomy, monkeypatch):
    monkeypatch.setattr(module, "rows_that_fit", lambda _, rows, capacity: min(rows, 500 // capacity))
    loop = roomy.loop(4, 64)
    add(loop, roomy, ids(10, 0), 0, max_new_tokens=8, bias=NO_END)
    loop.step()
    add(loop, roomy, ids(400, 1), 1, max_new_tokens=8, bias=NO_END)
    add(loop, roomy, ids(5, 2), 2, max_new_tokens=8, bias=NO_END)
    # It keeps its place in the queue.
    assert list(drain(loop)) == [(0, 0), (1, 0), (2, 0)]


def test_a_prompt_for_which_there_is_no_memory(roomy, monkeypatch):
    import psutil

    loop = roomy.loop(2, 64)
    (request,) = roomy.requests(ids(400, 1))
    monkeypatch.setattr(module, "rows_that_fit", lambda *_: 0)
    loop.add(request)
    (piece,) = loop.step()
    assert (piece.result.finish, piece.result.tokens) == ("length", ())
    monkeypatch.setattr(psutil, "virtual_memory", type("Memory", (), {"available": 10_000}))
    with pytest.raises(UsageError, match="KV cache of 400 tokens for 1 text"):
        loop.add(request)
    assert not loop.busy


# --- cancelling


def test_a_prompt_that_is_cancelled_while_it_is_read_frees_its_slot_at_once(roomy):
    loop = roomy.loop(2, 256, pace=HASTY)
    add(loop, roomy, ids(10, 0), 0, max_new_tokens=30, bias=NO_END)
    loop.step()
    long = add(loop, roomy, ids(200, 1), 1, max_new_tokens=5)
    add(loop, roomy, ids(12, 2), 2, max_new_tokens=5, bias=NO_END)
    loop.step()
    assert (loop.stats.reading, loop.stats.waiting) == (1, 1)
    long.job.cancel.set()
    results = finished(loop.step())
    assert results[1, 0].finish == "cancelled"
    assert (loop.stats.active, loop.stats.reading, loop.stats.waiting) == (2, 0, 0)
    results |= drain(loop)
    assert results[0, 0] == roomy.generate(ids(10, 0), max_new_tokens=30, bias=NO_END)
    assert results[2, 0] == roomy.generate(ids(12, 2), max_new_tokens=5, bias=NO_END)


def test_each_request_has_a_deadline_and_a_cancel_of_its_own(model, monkeypatch):
    step = Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda self, *args: time.sleep(0.02) or step(self, *args))
    loop = model.loop(2, 128)
    for number, options in enumerate(({"seconds": 0.2}, {}, {"seconds": 0.1})):
        request = add(loop, model, ids(10, number), number, bias=NO_END, max_new_tokens=40, **options)
    results = drain(loop)
    assert [results[number, 0].finish for number in range(3)] == ["time", "length", "time"]
    assert results[0, 0].tokens
    assert results[2, 0].tokens == ()
    assert request.job.deadline < np.inf


# --- what goes wrong with one


@pytest.fixture
def broken(monkeypatch):
    """Logits of what comes after token 77 are nonsense."""
    step, read = Decoder.step, Decoder.read

    def spoilt(logits, lasts):
        logits[[last == 77 for last in lasts]] = np.nan
        return logits

    monkeypatch.setattr(Decoder, "step", lambda self, last, *args: spoilt(step(self, last, *args), last))
    monkeypatch.setattr(
        Decoder,
        "read",
        lambda self, slot, prompts, *args: spoilt(read(self, slot, prompts, *args), [p[-1] for p in prompts]),
    )


def test_a_text_that_cannot_go_on_ends_those_of_its_request_alone(model, broken):
    loop = model.loop(3, 64)
    good = [
        model.requests(ids(8, number), first=number, max_new_tokens=9, bias=NO_END | {77: -np.inf})[0]
        for number in (0, 1)
    ]
    # 77 is what it says first, or was the end of the prompt.
    (later,) = model.requests(ids(8, 2), first=2, temperature=1.0, n=4, bias=NO_END | {77: 1000.0})
    (at_once,) = model.requests([*ids(8, 3), 77], first=3)
    for request in (good[0], later, good[1], at_once):
        loop.add(request)
    pieces = []
    while loop.busy:
        pieces += loop.step()
    assert [(piece.prompt, piece.error.exit_code) for piece in pieces if piece.error is not None] == [(2, 8), (3, 8)]
    results = finished(pieces)
    assert set(results) == {(0, 0), (1, 0)}
    for number in (0, 1):
        assert len(results[number, 0].tokens) == 9
    assert loop.stats.active == loop.stats.waiting == 0


def test_generate_raises_what_goes_wrong(model, broken):
    with pytest.raises(ProviderError, match="not finite"):
        model.generate([*ids(8), 77])
    with pytest.raises(ProviderError, match="not finite"):
        list(model.generate([ids(4), ids(5)], stream=True, bias={77: 1000.0}))


# --- the pace


class Clock:
    """Time as a machine of our choice would take it."""

    def __init__(self, step: float, token: float, call: float) -> None:
        self.now = 0.0
        self.step, self.token, self.call = step, token, call
        self.steps: list[float] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        step, read = Decoder.step, Decoder.read

        def slow_step(decoder, *args):
            self.now += self.step
            self.steps.append(self.now)
            return step(decoder, *args)

        def slow_read(decoder, slot, prompts, *rest):
            self.now += self.call + self.token * len(prompts) * max(map(len, prompts))
            return read(decoder, slot, prompts, *rest)

        monkeypatch.setattr(Decoder, "step", slow_step)
        monkeypatch.setattr(Decoder, "read", slow_read)
        monkeypatch.setattr(module.time, "perf_counter", lambda: self.now)


@pytest.mark.parametrize(("step", "token", "call", "longest"), [
    (0.01, 0.0005, 0.01, 0.15),
    (0.04, 0.001, 0.01, 0.15),
    (0.04, 0.004, 0.001, 0.15),
    # No piece is that small.
    (0.04, 0.02, 0.01, 0.05 + 16 * 0.02),
    # At half of the speed prompts are read at least: two steps and two calls, and what sizes are rounded up to.
    (0.2, 0.002, 0.01, 2 * 0.21 + 16 * 0.002),
    (0.15, 0.004, 0.18, 2 * 0.33 + 16 * 0.004),
])  # fmt: skip
def test_reading_stays_within_the_pause_and_gets_its_share(roomy, monkeypatch, step, token, call, longest):
    clock = Clock(step, token, call)
    clock.install(monkeypatch)
    loop = roomy.loop(4, 1024)
    for number in range(3):
        add(loop, roomy, ids(20, number), number, max_new_tokens=500, bias=NO_END)
    for number in range(2):
        # What is not known is learned: how long calls take beside their tokens.
        loop.step()
        add(loop, roomy, ids(100, number), 7, max_new_tokens=1, bias=NO_END)
    while loop.stats.active != 3 or loop.stats.waiting:
        loop.step()
    add(loop, roomy, ids(900, 9), 9, max_new_tokens=2, bias=NO_END)
    begin, steps = clock.now, len(clock.steps)
    while loop.stats.reading or loop.stats.waiting:
        loop.step()
    assert np.diff(clock.steps[steps:]).max() <= 1.1 * longest
    alone = 900 * token + -(-900 // PREFILL_TOKENS) * call
    assert clock.now - begin <= 2.1 * alone + 2 * step


def timed(speed: Speed, call: float, token: float, *sizes: int) -> int:
    for size in sizes:
        speed.read(size, call + token * size)
    return speed.piece(writing=True)


def test_pieces_follow_the_measured_speed():
    speed = Speed(Pace(pause=0.1, share=0.01))
    assert speed.piece(writing=False) == PREFILL_TOKENS
    assert speed.piece(writing=True) == 32
    speed.wrote(0.02)
    # 70 ms, 16 tokens at a time.
    assert timed(speed, 0.01, 0.001, 256, 32, 64) == 64
    # A slow call counts at once, fast ones little by little.
    assert timed(speed, 0.02, 0.002, 64) == 16
    assert timed(speed, 0.01, 0.001, 16) < 64
    assert timed(speed, 0.01, 0.001, *[64] * 10) == 64
    assert timed(speed, 0.0, 1.0, 16) == 16
    assert timed(speed, 0.0, 0.0001, *[16, 64, 256] * 10) == PREFILL_TOKENS


def test_a_call_that_costs_as_much_as_many_tokens_is_not_made_for_few():
    """A loaded machine: 16 tokens take longer than the pause leaves, and as long as twice as many do."""
    speed = Speed(Pace(pause=0.15, share=0.5))
    speed.wrote(0.15)
    size = timed(speed, 0.18, 0.0044, 200)
    for _ in range(30):
        size = timed(speed, 0.18, 0.0044, size)
    full = 256 / (0.18 + 0.0044 * 256)
    assert size / (0.15 + 0.18 + 0.0044 * size) >= 0.45 * full
    assert size <= 80


@pytest.mark.parametrize("seed", range(5))
def test_noise_does_not_lead_astray(seed):
    rng, speed = np.random.default_rng(seed), Speed(Pace())
    size = 32
    for _ in range(300):
        speed.wrote(float(0.03 * rng.uniform(1, 1.5)))
        size = speed.piece(writing=True)
        speed.read(size, float((0.01 + 0.001 * size) * rng.uniform(1, 1.5) * (4 if rng.random() < 0.03 else 1)))
        assert 16 <= size <= 160
    assert size >= 32


@pytest.mark.parametrize(
    "numbers", [{"pause": 0.0}, {"pause": float("nan")}, {"pause": float("inf")}, {"share": 0.0}, {"share": 1.0}]
)
def test_a_pace_that_cannot_be(numbers):
    with pytest.raises(UsageError, match=f"{next(iter(numbers))} is"):
        Pace(**numbers)


def test_every_text_goes_on_by_a_token_a_step_while_a_prompt_is_read(roomy):
    loop = roomy.loop(3, 512, pace=HASTY)
    for number in range(2):
        add(loop, roomy, ids(10, number), number, max_new_tokens=60, bias=NO_END)
    loop.step()
    add(loop, roomy, ids(400, 3), 3, max_new_tokens=2, bias=NO_END)
    written = loop.stats.written
    for count in range(1, 25):
        loop.step()
        assert loop.stats.written == written + 2 * count
    loop.step()
    assert loop.stats.reading == 0


def test_short_prompts_that_wait_are_read_together(model, monkeypatch):
    calls = []
    read = Decoder.read
    monkeypatch.setattr(Decoder, "read", lambda self, *args: calls.append(len(args[1])) or read(self, *args))
    loop = model.loop(5, 64)
    for number in range(5):
        add(loop, model, ids(6 + number, number), number, max_new_tokens=4, bias=NO_END)
    drain(loop)
    assert calls == [5]
    calls.clear()
    for length in (4, 1, 5, 1):
        add(loop, model, ids(length), max_new_tokens=1)
    drain(loop)
    # A call for single tokens is not rounded as one for several.
    assert calls == [2, 2]


# --- what a loop for all comers does not have


def test_beams_and_conversations_do_not_join(model):
    for options in ({"beams": 2}, {"cache": model.new_cache()}):
        with pytest.raises(UsageError, match=f"{next(iter(options))}: the text would not be written beside others"):
            model.requests("the cat", **options)


# --- constraints


class Multiples:
    """Tokens that a number divides; complete after five of them."""

    def __init__(self, number: int) -> None:
        self.number = number

    def start(self) -> Any:
        return MultiplesMatcher(self.number)


class MultiplesMatcher:
    def __init__(self, number: int) -> None:
        self.number = number
        self.seen: list[int] = []

    @property
    def finish(self) -> str | None:
        return "stop" if len(self.seen) == 5 else None

    def mask(self, logits: Any) -> None:
        logits[np.arange(len(logits)) % self.number != 0] = -np.inf

    def accept(self, token: int) -> None:
        self.seen.append(token)


def test_a_constraint_says_what_may_follow_and_when_it_is_complete(model):
    from dataclasses import replace

    loop = model.loop(3, 64)
    for number in (3, 7):
        (request,) = model.requests(
            ids(6), first=number, temperature=2.0, seed=1, bias=NO_END, n=2 if number == 3 else 1
        )
        loop.add(replace(request, job=replace(request.job, constraint=Multiples(number))))
    results = drain(loop)
    for (number, _), found in results.items():
        assert found.finish == "stop"
        assert len(found.tokens) == 5
        assert all(token % number == 0 for token in found.tokens)
    assert results[3, 0].tokens != results[3, 1].tokens
