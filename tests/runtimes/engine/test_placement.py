from __future__ import annotations

import time
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtimes.engine.host import Host
from runtimes.engine.placement import LEAST_TOKENS, Speed, Trust, choose


@given(st.floats(0, 0.1), st.floats(1e-6, 1e-2), st.lists(st.integers(1, 4000), min_size=3, max_size=30, unique=True))
def test_the_line_of_runs_is_found(fixed, each, sizes):
    speed = Speed()
    for size in sizes:
        speed.add(size, fixed + each * size)
    for size in (min(sizes), max(sizes)):
        assert speed.seconds(size) == pytest.approx(fixed + each * size, rel=0.02, abs=1e-6)


def test_nothing_is_claimed_of_what_was_not_seen():
    speed = Speed()
    assert (speed.known, speed.seconds(100), speed.rate(100), speed.budget(1.0)) == (False, 0.0, 0.0, LEAST_TOKENS)


def test_runs_of_one_size_tell_the_mean():
    speed = Speed()
    for seconds in (0.1, 0.1, 0.1):
        speed.add(50, seconds)
    assert speed.seconds(50) == pytest.approx(0.1)
    assert speed.seconds(100) == pytest.approx(0.2)


@given(st.lists(st.tuples(st.integers(1, 5000), st.floats(1e-5, 5.0)), min_size=1, max_size=20))
def test_whatever_is_seen_the_numbers_make_sense(runs):
    speed = Speed()
    for tokens, seconds in runs:
        speed.add(tokens, seconds)
    fixed, each = speed.line
    assert fixed >= 0.0
    assert each >= 0.0
    assert speed.budget(0.05) >= 1
    assert speed.within(0.001) >= 1


def test_the_latest_runs_weigh_most():
    speed = Speed()
    for _ in range(100):
        speed.add(100, 0.1)
        speed.add(200, 0.2)
    for _ in range(100):
        speed.add(100, 0.2)
        speed.add(200, 0.4)
    assert speed.seconds(150) == pytest.approx(0.3, rel=0.1)


def a_speed(fixed, each):
    speed = Speed()
    for size in (10, 100, 1000, 10_000):
        speed.add(size, fixed + each * size)
    return speed


def test_a_batch_is_no_larger_than_pays_and_no_longer_than_may_be():
    assert a_speed(0.0, 1e-5).budget(0.05) == LEAST_TOKENS
    assert a_speed(0.01, 1e-5).budget(1.0) == pytest.approx(10_000, rel=0.01)
    assert a_speed(0.01, 1e-5).budget(0.05) == pytest.approx(4_000, rel=0.01)
    assert a_speed(0.0, 1e-2).budget(0.05) == 5


def test_a_batch_is_worth_what_is_fixed_even_where_the_run_gets_long():
    """Otherwise a slow hour makes batches small, which makes all slower still."""
    assert a_speed(1.0, 1e-2).budget(0.05) == pytest.approx(100, rel=0.01)
    assert a_speed(0.04, 1e-3).within(0.05) == pytest.approx(40, rel=0.05)


def test_a_batch_grows_step_by_step():
    speed = Speed()
    for seconds in (0.2, 0.1):
        speed.add(100, seconds)
    speed.add(200, 0.01)
    assert speed.line[1] == 0.0
    assert speed.budget(0.05) == 2 * LEAST_TOKENS
    speed.add(2 * LEAST_TOKENS, 0.01)
    assert speed.budget(0.05) == 4 * LEAST_TOKENS


def test_a_request_far_larger_than_all_that_was_seen_is_not_judged_by_a_slow_small_run():
    speed = Speed()
    speed.add(8, 0.08)
    assert speed.seconds(speed.foreseen(300_000)) == pytest.approx(speed.seconds(2 * LEAST_TOKENS))
    assert speed.foreseen(20) == 20
    speed.add(5000, 0.1)
    assert speed.foreseen(300_000) == 10_000


def test_nobody_is_refused_for_what_small_runs_took():
    host = Host({}, listener=None, hang_timeout=1.0)
    host.speed("rows").add(8, 0.08)
    assert host.run_seconds(20, 0) == pytest.approx(0.2)
    assert host.run_seconds(300_000, 0) == pytest.approx(0.01 * 2 * LEAST_TOKENS)
    host.speed("rows").add(300_000, 3.0)
    assert host.run_seconds(300_000, 0) == pytest.approx(3.0, rel=0.1)


@dataclass
class Fake:
    each: float
    busy: float = 0.0

    def finish(self, tokens):
        return self.busy + self.each * tokens


def test_the_worker_that_is_done_soonest_is_taken():
    fast, slow = Fake(1.0), Fake(3.0)
    assert choose([slow, fast], [], 10, 10) is fast
    assert choose([slow, Fake(1.0, busy=40.0)], [], 10, 10) is slow


def test_a_slow_worker_waits_where_a_busy_fast_one_is_sooner_and_works_where_the_queue_is_long():
    slow, fast = Fake(10.0), Fake(1.0, busy=5.0)
    assert choose([slow], [fast], 10, backlog=10) is None
    assert choose([slow], [fast], 10, backlog=1000) is slow


def test_without_a_free_worker_there_is_none():
    assert choose([], [Fake(1.0)], 10, 10) is None


def test_what_is_expected_is_corrected_by_what_came():
    trust = Trust()
    assert not trust.late(1.0, 1.5)
    for _ in range(100):
        trust.learn(1.0, 2.0)
    assert trust.late(1.0, 1.5)
    assert 2.0 < trust.seconds(1.0) < 3.0
    for _ in range(1000):
        trust.learn(1.0, 0.9)
    assert not trust.late(1.0, 1.5)


def test_who_refused_everybody_tries_again(monkeypatch):
    trust = Trust()
    for _ in range(100):
        trust.learn(0.001, 60.0)
    assert trust.late(0.001, 0.015)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 60.0)
    assert not trust.late(0.001, 0.015)
