"""What is computed beside the graph is computed once, whoever is first, and its errors arrive."""

from __future__ import annotations

import threading

import pytest

from runtimes.generate.aside import Aside, Pending


@pytest.fixture
def aside():
    found = Aside("aside-test")
    yield found
    found.close()


def test_it_is_done_in_a_thread_of_its_own(aside):
    began, name = threading.Event(), []

    def work():
        name.append(threading.current_thread().name)
        began.set()
        return 7

    pending = aside.do(work)
    assert began.wait(10)
    assert pending.result() == 7
    assert pending.result() == 7
    assert name == ["aside-test"]


def test_what_nobody_has_begun_is_done_by_whoever_asks(aside):
    """The thread is busy; the one who asks does not wait for it."""
    began, go = threading.Event(), threading.Event()

    def wait():
        began.set()
        assert go.wait(10)

    slow, runs = aside.do(wait), []
    assert began.wait(10)
    quick = aside.do(lambda: runs.append(threading.current_thread()) or 3)
    assert quick.result() == 3
    go.set()
    slow.result()
    assert aside.do(lambda: 1).result() == 1
    assert runs == [threading.current_thread()]


def test_an_error_is_raised_by_its_result(aside):
    pending = aside.do(lambda: 1 // 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            pending.result()
    assert aside.do(lambda: 1).result() == 1


def test_results_come_after_the_end_too():
    aside = Aside("aside-test")
    before = aside.do(lambda: 1)
    aside.close()
    assert (before.result(), aside.do(lambda: 2).result()) == (1, 2)


def test_work_is_done_once():
    runs: list[int] = []
    pending = Pending(lambda: runs.append(1) or len(runs))
    threads = [threading.Thread(target=pending.run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pending.result() == 1
    assert runs == [1]
