"""What Prometheus reads of a real server, parsed back with Prometheus' own parser."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample
from serving import Server

from runtimes.engine.stats import BOUNDS, Counters, Stats, WorkerStats
from runtimes.responses.cache import CacheStats
from runtimes.serve.metrics import CLIENT_LEFT, NO_ROUTE, Recorder, render
from runtimes.serve.models import Models


@pytest.fixture
def client(everything: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=everything.url, timeout=30.0) as found:
        yield found


def samples(text: str) -> dict[str, list[Sample]]:
    found: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation, family.name
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


def value(found: dict[str, list[Sample]], name: str, **labels: str) -> float:
    return sum(one.value for one in found[name] if labels.items() <= one.labels.items())


def read(client: httpx.Client) -> dict[str, list[Sample]]:
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    return samples(response.text)


def test_what_was_asked_is_counted(client: httpx.Client) -> None:
    before = read(client)
    route = {"route": "/classify", "method": "POST"}
    for texts in (["the cat"], ["a dog", "a fish"]):
        assert client.post("/classify", json={"model": "sentiment", "texts": texts}).status_code == 200
    assert client.post("/classify", json={"model": "sentiment"}).status_code == 400
    assert client.get("/nothing/of/the/kind").status_code == 404
    after = read(client)

    def grown(name: str, **labels: str) -> float:
        old = value(before, name, **labels) if name in before else 0.0
        return value(after, name, **labels) - old

    assert grown("hasten_http_requests_total", **route, status="200") == 2
    assert grown("hasten_http_requests_total", **route, status="400") == 1
    assert grown("hasten_http_requests_total", route=NO_ROUTE, status="404") == 1
    assert grown("hasten_http_request_seconds_count", route="/classify") == 3
    assert grown("hasten_engine_requests_done_total", model="sentiment") == 2
    assert grown("hasten_engine_requests_done_total", model="sentences") == 0
    assert grown("hasten_engine_tokens_read_total", model="sentiment") == 4 + 8
    assert grown("hasten_engine_total_seconds_count", model="sentiment") == 2
    assert 0.0 < grown("hasten_engine_total_seconds_sum", model="sentiment") < 30.0
    assert value(after, "hasten_workers", model="sentiment", state="ready") == 1
    assert value(after, "hasten_worker_resident_memory_bytes", model="sentiment") > 1e6
    assert value(after, "hasten_process_resident_memory_bytes") > 1e6
    assert value(after, "hasten_model_ready") == 7
    assert value(after, "hasten_engine_queue_requests") == 0
    assert value(after, "hasten_http_active_requests") == 1


def test_what_never_reached_a_route_is_counted(everything: Server, client: httpx.Client) -> None:
    def count(status: int) -> float:
        found = read(client)["hasten_http_requests_total"]
        return sum(
            one.value for one in found if one.labels["route"] == NO_ROUTE and one.labels["status"] == str(status)
        )

    before = {status: count(status) for status in (403, 421, CLIENT_LEFT)}
    assert client.get("/metrics", headers={"origin": "http://elsewhere.example"}).status_code == 403
    assert client.get("/metrics", headers={"host": "elsewhere.example"}).status_code == 421
    with everything.connect() as left:
        left.sendall(b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
    until = time.monotonic() + 20.0
    while count(CLIENT_LEFT) == before[CLIENT_LEFT] and time.monotonic() < until:
        time.sleep(0.02)
    assert {status: count(status) for status in before} == {status: old + 1 for status, old in before.items()}


def test_buckets_grow_to_their_count(client: httpx.Client) -> None:
    client.post("/classify", json={"model": "sentiment", "texts": ["the cat"]})
    found = read(client)
    for name in ("hasten_engine_total_seconds", "hasten_engine_queue_seconds"):
        buckets = [one for one in found[f"{name}_bucket"] if one.labels["model"] == "sentiment"]
        counts = [one.value for one in buckets]
        assert [one.labels["le"] for one in buckets] == [*map(str, BOUNDS), "+Inf"]
        assert counts == sorted(counts)
        assert counts[-1] == value(found, f"{name}_count", model="sentiment") >= 1


def test_paths_that_clients_make_up_make_no_series(client: httpx.Client) -> None:
    before = len(read(client)["hasten_http_requests_total"])
    for number in range(20):
        client.get(f"/v2/models/made-up-{number}")
        client.get(f"/made-up-{number}")
        client.request(f"MADE{number}", "/v2")
    assert len(read(client)["hasten_http_requests_total"]) <= before + 4


def test_many_ask_at_once(client: httpx.Client) -> None:
    failed = []

    def ask() -> None:
        for _ in range(5):
            try:
                read(client)
            except Exception as error:  # noqa: BLE001 - told in the main thread
                failed.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_names_follow_the_conventions(client: httpx.Client) -> None:
    for family in text_string_to_metric_families(client.get("/metrics").text):
        assert re.fullmatch(r"hasten_[a-z][a-z0-9_]*", family.name)
        assert family.type in ("counter", "gauge", "histogram")


def test_a_number_of_each_kind_reaches_its_series() -> None:
    """Counts that a short test cannot make grow in a server: given by a stand-in for the engine's `stats` alone."""
    worker = WorkerStats(7, "CUDAExecutionProvider", "cuda", "cuda-fp16", "ready", 123.0, 5, 1 << 20, 2, "", 3, 11, 999)
    given = replace(
        Counters().stats((worker, replace(worker, state="broken")), {}),
        **{name: 10 + index for index, name in enumerate(("refused", "deadline_missed", "cache_hits", "cache_misses"))},
    )

    class Engine:
        ready = True

        def stats(self) -> Stats:
            return given

    class One:
        name, task, engine, loads, failure = 'a "name"\n', "tensors", Engine(), 2, "broken"

    models = Models({}, lambda path: pytest.fail("not made"))
    models._live = {"one": One()}  # type: ignore[dict-item]
    cache = CacheStats(5, 6, 7, 8, 9, working=False)
    found = samples(render(models, Recorder(), lambda: cache).decode())
    assert value(found, "hasten_engine_requests_refused_total", model='a "name"\n') == 10
    assert value(found, "hasten_engine_deadlines_missed_total") == 11
    assert value(found, "hasten_engine_cache_hits_total") == 12
    assert value(found, "hasten_engine_cache_misses_total") == 13
    assert value(found, "hasten_prefix_cache_hits_total", worker="0", provider="CUDAExecutionProvider") == 11
    assert value(found, "hasten_prefix_cache_tokens_saved_total") == 2 * 999
    assert value(found, "hasten_worker_throughput", device="cuda", worker="1") == 123
    assert value(found, "hasten_workers", state="broken") == value(found, "hasten_workers", state="ready") == 1
    assert value(found, "hasten_workers", state="idle") == 0
    assert value(found, "hasten_model_reload_failed") == 1
    assert [value(found, f"hasten_response_cache_{name}_total") for name in ("hits", "misses", "errors")] == [5, 6, 7]
    assert [value(found, f"hasten_response_cache_{name}") for name in ("bytes", "entries", "working")] == [8, 9, 0]
