"""``/metrics``: what the server and its engines did, in the text form of Prometheus.

Nothing is kept twice: counts of an engine are read from `Engine.stats` when Prometheus asks. Names and units follow
Prometheus' conventions: base units, ``_total`` for what only grows.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import psutil
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..engine.stats import BOUNDS, Histogram, Stats, WorkerStats
from ..responses.cache import CacheStats
from .models import Models

CLIENT_LEFT = 499
"""Counted as the status of a request whose client left before it was answered."""
NO_ROUTE = "none"
"""Counted as the route of a request that asked for a path there is not, or was refused before it was looked for."""
STATES = ("starting", "ready", "idle", "broken", "closed")
_METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH"})
_Key = tuple[str, str, int]
_Pair = tuple[Sequence[str], float]
_ALONE: tuple[str, ...] = ()

_COUNTS: Mapping[str, tuple[str, str]] = {
    "accepted": ("engine_requests_accepted", "Requests let into the queue."),
    "refused": ("engine_requests_refused", "Requests refused: the queue was full, or their time too short."),
    "done": ("engine_requests_done", "Requests answered."),
    "failed": ("engine_requests_failed", "Requests that ended with an error, deadlines aside."),
    "cancelled": ("engine_requests_cancelled", "Requests that the caller gave up."),
    "deadline_missed": ("engine_deadlines_missed", "Requests whose time was over."),
    "retried": ("engine_requests_retried", "Requests tried again after a worker died or hung."),
    "restarts": ("engine_worker_restarts", "Workers replaced."),
    "batches": ("engine_batches", "Runs that workers were sent."),
    "tokens_in": ("engine_tokens_read", "Tokens read; cached answers not counted."),
    "tokens_out": ("engine_tokens_written", "Tokens written."),
    "cache_hits": ("engine_cache_hits", "Requests of a model answered from the response cache."),
    "cache_misses": ("engine_cache_misses", "Requests of a model that it could have answered and did not."),
}
"""Field of `Stats` that only grows -> name, and what it counts."""
_GAUGES: Mapping[str, tuple[str, str]] = {
    "queue_requests": ("engine_queue_requests", "Requests that wait."),
    "queue_tokens": ("engine_queue_tokens", "Tokens that wait, as estimated."),
    "outstanding": ("engine_outstanding_requests", "Requests that are at a worker."),
}
_WORKER_COUNTS: Mapping[str, tuple[str, str]] = {
    "prefix_hits": ("prefix_cache_hits", "Prompts that began like an earlier one."),
    "tokens_saved": ("prefix_cache_tokens_saved", "Tokens of prompts that were not read again."),
}
_WORKER_GAUGES: Mapping[str, tuple[str, str]] = {
    "throughput": ("worker_throughput", "Tokens (of plain tensors: rows) a second while a worker works."),
    "outstanding": ("worker_outstanding_tokens", "Tokens that a worker was given and did not finish."),
    "rss": ("worker_resident_memory_bytes", "Resident memory of a worker."),
    "active": ("worker_active_texts", "Texts that a worker is writing."),
}


class Recorder:
    """Counts the requests of a server.

    Attributes:
        requests: (route, method, status) -> how many ended so.
        active: Requests that are being answered.
        started: Seconds of the epoch at which it began to count.
    """

    def __init__(self) -> None:
        self.requests: Counter[_Key] = Counter()
        self.active = 0
        self.started = time.time()
        self._seconds: dict[str, tuple[list[int], list[float]]] = {}

    def add(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a request that ended."""
        self.requests[route, method if method in _METHODS else "other", status] += 1
        counts, total = self._seconds.setdefault(route, ([0] * (len(BOUNDS) + 1), [0.0]))
        counts[bisect_left(BOUNDS, seconds)] += 1
        total[0] += seconds

    def seconds(self) -> dict[str, Histogram]:
        """Route -> how long its requests took."""
        return {name: Histogram(BOUNDS, tuple(counts), total[0]) for name, (counts, total) in self._seconds.items()}


class Meter:
    """ASGI middleware that counts requests, outermost: what the gate refuses is counted too."""

    def __init__(self, app: ASGIApp, recorder: Recorder) -> None:
        self._app = app
        self._recorder = recorder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI says."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, begin = CLIENT_LEFT, time.perf_counter()

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._recorder.active += 1
        try:
            await self._app(scope, receive, note)
        finally:
            self._recorder.active -= 1
            route = getattr(scope.get("route"), "path", NO_ROUTE)
            self._recorder.add(route, scope["method"], status, time.perf_counter() - begin)


