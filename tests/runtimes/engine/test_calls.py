from __future__ import annotations

import pytest

import hasten
from artifacts.errors import UsageError
from runtimes.engine.calls import Call, EngineOptions, Place
from runtimes.engine.engine import Engine


@pytest.mark.parametrize("bad", [11, -11, 1.5, True, "high"])
def test_priorities_are_whole_numbers_within_ten(bad):
    with pytest.raises(UsageError, match="priority"):
        Call(priority=bad)


@pytest.mark.parametrize("bad", [0, -1.0, float("nan"), True, "1"])
def test_timeouts_are_positive_seconds(bad):
    with pytest.raises(UsageError, match="timeout"):
        Call(timeout=bad)


@pytest.mark.parametrize(
    "bad",
    [
        *({"workers": -1}, {"workers": 1.0}, {"threads": 5000}, {"slots": -1}, {"queue_requests": 0}),
        *({"queue_tokens": 0}, {"max_batch_tokens": -1}, {"prefix_cache": -1}, {"max_delay": -1.0}),
        *({"aging": 0.0}, {"hang_timeout": 0.0}, {"hang_timeout": float("inf")}, {"pause": 0}, {"idle_timeout": 0}),
        {"max_delay": float("nan")},
    ],
)
def test_options_out_of_range_are_named(bad):
    with pytest.raises(UsageError, match=next(iter(bad))):
        EngineOptions(**bad)


def test_places_stand_instead_of_one_place():
    places = (Place(provider="cpu"), Place(provider="openvino", workers=2))
    assert EngineOptions(places=places).kinds == places
    assert EngineOptions(workers=3, device="cpu").kinds == (Place(device="cpu", workers=3),)
    with pytest.raises(UsageError, match="places"):
        EngineOptions(places=places, workers=1)
    with pytest.raises(UsageError, match="workers"):
        Place(workers=-1)


def test_serve_engine_takes_the_options_by_name():
    engine = hasten.serve_engine("somewhere", workers=2, idle_timeout=5.0)
    assert isinstance(engine, Engine)
    assert (engine.options.workers, engine.options.idle_timeout) == (2, 5.0)
    with pytest.raises(UsageError, match="no option 'worker'"):
        hasten.serve_engine("somewhere", worker=2)


def test_an_engine_that_was_not_started_says_so():
    engine = hasten.serve_engine("somewhere")
    assert not engine.ready
    with pytest.raises(UsageError, match="not started"):
        _ = engine.bundle
    with pytest.raises(UsageError, match="not started"):
        engine.stats()
