from __future__ import annotations

import asyncio
import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from artifacts.errors import OverloadError
from runtimes.engine.batcher import take_batch
from runtimes.engine.calls import Call
from runtimes.engine.waiting import Ticket, Waiting, Work

LOOP = asyncio.new_event_loop()


@pytest.fixture(scope="module", autouse=True)
def end_the_loop():
    yield
    LOOP.close()


def work(number, costs=(10,), *, arrived=0.0, priority=0, aging=1.0, method="embed", alone=False):
    call = Call(priority=priority)
    return Work(
        *(number, method, call, arrived, sum(costs), aging, LOOP.create_future()),
        items=[f"{number}.{index}" for index in range(len(costs))],
        costs=list(costs),
        alone=alone,
    )


def queue(*tickets, requests=100, tokens=10000):
    waiting = Waiting(requests, tokens)
    for ticket in tickets:
        waiting.add(ticket)
    return waiting


def order(waiting):
    return [ticket.number for ticket in waiting]


def test_first_come_first_served_within_a_priority():
    assert order(queue(work(1), work(2, arrived=1.0), work(3, arrived=1.0), work(4, arrived=0.5))) == [1, 4, 2, 3]


def test_a_step_of_priority_is_worth_so_many_seconds():
    late, early = work(2, arrived=3.0, priority=2, aging=1.0), work(1, arrived=0.0)
    assert order(queue(late, early)) == [1, 2]
    late = work(2, arrived=3.0, priority=4, aging=1.0)
    assert order(queue(late, early)) == [2, 1]


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(-10, 10)), min_size=1, max_size=40))
def test_nobody_starves(arrivals):
    """Whoever came ``20 * aging`` seconds earlier goes first, whatever the priorities."""
    tickets = [work(n, arrived=at, priority=p, aging=0.5) for n, (at, p) in enumerate(arrivals)]
    found = list(queue(*tickets))
    for before, after in pairwise(found):
        assert before.arrived - after.arrived <= 10.0 + 1e-9


def test_counts_follow_what_waits():
    waiting = queue(work(1, (5, 5), priority=1), work(2, (7,)), work(3, (1,), priority=-2))
    assert (len(waiting), waiting.tokens) == (3, 18)
    assert [waiting.ahead(level) for level in (10, 1, 0, -2)] == [0, 10, 17, 18]
    head = waiting.head
    assert waiting.remove(head)
    assert not waiting.remove(head)
    assert (len(waiting), waiting.tokens, waiting.ahead(-10)) == (2, 8, 8)


def test_a_full_queue_refuses():
    with pytest.raises(OverloadError, match="2 requests wait") as refused:
        queue(work(1), work(2), requests=2).check(1, lambda: 3.5)
    assert refused.value.retry_after == 3.5
    with pytest.raises(OverloadError, match="20 tokens wait"):
        queue(work(1), work(2), tokens=25).check(6, lambda: 1.0)
    queue(work(1), work(2), tokens=25).check(5, lambda: 1.0)


def test_a_request_larger_than_the_queue_is_taken_where_nobody_waits():
    queue(tokens=10).check(10**6, lambda: 1.0)


def test_deadlines_are_on_the_clock_of_arrival():
    ticket = Ticket(1, "embed", Call(timeout=2.0), 10.0, 5, 1.0, LOOP.create_future())
    assert ticket.deadline == 12.0
    assert work(1).deadline == math.inf


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60), st.integers(1, 120))
def test_a_large_request_is_taken_in_parts_the_longest_first_and_put_together_in_order(costs, budget):
    ticket = work(1, costs)
    rows, lengths = {}, []
    while ticket.waits:
        assert ticket.left == sum(costs) - sum(costs[index] for index in rows)
        part = ticket.take(budget)
        assert part.indices
        assert part.cost <= budget or len(part.indices) == 1
        lengths += [costs[index] for index in part.indices]
        rows |= dict.fromkeys(part.indices)
        assert ticket.answer() is None
        vectors = np.array([[index, costs[index]] for index in part.indices], np.float32)
        ticket.accept_vectors(part, vectors)
    assert lengths == sorted(costs, reverse=True)
    np.testing.assert_array_equal(ticket.answer().arrays["embedding"], [[i, cost] for i, cost in enumerate(costs)])


def test_a_part_given_back_is_taken_again():
    ticket = work(1, (3, 2, 1))
    part = ticket.take(5)
    assert (part.indices, ticket.left) == ([0, 1], 1)
    ticket.give_back(part)
    assert (ticket.left, ticket.length) == (6, 3)
    assert ticket.take(1) is part
    assert ticket.take(9).indices == [2]
    assert not ticket.waits


def test_an_answer_keeps_nothing_of_the_batch():
    ticket = work(1, (1, 1))
    batch = np.arange(40, dtype=np.float32).reshape(10, 4)
    ticket.accept_vectors(ticket.take(9), batch[3:5])
    found = ticket.answer().arrays["embedding"]
    assert found.base is None
    np.testing.assert_array_equal(found, batch[3:5])


def taken(waiting, budget):
    return [(part.work.number, len(part.indices)) for part in take_batch(waiting, 1, budget).parts]


def test_a_batch_holds_all_that_wait_if_they_fit():
    waiting = queue(work(1, (10,)), work(2, (20, 10)), work(3, (30,)))
    batch = take_batch(waiting, 7, 100)
    assert (batch.number, batch.method, batch.cost) == (7, "embed", 70)
    assert len(waiting) == 0


def test_a_batch_begins_with_whose_turn_it_is_and_takes_those_of_about_its_length():
    waiting = queue(work(1, (10,)), work(2, (40,)), work(3, (12,)), work(4, (39,)), work(5, (9,)))
    assert taken(waiting, 35) == [(1, 1), (5, 1), (3, 1)]
    assert taken(waiting, 35) == [(2, 1)]
    assert order(waiting) == [4]


def test_a_batch_holds_one_method_only():
    waiting = queue(work(1), work(2, method="rows"), work(3))
    assert taken(waiting, 100) == [(1, 1), (3, 1)]


def test_what_is_urgent_takes_little_of_what_is_not_along():
    waiting = queue(*(work(n, priority=-3) for n in range(1, 6)), work(6, priority=5), work(7, priority=5))
    batch = take_batch(waiting, 1, 100, little=30)
    assert [part.work.number for part in batch.parts] == [6, 7, 1]
    assert [part.work.number for part in take_batch(waiting, 2, 100, little=5).parts] == [2, 3, 4, 5]


def test_what_is_urgent_takes_no_more_along_than_the_budget_has_room_for():
    batch = take_batch(queue(work(1, priority=-3), work(2, priority=5)), 1, 15, little=100)
    assert [part.work.number for part in batch.parts] == [2]


def test_plain_tensors_and_suspects_go_alone():
    assert taken(queue(work(1, method="run"), work(2, method="run")), 100) == [(1, 1)]
    assert taken(queue(work(1, alone=True), work(2)), 100) == [(1, 1)]
    assert taken(queue(work(1), work(2, alone=True)), 100) == [(1, 1)]


def test_a_large_request_does_not_lose_its_place_while_it_is_cut():
    waiting = queue(work(1, (10,) * 5), work(2, (10,)))
    assert taken(waiting, 20) == [(1, 2)]
    assert (order(waiting), waiting.tokens) == ([1, 2], 40)
    assert taken(waiting, 45) == [(1, 3), (2, 1)]


def test_a_batch_has_the_priority_of_its_most_urgent_request():
    assert take_batch(queue(work(1, priority=-3), work(2, priority=5, arrived=99.0)), 1, 99).priority == 5
