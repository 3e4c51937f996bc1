from __future__ import annotations

import asyncio

import pytest

from artifacts.errors import HastenError
from runtimes.engine import shape
from runtimes.engine.calls import EngineOptions, Place
from runtimes.engine.shape import Shape, measure, shape_of, shapes


def find(bundle, place, **options):
    return asyncio.run(shape_of(bundle, place, EngineOptions(**options)))


@pytest.fixture
def four_cores(monkeypatch):
    monkeypatch.setattr(shape, "physical_cores", lambda: 4)
    monkeypatch.setattr(shape, "is_busy", lambda: False)


@pytest.fixture
def measured(monkeypatch, four_cores):
    """What is measured in place of workers, whose speeds are not a test's to say."""
    asked = []

    async def found(load, cores):
        asked.append((load["threads"], cores))
        return Shape(2, 2)

    monkeypatch.setattr(shape, "measure", found)
    return asked


def test_what_is_asked_for_is_not_measured(sentences, measured):
    assert find(sentences, Place(workers=2)) == Shape(2, 2)
    assert find(sentences, Place(workers=8)) == Shape(8, 1)
    assert find(sentences, Place(workers=1)) == Shape(1, 0)
    assert find(sentences, Place(workers=3, threads=2)) == Shape(3, 2)
    assert find(sentences, Place(threads=3)) == Shape(1, 3)
    assert find(sentences, Place(device="cuda")) == Shape(1, 0)
    assert measured == []


def test_a_decoder_has_one_worker(decoder_bundle, measured):
    assert find(decoder_bundle, Place()) == Shape(1, 0)
    assert measured == []


def test_what_was_measured_is_remembered_for_the_same_wish(sentences, measured):
    assert [find(sentences, Place()) for _ in range(2)] == [Shape(2, 2)] * 2
    assert measured == [(0, 4)]
    find(sentences, Place(variant="one"))
    assert len(measured) == 2
    find(sentences, Place(), cache=False)
    assert len(measured) == 2


def test_a_busy_machine_is_not_measured(sentences, measured, monkeypatch):
    monkeypatch.setattr(shape, "is_busy", lambda: True)
    assert find(sentences, Place()) == Shape(1, 0)
    assert measured == []


def test_what_was_remembered_and_cannot_be_read_is_measured_again(sentences, measured):
    find(sentences, Place())
    shape._path(sentences, Place()).write_bytes(b"{")
    find(sentences, Place())
    assert len(measured) == 2


def test_real_workers_are_measured(sentences):
    load = shape._load(sentences, Place(), EngineOptions(), 0)
    found = asyncio.run(measure(load, 2))
    assert found in (Shape(1, 0), Shape(2, 1))


def test_a_bundle_that_does_not_load_is_told(sentences):
    load = shape._load(sentences, Place(variant="none"), EngineOptions(), 0)
    with pytest.raises(HastenError, match="no variant 'none'"):
        asyncio.run(measure(load, 2))


def test_every_worker_is_told_what_to_load(sentences, four_cores):
    options = EngineOptions(places=(Place(workers=2), Place(variant="two", workers=1, threads=3)), slots=5)
    loads = asyncio.run(shapes(sentences, options))
    assert [(load["kind"], load["variant"], load["threads"]) for load in loads] == [
        *[(0, None, 2), (0, None, 2)],
        (1, "two", 3),
    ]
    assert all(load["digest"] == sentences.digest and load["slots"] == 5 for load in loads)
