"""``/openapi.json``: the OpenAPI 3.1 document of every path, its schemas made from the models that check requests."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import orjson
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from . import answers, classify, page, schemas

_TEMPLATE = "#/components/schemas/{model}"
_REFUSALS = {
    400: "The request makes no sense; the text says what to do.",
    401: "The API key is missing, or not known.",
    403: "A page of another origin asked.",
    404: "There is no such model.",
    405: "The path does not take this method.",
    408: "The request came too slowly.",
    413: "The body is too large.",
    421: "The server is not called that.",
    429: "Too many requests; `Retry-After` says when to come again.",
    431: "The headers are too large.",
    503: "The server is starting or ending, or a worker failed; come again.",
}
_FAILURES = {500: "The model failed.", 501: "An optional package is not installed.", 504: "The time was over."}


@dataclass(frozen=True)
class Operation:
    """A path and a method.

    Attributes:
        method: ``get`` or ``post``.
        path: With parameters in braces.
        summary: What it does.
        answer: Schema of the answer; None: it is of another media type.
        asks: Schema of the body; None: there is none.
        tag: Where it is listed.
        media: Media types of an answer that is no JSON, or may be something else.
        works: It runs a model, so it can fail or be too late.
        example: A body.
        also: A status under which the same answer comes, such as 503 of what is not ready.
        open: Needs no API key.
    """

    method: str
    path: str
    summary: str
    answer: type[BaseModel] | None = None
    asks: type[BaseModel] | None = None
    tag: str = "OpenAI"
    media: tuple[str, ...] = ()
    works: bool = False
    example: dict[str, Any] | None = None
    also: int = 0
    open: bool = False


_INFER = {"inputs": [{"name": "text", "shape": [1], "datatype": "BYTES", "data": ["some text"]}]}
_EVENTS = ("text/event-stream",)
_V2 = "Open Inference Protocol"
OPERATIONS = (
    Operation("get", "/v1/models", "The models that are served.", answers.ModelList),
    Operation("get", "/v1/models/{name}", "One of them.", answers.Model),
    Operation(
        "post", "/v1/embeddings", "Vectors of texts.", answers.EmbeddingAnswer, schemas.EmbeddingRequest,
        works=True, example={"input": ["some text"]},
    ),
    Operation(
        "post", "/v1/completions", "Texts that go on.", answers.CompletionAnswer, schemas.CompletionRequest,
        media=_EVENTS, works=True, example={"prompt": "Once upon a time", "max_tokens": 8},
    ),
    Operation(
        "post", "/v1/chat/completions", "The next message of a conversation.", answers.ChatAnswer, schemas.ChatRequest,
        media=_EVENTS, works=True, example={"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8},
    ),
    Operation(
        "post", "/classify", "Labels of texts.", classify.ClassifyAnswer, classify.ClassifyRequest, "hasten",
        works=True, example={"texts": ["some text"]},
    ),
    Operation("get", "/v2", "Name, version and extensions of the server.", answers.Server, tag=_V2),
    Operation("get", "/v2/health/live", "Whether the server answers.", answers.Live, tag=_V2, open=True),
    Operation("get", "/v2/health/ready", "Whether all can answer.", answers.Ready, tag=_V2, also=503, open=True),
    *(
        operation
        for path in ("/v2/models/{name}", "/v2/models/{name}/versions/{version}")
        for operation in (
            Operation("get", path, "What a model takes and gives.", answers.ModelMetadata, tag=_V2),
            Operation("get", f"{path}/ready", "Whether a model can answer.", answers.ModelReady, tag=_V2, also=503),
            Operation(
                "post", f"{path}/infer", "Run a model on tensors, or on texts.", answers.InferenceAnswer,
                answers.InferenceRequest, _V2, media=("application/octet-stream",), works=True, example=_INFER,
            ),
        )
    ),
    Operation("get", "/load", "What the server does just now; the page reads it.", page.LoadAnswer, tag="hasten"),
    Operation("get", "/metrics", "Counts for Prometheus.", tag="hasten", media=("text/plain",)),
    Operation("get", "/healthz", "Whether the server answers.", answers.Status, tag="hasten", open=True),
    Operation("get", "/readyz", "Whether it takes work.", answers.Status, tag="hasten", also=503, open=True),
    Operation("get", "/openapi.json", "This document.", tag="hasten", media=("application/json",), open=True),
    *(
        Operation("get", path, "The built-in page.", tag="hasten", media=(media.partition(";")[0],), open=True)
        for path, (_, media) in page.FILES.items()
    ),
)  # fmt: skip
"""Every path that the server answers."""


def routes(*, keys: bool) -> list[BaseRoute]:
    """``/openapi.json``; ``keys``: whether requests must carry a key."""
    text = orjson.dumps(document(keys=keys))

    async def openapi(request: Request) -> Response:
        return Response(text, media_type="application/json")

    return [Route("/openapi.json", openapi)]


def document(*, keys: bool) -> dict[str, Any]:
    """The OpenAPI document; ``keys``: whether requests must carry a key."""
    used = dict.fromkeys(model for one in OPERATIONS for model in (one.asks, one.answer) if model is not None)
    used |= dict.fromkeys((answers.Error, answers.ProtocolError))
    _, found = models_json_schema([(model, "validation") for model in used], ref_template=_TEMPLATE)
    components: dict[str, Any] = {"schemas": found["$defs"]}
    if keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    paths: dict[str, dict[str, Any]] = {}
    for one in OPERATIONS:
        paths.setdefault(one.path, {})[one.method] = _operation(one, keys=keys and not one.open)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "hasten",
            "version": _version(),
            "description": "Compiled models behind OpenAI's interface and the Open Inference Protocol.",
        },
        "paths": paths,
        "components": components,
    }


def _operation(one: Operation, *, keys: bool) -> dict[str, Any]:
    told: dict[str, Any] = {
        "summary": one.summary,
        "tags": [one.tag],
        "operationId": _identity(one),
        "responses": {str(status): answer for status, answer in sorted(_responses(one).items())},
    }
    if parameters := [name for name in ("name", "version") if f"{{{name}}}" in one.path]:
        told["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            for name in parameters
        ]
    if one.asks is not None:
        content: dict[str, Any] = {"schema": _ref(one.asks)}
        if one.example is not None:
            content["example"] = one.example
        told["requestBody"] = {"required": True, "content": {"application/json": content}}
    if keys:
        told["security"] = [{"key": []}]
    return told


def _responses(one: Operation) -> dict[int, dict[str, Any]]:
    error = answers.ProtocolError if one.path.startswith("/v2") else answers.Error
    statuses = _REFUSALS | (_FAILURES if one.works else {})
    found = {status: _answer(text, error) for status, text in statuses.items()}
    found[429]["headers"] = {"Retry-After": {"schema": {"type": "string"}, "description": "Seconds."}}
    found[200] = _answer("The answer.", one.answer, one.media)
    if one.also and one.answer is not None:
        either = {"anyOf": [_ref(one.answer), _ref(error)]}
        found[one.also] = {"description": "Not now.", "content": {"application/json": {"schema": either}}}
    return found


def _answer(text: str, model: type[BaseModel] | None, media: Iterable[str] = ()) -> dict[str, Any]:
    content: dict[str, Any] = {kind: {"schema": {}} for kind in media}
    if model is not None:
        content["application/json"] = {"schema": _ref(model)}
    return {"description": text, "content": content}


def _ref(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _TEMPLATE.format(model=model.__name__)}


def _identity(one: Operation) -> str:
    """A name for code generators: of method and path."""
    words = "".join(letter if letter.isalnum() else " " for letter in one.path).split()
    return "_".join((one.method, *words)) if words else f"{one.method}_page"


def _version() -> str:
    try:
        return version("hasten")
    except PackageNotFoundError:
        return "0"
