"""The application: all routes behind the gate."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import BaseRoute

from ..responses.cache import CacheStats
from . import chat, classify, completions, embeddings, inference, listing, metrics, openapi, page
from .auth import Keys
from .errors import ApiError, on_error
from .gate import Gate
from .log import Log
from .metrics import Recorder
from .models import Models
from .options import ServeOptions


class _Cors(CORSMiddleware):
    """Starlette's, but that it refuses in JSON."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """The answer to a browser that asks before it asks."""
        found = super().preflight_response(request_headers)
        if found.status_code == HTTPStatus.OK:
            return found
        told = ApiError(403, "pages of this origin may not ask so", code="cors")
        return Response(told.body(""), 403, {"vary": "Origin"}, "application/json")


def routes_of(
    models: Models, options: ServeOptions, recorder: Recorder, cache: Callable[[], CacheStats] | None
) -> list[BaseRoute]:
    """Every path."""
    return [
        *listing.routes(models),
        *embeddings.routes(models, timeout=options.timeout),
        *completions.routes(models, timeout=options.timeout),
        *chat.routes(models, timeout=options.timeout),
        *classify.routes(models, timeout=options.timeout),
        *inference.routes(models, timeout=options.timeout),
        *metrics.routes(models, recorder, cache=cache),
        *page.routes(models, recorder, cache=cache),
        *openapi.routes(keys=options.api_keys is not None),
    ]


def build_app(
    models: Models,
    options: ServeOptions,
    *,
    keys: Callable[[], Keys | None] = lambda: None,
    log: Log | None = None,
    cache: Callable[[], CacheStats] | None = None,
) -> Starlette:
    """The ASGI application of a server.

    Args:
        models: What it answers with; started and closed by the caller.
        options: Limits.
        keys: The API keys of now; None: anybody may ask.
        log: Told of each request; None: standard error.
        cache: Tells what the response cache did; None: there is none.
    """
    recorder = Recorder()
    middleware = [Middleware(Gate, models=models, options=options, keys=keys, log=log or Log())]
    if options.cors:
        methods, headers = ["GET", "POST"], ["authorization", "content-type"]
        cors = Middleware(_Cors, allow_origins=list(options.cors), allow_methods=methods, allow_headers=headers)
        middleware.insert(0, cors)
    middleware.insert(0, Middleware(metrics.Meter, recorder=recorder))
    told = {HTTPException: on_error}  # all else is told by the gate
    routes = routes_of(models, options, recorder, cache)
    app = Starlette(routes=routes, middleware=middleware, exception_handlers=told)
    app.router.redirect_slashes = False  # a redirect would name the Host that the client made up
    return app