class ServerCollector(Collector):
    """Makes Prometheus' families of what a server and its engines count."""

    def __init__(self, models: Models, recorder: Recorder, cache: Callable[[], CacheStats] | None = None) -> None:
        """Read from these.

        Args:
            models: What is served.
            recorder: Requests.
            cache: Tells the counts of the response cache by name; None: there is no cache.
        """
        self._models = models
        self._recorder = recorder
        self._cache = cache
        self._process = psutil.Process()

    def collect(self) -> Iterator[Metric]:
        """All families."""
        yield from self._of_server()
        yield from self._of_models()
        stats = {served.name: served.engine.stats() for served in self._models}
        yield from _of_engines(stats)
        yield from _of_workers(stats)
        if self._cache is not None:
            yield from _of_cache(self._cache())

    def _of_server(self) -> Iterator[Metric]:
        requests = CounterMetricFamily(
            "hasten_http_requests",
            "Requests by route and status; 499: the client left.",
            labels=["route", "method", "status"],
        )
        for (route, method, status), number in sorted(self._recorder.requests.items()):
            requests.add_metric([route, method, str(status)], number)
        yield requests
        seconds = HistogramMetricFamily(
            "hasten_http_request_seconds", "Time from a request's head to the end of its answer.", labels=["route"]
        )
        for route, histogram in sorted(self._recorder.seconds().items()):
            _add(seconds, [route], histogram)
        yield seconds
        alone = {
            "http_active_requests": ("Requests that are being answered.", self._recorder.active),
            "process_resident_memory_bytes": ("Resident memory of the server.", self._process.memory_info().rss),
            "process_start_time_seconds": ("When the server began, of the epoch.", self._recorder.started),
        }
        for name, (text, value) in alone.items():
            yield _gauge(name, text, [], [(_ALONE, value)])

    def _of_models(self) -> Iterator[Metric]:
        served = list(self._models)
        ready = [((one.name, one.task), float(one.engine.ready)) for one in served]
        yield _gauge("model_ready", "Whether a model can answer.", ["model", "task"], ready)
        loads = [((one.name,), float(one.loads)) for one in served]
        yield _counter("model_loads", "How often a model's bundle was loaded.", ["model"], loads)
        failed = [((one.name,), float(bool(one.failure))) for one in served]
        text = "Whether the bundle that lies there now could not be loaded."
        yield _gauge("model_reload_failed", text, ["model"], failed)


def render(models: Models, recorder: Recorder, cache: Callable[[], CacheStats] | None = None) -> bytes:
    """The page that Prometheus reads."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ServerCollector(models, recorder, cache))
    return generate_latest(registry)


def routes(models: Models, recorder: Recorder, *, cache: Callable[[], CacheStats] | None = None) -> list[BaseRoute]:
    """``/metrics``."""

    async def metrics(request: Request) -> Response:
        return Response(render(models, recorder, cache), headers={"content-type": CONTENT_TYPE_LATEST})

    return [Route("/metrics", metrics)]


def _of_engines(stats: Mapping[str, Stats]) -> Iterator[Metric]:
    for field, (name, text) in _COUNTS.items():
        yield _counter(name, text, ["model"], [((model,), getattr(one, field)) for model, one in stats.items()])
    for field, (name, text) in _GAUGES.items():
        yield _gauge(name, text, ["model"], [((model,), getattr(one, field)) for model, one in stats.items()])
    for field, end in (("queue_seconds", "start"), ("total_seconds", "end")):
        text = f"Time from a request's arrival to its {end}."
        family = HistogramMetricFamily(f"hasten_engine_{field}", text, labels=["model"])
        for model, one in stats.items():
            _add(family, [model], getattr(one, field))
        yield family


def _of_workers(stats: Mapping[str, Stats]) -> Iterator[Metric]:
    states: Counter[tuple[str, str]] = Counter()
    told: list[tuple[tuple[str, ...], WorkerStats]] = []
    for model, one in stats.items():
        states.update({(model, state): 0 for state in STATES})
        for index, worker in enumerate(one.workers):
            states[model, worker.state] += 1
            told.append(((model, str(index), worker.provider, worker.device), worker))
    yield _gauge("workers", "Workers by state.", ["model", "state"], states.items())
    labels = ["model", "worker", "provider", "device"]
    for field, (name, text) in _WORKER_GAUGES.items():
        yield _gauge(name, text, labels, [(key, getattr(worker, field)) for key, worker in told])
    for field, (name, text) in _WORKER_COUNTS.items():
        yield _counter(name, text, labels, [(key, getattr(worker, field)) for key, worker in told])


def _of_cache(stats: CacheStats) -> Iterator[Metric]:
    for name, text, value in (
        ("hits", "Requests answered from the response cache.", stats.hits),
        ("misses", "Requests that the response cache could have answered and did not.", stats.misses),
        ("errors", "Failures of the response cache's store; every request was served all the same.", stats.errors),
    ):
        yield _counter(f"response_cache_{name}", text, [], [(_ALONE, value)])
    for name, text, value in (
        ("bytes", "Bytes that the response cache holds.", stats.bytes),
        ("entries", "Values that the response cache holds.", stats.entries),
        ("working", "Whether the response cache's store can be reached.", int(stats.working)),
    ):
        yield _gauge(f"response_cache_{name}", text, [], [(_ALONE, value)])


def _gauge(name: str, text: str, labels: list[str], values: Iterable[_Pair]) -> Metric:
    family = GaugeMetricFamily(f"hasten_{name}", text, labels=labels)
    for key, value in values:
        family.add_metric(key, value)
    return family


def _counter(name: str, text: str, labels: list[str], values: Iterable[_Pair]) -> Metric:
    family = CounterMetricFamily(f"hasten_{name}", text, labels=labels)
    for key, value in values:
        family.add_metric(key, value)
    return family


def _add(family: HistogramMetricFamily, labels: list[str], histogram: Histogram) -> None:
    """Prometheus' buckets are sums of all below them."""
    total, buckets = 0, []
    for bound, count in zip((*map(str, histogram.bounds), "+Inf"), histogram.counts, strict=True):
        total += count
        buckets.append((bound, total))
    family.add_metric(labels, buckets, histogram.seconds)
