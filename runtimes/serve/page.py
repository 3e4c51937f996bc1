"""The built-in page at ``/`` and what it polls, ``/load``: models, what runs where and why, live load, a try-it box.

The page is three files of this package and asks for nothing from anywhere else, which its Content-Security-Policy
holds it to. It needs no key itself; what it asks for does, and then it asks its reader.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from hashlib import sha256
from importlib import resources
from typing import Any

import orjson
import psutil
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from artifacts.bundle import Bundle

from ..engine.stats import BOUNDS, Stats
from ..responses.cache import CacheStats
from .metrics import Recorder
from .models import Models, Served

POLICY = "; ".join(
    (
        "default-src 'none'",
        *(f"{kind}-src 'self'" for kind in ("script", "style", "connect")),
        "img-src data:",
        *(f"{what} 'none'" for what in ("base-uri", "form-action", "frame-ancestors")),
    )
)
"""Content-Security-Policy of the page: nothing inline, nothing from elsewhere, in no other page's frame."""
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}
FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/static/page.css": ("page.css", "text/css; charset=utf-8"),
    "/static/page.js": ("page.js", "text/javascript; charset=utf-8"),
}
"""Path -> file of ``static/`` and its media type."""
_FAILED = 400


class VariantInUse(BaseModel):
    """A variant of a bundle that a worker runs."""

    variant: str
    precision: str = Field(description="What most of its weights are.")
    bytes: int = Field(description="Of its graph and weights.")
    proof: str = Field(description="What was measured on it when it was compiled.")


class ModelLoad(BaseModel):
    """A model and what it did."""

    name: str
    task: str
    architecture: str = Field(description="Class of the model it was compiled from; may be empty.")
    digest: str
    ready: bool
    since: float = Field(description="Seconds of the epoch at which this bundle was ready.")
    loads: int
    failure: str = Field(description="Why the bundle that lies there now was not taken; empty: it runs.")
    chat: bool = Field(description="Whether it has a chat template.")
    pairs: bool = Field(description="Whether it takes pairs of texts.")
    mask: str = Field(description="Its mask token; empty: it has none.")
    why: list[str] = Field(description="Which variant runs where and why, in lines, as `hasten inspect` has it.")
    variants: list[VariantInUse]
    stats: Stats


class LoadAnswer(BaseModel):
    """What a server does just now."""

    now: float = Field(description="Seconds of a clock that only goes forward.")
    uptime: float = Field(description="Seconds since the server began.")
    ready: bool
    draining: bool
    rss: int = Field(description="Resident bytes of the server, without its workers.")
    active: int = Field(description="Requests that are being answered.")
    requests: int = Field(description="Requests answered since it began.")
    failed: int = Field(description="Those of them that ended with a status of 400 or more.")
    bounds: list[float] = Field(description="Upper bounds in seconds of the buckets of the histograms in `stats`.")
    cache: CacheStats | None
    models: list[ModelLoad]


def routes(models: Models, recorder: Recorder, *, cache: Callable[[], CacheStats] | None = None) -> list[BaseRoute]:
    """``/``, its files, and ``/load``.

    Args:
        models: What is served.
        recorder: Counts requests.
        cache: Tells what the response cache did; None: there is none.
    """

    async def tell(request: Request) -> Response:
        found = load(models, recorder, cache() if cache is not None else None)
        headers = {"cache-control": "no-store"}
        return Response(orjson.dumps(found), media_type="application/json", headers=headers)

    folder = resources.files(__package__).joinpath("static")
    files = [_file(path, folder.joinpath(name).read_bytes(), kind) for path, (name, kind) in FILES.items()]
    return [*files, Route("/load", tell)]


def load(models: Models, recorder: Recorder, cache: CacheStats | None) -> dict[str, Any]:
    """The document of `LoadAnswer`."""
    counted = dict(recorder.requests)
    return {
        "now": time.monotonic(),
        "uptime": time.time() - recorder.started,
        "ready": models.ready,
        "draining": models.draining,
        "rss": psutil.Process().memory_info().rss,
        "active": recorder.active,
        "requests": sum(counted.values()),
        "failed": sum(number for (_, _, status), number in counted.items() if status >= _FAILED),
        "bounds": BOUNDS,
        "cache": cache,
        "models": [_model(served) for served in models],
    }


def _model(served: Served) -> dict[str, Any]:
    manifest, bundle = served.manifest, served.engine.bundle
    stats = served.engine.stats()
    used = {worker.variant for worker in stats.workers if worker.variant}
    return {
        "name": served.name,
        "task": served.task,
        "architecture": manifest.source.architecture,
        "digest": bundle.digest,
        "ready": served.engine.ready,
        "since": served.since,
        "loads": served.loads,
        "failure": served.failure,
        "chat": bool(manifest.generation and manifest.generation.chat_template),
        "pairs": bool(manifest.processor and manifest.processor.pairs),
        "mask": manifest.processor.mask_token if manifest.processor else "",
        # The lines that are not indented name the bundle's folder, which is nobody's business.
        "why": [line[2:] for line in served.engine.explain().splitlines() if line.startswith("  ")],
        "variants": [_variant(bundle, name) for name in sorted(used)],
        "stats": stats,
    }


def _variant(bundle: Bundle, name: str) -> dict[str, Any]:
    variant = bundle.variant(name)
    return {
        "variant": name,
        "precision": variant.precision,
        "bytes": bundle.size(name),
        "proof": _proof(bundle, name),
    }


def _proof(bundle: Bundle, name: str) -> str:
    """What was measured on a variant, in a line."""
    proof = bundle.proof.variant(name)
    if proof is None or proof.status == "unproven":
        return "not measured"
    words = [proof.status + (f" on {proof.machine.cpu}" if proof.machine else "")]
    ratios = [speed.ratio for speed in proof.speed if 0.0 < speed.ratio < math.inf]
    if ratios:
        words.append(f"{math.prod(ratios) ** (1 / len(ratios)):.2f} × the speed of the reference")
    words += [f"{one.metric} {one.value:.4g}, of the reference {one.reference:.4g}" for one in proof.fidelity]
    return "; ".join(words)


def _file(path: str, content: bytes, kind: str) -> Route:
    tag = f'"{sha256(content).hexdigest()[:32]}"'

    async def answer(request: Request) -> Response:
        headers = {**HEADERS, "etag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, headers={**headers, "content-type": kind})

    return Route(path, answer)
