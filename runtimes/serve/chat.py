"""POST /v1/chat/completions: the next message of a conversation."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from artifacts.errors import BundleError

from ..generate.results import Generated, Piece
from .errors import ApiError
from .exchange import exchange_of
from .generation import FINISH, Work, prepare, usage_of, writing
from .models import Models
from .schemas import ChatRequest, Message
from .sse import DONE, event, stream
from .tools import ToolCall, ToolParser, split_calls

_ROLES = {"developer": "system"}
"""Roles that OpenAI renamed -> what chat templates know."""
_TEMPLATE = "chat template"


def routes(models: Models, *, timeout: float) -> list[BaseRoute]:
    """The path of chats; ``timeout``: longest seconds for an answer."""

    async def chat(request: Request) -> Response:
        asked = ChatRequest.model_validate_json(await request.body())
        messages = [_message(index, one) for index, one in enumerate(asked.messages)]
        work = await prepare(models, asked, exchange_of(request), timeout, ("chatcmpl", _object(asked)))
        work.options.update(_chat_options(asked))
        try:
            if asked.stream:
                return await stream(_events(work, asked, messages), work.exchange)
            return Response(orjson.dumps(await _answer(work, asked, messages)), media_type="application/json")
        except BundleError as error:
            if _TEMPLATE not in error.what:
                raise
            told = f"the model's chat template fails on these messages: {error.what}"
            raise ApiError(400, told, param="messages", code="chat_template_failed") from error

    return [Route("/v1/chat/completions", chat, methods=["POST"])]


async def _answer(work: Work, asked: ChatRequest, messages: list[dict[str, Any]]) -> dict[str, object]:
    with work.models.use(work.served) as engine:
        found = await engine.generate(messages, call=work.call, **work.options)
    texts: list[Generated] = found if isinstance(found, list) else [found]
    usage = usage_of([texts])
    work.note(usage)
    choices = []
    for index, one in enumerate(texts):
        said, calls = split_calls(one.text) if _may_call(asked) else (one.text, [])
        message: dict[str, object] = {"role": "assistant", "content": None if calls and not said else said}
        if calls:
            message["tool_calls"] = [call.to_dict() for call in calls]
        choices.append(_choice(work, index, one, calls=bool(calls)) | {"message": message | {"refusal": None}})
    return {**work.head, "choices": choices, "usage": usage}


async def _events(work: Work, asked: ChatRequest, messages: list[dict[str, Any]]) -> AsyncGenerator[bytes, None]:
    told = asked.stream_options is not None and asked.stream_options.include_usage
    extra: dict[str, object] = {"usage": None} if told else {}
    voices = [_Voice(work, index, tools=_may_call(asked)) for index in range(work.n)]
    with work.models.use(work.served) as engine:
        async with writing(engine, messages, work) as pieces:
            async for piece in pieces:
                for choice in voices[piece.index].choices(piece):
                    yield event({**work.head, "choices": [choice], **extra})
    usage = usage_of([[voice.result for voice in voices if voice.result is not None]])
    work.note(usage)
    if told:
        yield event({**work.head, "choices": [], "usage": usage})
    yield DONE


class _Voice:
    """One of the texts of a stream."""

    def __init__(self, work: Work, index: int, *, tools: bool) -> None:
        self.result: Generated | None = None
        self._work = work
        self._index = index
        self._parser = ToolParser() if tools else None
        self._begun = False
        self._calls = 0

    def choices(self, piece: Piece) -> list[dict[str, object]]:
        """What a piece adds, as the choices of as many events."""
        found: list[dict[str, object]] = []
        if not self._begun:
            self._begun = True
            found.append(self._delta({"role": "assistant", "content": ""}))
        parts: list[str | ToolCall] = [piece.text] if piece.text else []
        if self._parser is not None:
            parts = self._parser.push(piece.text) + (self._parser.flush() if piece.result is not None else [])
        for part in parts:
            if isinstance(part, str):
                found.append(self._delta({"content": part}))
                continue
            found.append(self._delta({"tool_calls": [{"index": self._calls, **part.to_dict()}]}))
            self._calls += 1
        if piece.result is not None:
            self.result = piece.result
            found.append(_choice(self._work, self._index, piece.result, calls=self._calls > 0) | {"delta": {}})
        return found

    def _delta(self, delta: Mapping[str, object]) -> dict[str, object]:
        return {"index": self._index, "delta": delta, "logprobs": None, "finish_reason": None}


def _choice(work: Work, index: int, result: Generated, *, calls: bool) -> dict[str, object]:
    """What is said of a text at its end."""
    told = None if work.texts is None else work.texts.chat(result.logprobs)
    finish = "tool_calls" if calls and result.finish == "stop" else FINISH[result.finish]
    return {"index": index, "logprobs": told, "finish_reason": finish}


def _chat_options(asked: ChatRequest) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if (most := asked.max_completion_tokens or asked.max_tokens) is not None:
        found["max_new_tokens"] = most
    if asked.logprobs:
        found["logprobs"] = asked.top_logprobs or 0
    if _may_call(asked):
        found["tools"] = [tool.model_dump(exclude_none=True) for tool in asked.tools or ()]
    variables = dict(asked.chat_template_kwargs or {})
    if asked.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", asked.reasoning_effort)
    if variables:
        found["template_variables"] = variables
    return found


def _message(index: int, given: Message) -> dict[str, Any]:
    """A message as chat templates read it: its content one text, the arguments of its calls objects.

    Raises:
        ApiError: A part of it is no text.
    """
    told = given.model_dump(exclude_none=True)
    told["role"] = _ROLES.get(given.role, given.role)
    if isinstance(given.content, list):
        if other := next((part.type for part in given.content if part.type != "text" or part.text is None), None):
            what = f"a part of message {index} is {other[:40]!r}, and the model takes texts alone"
            raise ApiError(400, what, param=f"messages.{index}.content", code="invalid_value")
        told["content"] = "".join(part.text or "" for part in given.content)
    told.setdefault("content", "")
    for call in told.get("tool_calls", ()):
        function = call.get("function")
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = orjson.loads(function["arguments"])
            except orjson.JSONDecodeError:
                continue
    return told


def _may_call(asked: ChatRequest) -> bool:
    return bool(asked.tools) and asked.tool_choice != "none"


def _object(asked: ChatRequest) -> str:
    return "chat.completion.chunk" if asked.stream else "chat.completion"
