"""POST /v1/embeddings."""

from __future__ import annotations

import asyncio
import base64

import numpy as np
import orjson
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from artifacts.errors import UsageError

from .errors import ApiError
from .exchange import exchange_of
from .generation import call_of
from .models import Models, Served, UnknownModelError
from .schemas import EmbeddingRequest

TASK = "feature-extraction"
_LARGE = 1 << 16
"""Numbers of an answer that is written on another thread: others need not wait for it."""


def routes(models: Models, *, timeout: float) -> list[BaseRoute]:
    """The path of embeddings; ``timeout``: longest seconds for an answer."""

    async def embeddings(request: Request) -> Response:
        return await _embeddings(models, timeout, request)

    return [Route("/v1/embeddings", embeddings, methods=["POST"])]


async def _embeddings(models: Models, timeout: float, request: Request) -> Response:
    asked = EmbeddingRequest.model_validate_json(await request.body())
    served, adapter = models.find(asked.model)
    if adapter:
        raise UnknownModelError(f"{served.name} has no adapters", "Adapters are for language models")
    texts = _texts(asked)
    if served.task != TASK:
        raise UsageError(f"{served.name} is a {served.task} model: it embeds no texts", "GET /v1/models lists all")
    call = call_of(asked, timeout)
    with models.use(served) as engine:
        answer = await engine.ask("embed", texts, call)
    vectors = answer.arrays["embedding"]
    if asked.dimensions is not None and asked.dimensions != vectors.shape[1]:
        told = f"{served.name} has {vectors.shape[1]} dimensions, and they are not cut"
        raise ApiError(400, told, param="dimensions", code="invalid_value")
    exchange_of(request).note(model=served.name, rows=len(texts), tokens_in=answer.tokens, cached=answer.cached)
    if vectors.size > _LARGE:
        body = await asyncio.to_thread(_body, served, vectors, answer.tokens, asked.encoding_format)
    else:
        body = _body(served, vectors, answer.tokens, asked.encoding_format)
    return Response(body, media_type="application/json")


def _texts(asked: EmbeddingRequest) -> list[str]:
    """The texts of a request.

    Raises:
        ApiError: There are none, or they are token ids.
    """
    given = [asked.input] if isinstance(asked.input, str) else asked.input
    if not given:
        raise ApiError(400, "input holds no text", param="input", code="invalid_value")
    texts = [one for one in given if isinstance(one, str)]
    if len(texts) < len(given):
        told = "input holds token ids, which belong to the tokenizer of one model: send the text"
        raise ApiError(400, told, param="input", code="invalid_value")
    return texts


def _body(served: Served, vectors: NDArray[np.float32], tokens: int, form: str) -> bytes:
    """The answer; vectors float32 [n, d]."""
    told: list[object]
    if form == "base64":
        told = [base64.b64encode(row.astype("<f4", copy=False).tobytes()).decode() for row in vectors]
    else:
        told = list(np.ascontiguousarray(vectors, np.float32))
    document = {
        "object": "list",
        "data": [{"object": "embedding", "index": index, "embedding": one} for index, one in enumerate(told)],
        "model": served.name,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)
