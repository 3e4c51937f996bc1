"""GET /v1/models, /healthz and /readyz."""

from __future__ import annotations

from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from .generation import adapters_of
from .models import Models, Served, UnknownModelError


def routes(models: Models) -> list[BaseRoute]:
    """The paths that tell what is there."""

    async def health(request: Request) -> Response:
        return _json({"status": "ok"})

    async def ready(request: Request) -> Response:
        status = "ending" if models.draining else "ready" if models.ready else "not ready"
        return _json({"status": status}, 200 if models.ready else 503)

    async def listed(request: Request) -> Response:
        return _json({"object": "list", "data": [one for served in models for one in _entries(served)]})

    async def one(request: Request) -> Response:
        name = request.path_params["name"]
        served, adapter = models.find(name)
        for entry in _entries(served):
            if entry["id"] == (f"{served.name}:{adapter}" if adapter else served.name):
                return _json(entry)
        raise UnknownModelError(f"{served.name} has no adapter {adapter[:200]!r}", "GET /v1/models lists all")

    return [
        Route("/healthz", health),
        Route("/readyz", ready),
        Route("/v1/models", listed),
        Route("/v1/models/{name:path}", one),
    ]


def _entries(served: Served) -> list[dict[str, Any]]:
    """A model and its adapters."""
    processor = served.manifest.processor
    entry: dict[str, Any] = {
        "id": served.name,
        "object": "model",
        "created": int(served.since),
        "owned_by": "hasten",
        "task": served.task,
        "digest": served.engine.bundle.digest,
        "context": None if processor is None else processor.max_length,
        "reload_failure": served.failure or None,
    }
    return [entry, *(entry | {"id": f"{served.name}:{name}", "parent": served.name} for name in adapters_of(served))]


def _json(document: object, status: int = 200) -> Response:
    return Response(orjson.dumps(document), status_code=status, media_type="application/json")
