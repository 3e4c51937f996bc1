"""``/classify``: texts to the labels of a classifier."""

from __future__ import annotations

from typing import Annotated

import orjson
from pydantic import BaseModel, Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from artifacts.errors import UsageError

from ..engine.calls import MOST_PRIORITY, Call
from .exchange import exchange_of
from .models import Models, UnknownModelError
from .schemas import Strict

TASK = "text-classification"
MOST_TEXTS = 1 << 16
Pair = Annotated[list[str], Field(min_length=2, max_length=2)]


class ClassifyRequest(Strict):
    """POST /classify.

    Attributes:
        model: Name of the model; None: the only one.
        texts: Texts, or pairs of texts where the model was trained on pairs.
        priority: -10 to 10, higher first.
        timeout: Seconds after which the answer is worthless.
    """

    model: str | None = None
    texts: Annotated[list[str | Pair], Field(min_length=1, max_length=MOST_TEXTS)]
    priority: Annotated[int, Field(ge=-MOST_PRIORITY, le=MOST_PRIORITY)] = 0
    timeout: Annotated[float, Field(gt=0, le=86400)] | None = None


class Label(BaseModel):
    """The class of a text."""

    label: str = Field(description="Name of the best class.")
    score: float = Field(description="Its score: a probability, or the raw value of a regression.")
    scores: dict[str, float] = Field(description="Score of every class.")


class TextUsage(BaseModel):
    """What it took."""

    tokens: int = Field(ge=0, description="Tokens read, special tokens included.")


class ClassifyAnswer(BaseModel):
    """A label for each text, in order."""

    model: str
    results: list[Label]
    usage: TextUsage


def routes(models: Models, *, timeout: float) -> list[BaseRoute]:
    """The path of labels; ``timeout``: longest seconds for an answer."""

    async def classify(request: Request) -> Response:
        asked = ClassifyRequest.model_validate_json(await request.body())
        served, adapter = models.find(asked.model)
        if adapter:
            raise UnknownModelError(f"a classifier has no adapter {adapter[:100]!r}", "Leave it out")
        if served.task != TASK:
            raise UsageError(f"{served.name} is a {served.task} model: it gives no labels", "GET /v1/models lists all")
        records = [{"text": one} if isinstance(one, str) else dict(zip(_PAIR, one, strict=True)) for one in asked.texts]
        call = Call(asked.priority, min(asked.timeout or timeout, timeout))
        with models.use(served) as engine:
            answer = await engine.ask("rows", records, call)
        exchange_of(request).note(model=served.name, rows=len(records), tokens_in=answer.tokens, cached=answer.cached)
        found = {"model": served.name, "results": answer.rows, "usage": {"tokens": answer.tokens}}
        return Response(orjson.dumps(found), media_type="application/json")

    return [Route("/classify", classify, methods=["POST"])]


_PAIR = ("text", "text_pair")
