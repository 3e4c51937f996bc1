"""POST /v1/completions: texts go on."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from ..generate.results import Generated
from .errors import ApiError
from .exchange import exchange_of
from .generation import FINISH, Work, prepare, usage_of, writing
from .models import Models
from .schemas import CompletionRequest
from .sse import DONE, event, stream

Prompt = str | list[int]
DEFAULT_TOKENS = 16
"""Tokens where a request names no number, as OpenAI's interface has it."""
_MOST_PROMPTS = 1024


def routes(models: Models, *, timeout: float) -> list[BaseRoute]:
    """The path of completions; ``timeout``: longest seconds for an answer."""

    async def completions(request: Request) -> Response:
        asked = CompletionRequest.model_validate_json(await request.body())
        prompts = _prompts(asked)
        work = await prepare(models, asked, exchange_of(request), timeout, ("cmpl", "text_completion"))
        work.options["max_new_tokens"] = asked.max_tokens or DEFAULT_TOKENS
        if asked.logprobs is not None:
            work.options["logprobs"] = asked.logprobs
        if asked.stream:
            return await stream(_events(work, asked, prompts), work.exchange)
        return Response(orjson.dumps(await _answer(work, asked, prompts)), media_type="application/json")

    return [Route("/v1/completions", completions, methods=["POST"])]


async def _answer(work: Work, asked: CompletionRequest, prompts: list[Prompt]) -> dict[str, object]:
    with work.models.use(work.served) as engine:
        found = await engine.generate(prompts, call=work.call, **work.options)
    texts: list[list[Generated]] = [one if isinstance(one, list) else [one] for one in found]
    usage = usage_of(texts)
    work.note(usage)
    choices = [
        _choice(work, prompt * work.n + index, _echo(asked, prompts[prompt]) + one.text, one)
        for prompt, several in enumerate(texts)
        for index, one in enumerate(several)
    ]
    return {**work.head, "choices": choices, "usage": usage}


async def _events(work: Work, asked: CompletionRequest, prompts: list[Prompt]) -> AsyncGenerator[bytes, None]:
    told = asked.stream_options is not None and asked.stream_options.include_usage
    extra: dict[str, object] = {"usage": None} if told else {}
    found: dict[int, dict[int, Generated]] = {}
    begun: set[int] = set()
    with work.models.use(work.served) as engine:
        async with writing(engine, prompts, work) as pieces:
            async for piece in pieces:
                index = piece.prompt * work.n + piece.index
                text = piece.text if index in begun else _echo(asked, prompts[piece.prompt]) + piece.text
                begun.add(index)
                if piece.result is not None:
                    found.setdefault(piece.prompt, {})[piece.index] = piece.result
                if text or piece.result is not None:
                    yield event({**work.head, "choices": [_choice(work, index, text, piece.result)], **extra})
    usage = usage_of(list(texts.values()) for texts in found.values())
    work.note(usage)
    if told:
        yield event({**work.head, "choices": [], "usage": usage})
    yield DONE


def _choice(work: Work, index: int, text: str, result: Generated | None) -> dict[str, object]:
    """A choice; the probabilities of a text that is streamed come with its end."""
    told = work.texts.completion(result.logprobs) if work.texts is not None and result is not None else None
    finish = None if result is None else FINISH[result.finish]
    return {"index": index, "text": text, "logprobs": told, "finish_reason": finish}


def _prompts(asked: CompletionRequest) -> list[Prompt]:
    """The prompts of a request, one or several.

    Raises:
        ApiError: There are none or too many, one is empty, or there are ids that are to be echoed as text.
    """
    given = asked.prompt
    prompts: list[Prompt] = []
    if isinstance(given, str):
        prompts = [given]
    elif given and isinstance(given[0], int):
        prompts = [[one for one in given if isinstance(one, int)]]
    else:
        prompts = [one for one in given if not isinstance(one, int)]
    if not prompts or len(prompts) > _MOST_PROMPTS:
        told = f"a request has 1 to {_MOST_PROMPTS} prompts, and this one {len(prompts)}"
        raise ApiError(400, told, param="prompt", code="invalid_value")
    if not all(prompts):
        raise ApiError(400, "a prompt is empty", param="prompt", code="invalid_value")
    if asked.echo and not all(isinstance(one, str) for one in prompts):
        raise ApiError(400, "token ids are not echoed: send the text", param="echo", code="invalid_value")
    return prompts


def _echo(asked: CompletionRequest, prompt: Prompt) -> str:
    return prompt if asked.echo and isinstance(prompt, str) else ""
