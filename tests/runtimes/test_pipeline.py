"""What runs beside the caller: order, bounds, errors by type, and that nothing is left behind."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from artifacts.errors import BundleError
from artifacts.manifest import TensorSpec
from runtimes.pipeline import ahead, flow, in_lanes, in_order
from runtimes.pool import SessionPool
from runtimes.text import Batch

ROOT = Path(__file__).parents[2]


BEFORE: set[threading.Thread] = set()
"""Threads that other tests left, such as the one that computes masks as long as the process lives."""


@pytest.fixture(autouse=True)
def before() -> None:
    BEFORE.clear()
    BEFORE.update(threading.enumerate())


def ours() -> list[str]:
    """Threads of ours that this test started."""
    return [one.name for one in threading.enumerate() if one not in BEFORE and one.name.startswith("hasten")]


def wait_for(condition: object, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.001)


# --- ahead


def test_ahead_makes_every_item_in_order() -> None:
    for count in range(6):
        assert list(ahead(lambda number: number * 2, range(count))) == [number * 2 for number in range(count)]


def test_one_source_is_made_on_the_callers_thread() -> None:
    assert list(ahead(lambda _: threading.current_thread(), [1])) == [threading.current_thread()]
    made = list(ahead(lambda _: threading.current_thread().name, [1, 2, 3]))
    assert made[0] == threading.current_thread().name
    assert all(name.startswith("hasten-ahead") for name in made[1:])


def test_the_next_one_is_made_while_one_is_used_and_no_more() -> None:
    made: list[int] = []
    read: list[int] = []

    def sources() -> Iterator[int]:
        for number in itertools.count():
            assert threading.current_thread() is threading.main_thread()
            read.append(number)
            yield number

    def make(number: int) -> int:
        made.append(number)
        return number

    items = ahead(make, sources())
    for due in range(4):
        assert next(items) == due
        wait_for(lambda due=due: len(made) == due + 2)
        time.sleep(0.01)
        assert made == read == list(range(due + 2))
    items.close()


@pytest.mark.parametrize("kind", [BundleError, KeyError, KeyboardInterrupt])
def test_what_making_raises_arrives_with_its_type_when_it_is_due(kind: type[BaseException]) -> None:
    def make(number: int) -> int:
        if number == 2:
            raise kind("broken")
        return number

    items = ahead(make, range(5))
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(kind, match="broken"):
        next(items)
    assert list(items) == []
    assert ours() == []


def test_what_the_sources_raise_arrives_with_its_type() -> None:
    def sources() -> Iterator[int]:
        yield from range(3)
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        list(ahead(str, sources()))
    assert ours() == []


def test_an_abandoned_generator_ends_its_thread() -> None:
    items = ahead(str, itertools.count())
    assert next(items) == "0"
    assert len(ours()) == 1
    del items
    wait_for(lambda: ours() == [])


# --- in_lanes


def test_lanes_keep_the_order_and_work_at_once() -> None:
    together = threading.Barrier(3, timeout=10)

    def work(number: int) -> int:
        together.wait()
        time.sleep(0.002 * (3 - number % 3))
        return number**2

    assert list(in_lanes(work, range(12), 3)) == [(number, number**2) for number in range(12)]
    assert ours() == []


def test_lanes_read_at_most_twice_their_number_ahead() -> None:
    read = itertools.count()
    found = in_lanes(str, iter(lambda: next(read), -1), 2)
    for due in range(5):
        assert next(found) == (due, str(due))
    assert next(read) <= 5 + 4
    found.close()
    assert ours() == []


def test_an_error_in_a_lane_arrives_when_it_is_due_and_stops_the_rest() -> None:
    begun: list[int] = []

    def work(number: int) -> int:
        begun.append(number)
        if number == 3:
            raise BundleError("broken")
        return number

    found = in_lanes(work, range(100), 2)
    assert [next(found)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(BundleError, match="broken"):
        next(found)
    assert len(begun) < 12
    assert ours() == []


def test_abandoned_lanes_drop_what_has_not_begun() -> None:
    begun: list[int] = []
    gate = threading.Event()

    def work(number: int) -> int:
        begun.append(number)
        if number:
            gate.wait(10)
        return number

    found = in_lanes(work, itertools.count(), 2)
    assert next(found) == (0, 0)
    wait_for(lambda: len(begun) == 3)
    threading.Timer(0.05, gate.set).start()
    found.close()
    assert len(begun) == 3
    assert ours() == []


EXIT = """
import itertools, sys, time
sys.path.insert(0, {root!r})
from runtimes.pipeline import ahead, in_lanes
work = lambda number: time.sleep(0.05) or str(number)
kept = [ahead(work, itertools.count()), in_lanes(work, itertools.count(), 2)]
print([next(one) is not None for one in kept])
{how}
"""


@pytest.mark.parametrize(("how", "code"), [("", 0), ("sys.exit(3)", 3), ("raise KeyboardInterrupt", None)])
def test_the_interpreter_exits_with_generators_still_held(how: str, code: int | None) -> None:
    start = time.monotonic()
    script = EXIT.format(root=str(ROOT), how=how)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert time.monotonic() - start < 20
    assert done.stdout == "[True, True]\n"
    if code is not None:
        assert (done.returncode, done.stderr) == (code, "")


# --- flow and order


class Doubler:
    """The thinnest session: twice its input."""

    inputs = (TensorSpec("x", "int64", ("n",)),)

    def __init__(self) -> None:
        self.calls: list[str] = []

    def run(self, feeds: object) -> dict[str, np.ndarray]:
        self.calls.append(threading.current_thread().name)
        return {"y": 2 * feeds["x"]}  # type: ignore[index]

    def close(self) -> None:
        self.calls.append("closed")


def chunks(*sizes: int) -> Iterator[list[Batch]]:
    number = itertools.count()
    for size in sizes:
        yield [Batch((i,), (), {"x": np.array([i])}) for i in itertools.islice(number, size)]


def values(pool: SessionPool, *sizes: int) -> list[int]:
    found = flow(chunks(*sizes), pool, lambda runner, batch: runner.run(batch.feeds))
    assert isinstance(found, Iterator)
    return [int(outputs["y"][0]) for batch, outputs in found if batch.indices]


def test_a_long_flow_moves_to_the_wide_session_and_keeps_its_order() -> None:
    narrow, wide = Doubler(), Doubler()
    pool = SessionPool(narrow, lanes=2, widen=lambda: wide)
    assert values(pool, 30, 30, 30, 30) == [2 * i for i in range(120)]
    assert (len(narrow.calls), len(wide.calls)) == (60, 60)
    assert all(name.startswith("hasten-lane") for name in wide.calls)
    assert values(pool, 1) == [0]
    assert values(pool, 7) == [2 * i for i in range(7)]
    assert len(wide.calls) == 60  # too few to keep two lanes busy
    assert values(pool, 8, 1) == [2 * i for i in range(9)]
    assert len(wide.calls) == 69
    assert ours() == []


def test_values_come_in_order_as_soon_as_they_can() -> None:
    found = in_order(iter([((2, 0), "ca"), ((3,), "d"), ((1,), "b"), ((4, 5), "ef")]))
    assert [next(found) for _ in range(6)] == list("abcdef")
    assert list(in_order([])) == []
