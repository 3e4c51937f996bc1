"""Token buckets, and what a server bears at once."""

from __future__ import annotations

import asyncio
import time

import pytest

from runtimes.serve.limits import _MOST_CLIENTS, Lag, Load, Rates


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_and_then_the_rate() -> None:
    clock = Clock()
    rates = Rates(2.0, 3.0, clock=clock)
    assert [rates.take("a") for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    clock.now += 0.25
    assert rates.take("a") == pytest.approx(0.25)
    clock.now += 0.25
    assert rates.take("a") == 0.0
    assert rates.take("a") == pytest.approx(0.5)


def test_a_refusal_costs_nothing_and_rest_fills_the_bucket_no_further() -> None:
    clock = Clock()
    rates = Rates(1.0, 1.0, clock=clock)
    assert rates.take("a") == 0.0
    assert {rates.take("a") for _ in range(10)} == {1.0}
    clock.now += 3600.0
    assert [rates.take("a"), rates.take("a")] == [0.0, 1.0]


def test_clients_have_buckets_of_their_own() -> None:
    rates = Rates(1.0, 1.0, clock=Clock())
    assert [rates.take(name) for name in ("a", "b", "a", "b")] == [0.0, 0.0, 1.0, 1.0]


def test_a_rate_below_one_a_second_lets_one_through() -> None:
    clock = Clock()
    rates = Rates(0.1, 0.1, clock=clock)
    assert rates.take("a") == 0.0
    assert rates.take("a") == pytest.approx(10.0)


def test_many_clients_take_no_more_memory() -> None:
    rates = Rates(1.0, 1.0, clock=Clock())
    for index in range(_MOST_CLIENTS + 10):
        rates.take(str(index))
    assert len(rates._buckets) == _MOST_CLIENTS
    assert "0" not in rates._buckets


def test_places_and_bytes() -> None:
    load = Load(2, 100)
    assert [load.begin(), load.begin(), load.begin()] == [True, True, False]
    load.end()
    assert load.begin()
    assert load.hold(1000), "a body that is alone has room"
    assert not load.hold(1)
    load.free(1000)
    assert load.hold(60)
    assert load.hold(40)
    assert not load.hold(1)
    assert load.bytes == 100


def test_a_loop_that_is_behind_is_late_until_it_has_caught_up() -> None:
    async def work() -> list[bool]:
        lag = Lag(most=0.05)
        found = [lag.late()]
        time.sleep(0.3)  # what a burst of requests does to the loop
        await asyncio.sleep(0.02)
        found.append(lag.late())
        for _ in range(200):
            await asyncio.sleep(0.02)
            if not lag.late():
                break
        return [*found, lag.late()]

    assert asyncio.run(work()) == [False, True, False]


def test_where_there_is_a_long_queue_a_small_delay_is_enough() -> None:
    async def work() -> list[bool]:
        lag = Lag(most=60.0, some=0.05)
        lag.late(lambda: True)
        time.sleep(0.3)
        await asyncio.sleep(0.02)
        return [lag.late(), lag.late(lambda: False), lag.late(lambda: True)]

    assert asyncio.run(work()) == [False, False, True]
