"""What both interfaces of text generation share: options for the engine, usage, and the reasons why a text ends."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from artifacts.digest import sha256_bytes
from artifacts.errors import UsageError, WorkerError

from ..engine.calls import Call
from ..generate.results import Generated, Piece
from .errors import ApiError
from .exchange import Exchange
from .models import Models, Served, UnknownModelError
from .schemas import ChatRequest, CompletionRequest, EmbeddingRequest
from .tokens import TokenTexts

if TYPE_CHECKING:
    from ..engine.engine import Engine

TASK = "text-generation"
FINISH = {"stop": "stop", "length": "length", "time": "length", "cancelled": "stop", "constraint": "length"}
"""Why a text ended -> OpenAI's ``finish_reason``."""
_SAME = (
    *("temperature", "top_p", "top_k", "min_p", "n", "frequency_penalty", "presence_penalty", "repetition_penalty"),
    *("regex", "choices"),
)
_SEEDS = 1 << 63


@dataclass(frozen=True)
class Work:
    """A request that was checked as far as it can be before anything runs.

    Attributes:
        models: What is served.
        served: The model that was asked.
        options: Of the engine's ``generate``.
        call: How the engine treats it.
        texts: Of the model's tokens, where their probabilities were asked for.
        exchange: The request that it came with.
        head: What every document of the answer begins with.
        n: Texts of each prompt.
    """

    models: Models
    served: Served
    options: dict[str, Any]
    call: Call
    texts: TokenTexts | None
    exchange: Exchange
    head: dict[str, object]
    n: int

    def note(self, usage: Mapping[str, int]) -> None:
        """Tell the log of the tokens."""
        self.exchange.note(tokens_in=usage["prompt_tokens"], tokens_out=usage["completion_tokens"])


def writing(engine: Engine, prompt: object, work: Work) -> aclosing[AsyncGenerator[Piece, None]]:
    """The pieces of the texts of a prompt, or of several; leaving the block ends the work."""
    pieces = engine.stream(prompt, call=work.call, **work.options)
    return aclosing(cast("AsyncGenerator[Piece, None]", pieces))


async def prepare(
    models: Models, asked: CompletionRequest | ChatRequest, exchange: Exchange, timeout: float, kinds: tuple[str, str]
) -> Work:
    """Find the model, and read the options of a request.

    Args:
        models: What is served.
        asked: The request.
        exchange: It on the wire.
        timeout: Longest seconds for an answer.
        kinds: What the answer's id begins with, and its ``object``.

    Raises:
        UnknownModelError: There is no such model or adapter.
        UsageError: It is no language model.
        ApiError: An option makes no sense.
    """
    served, adapter = generator_of(models, asked.model)
    exchange.note(model=served.name, adapter=adapter)
    options = options_of(asked, adapter)
    wanted = asked.logprobs is not None and asked.logprobs is not False
    texts = await token_texts(served) if wanted else None
    head: dict[str, object] = {
        "id": f"{kinds[0]}-{secrets.token_hex(12)}",
        "object": kinds[1],
        "created": int(time.time()),
        "model": asked.model or served.name,
        "system_fingerprint": fingerprint(served),
    }
    return Work(models, served, options, call_of(asked, timeout), texts, exchange, head, asked.n or 1)


def call_of(request: EmbeddingRequest | CompletionRequest | ChatRequest, most: float) -> Call:
    """How the engine treats a request; ``most``: seconds that any may take."""
    return Call(priority=request.priority, timeout=min(request.timeout or most, most))


def generator_of(models: Models, name: str | None) -> tuple[Served, str]:
    """The language model that a request names, and its adapter.

    Raises:
        UnknownModelError: There is none of that name, or no such adapter.
        UsageError: It is no language model.
    """
    served, adapter = models.find(name)
    if served.task != TASK:
        raise UsageError(f"{served.name} is a {served.task} model: it writes no texts", _elsewhere(served.task))
    if adapter and adapter not in adapters_of(served):
        known = ", ".join(adapters_of(served)) or "none"
        raise UnknownModelError(f"{served.name} has no adapter {adapter[:200]!r}", f"It has {known}")
    return served, adapter


def adapters_of(served: Served) -> list[str]:
    """Names of a model's adapters."""
    return [one.name for one in served.manifest.adapters or ()]


def options_of(request: CompletionRequest | ChatRequest, adapter: str) -> dict[str, Any]:
    """Options of the engine's ``generate``; what the request leaves open is left to the model.

    Raises:
        ApiError: A token of ``logit_bias`` is none.
    """
    found = {name: getattr(request, name) for name in _SAME}
    found["stop"] = request.stop or None
    found["seed"] = None if request.seed is None else request.seed % _SEEDS
    found["bias"] = _bias(request.logit_bias) if request.logit_bias else None
    found["adapter"] = adapter or None
    form = request.response_format
    if form is not None and form.type == "json_object":
        found["schema"] = {"type": "object"}
    elif form is not None and form.json_schema is not None:
        found["schema"] = form.json_schema.schema_
    return {name: value for name, value in found.items() if value is not None}


def usage_of(prompts: Iterable[list[Generated]]) -> dict[str, int]:
    """Tokens read and written, given the texts of each prompt; a prompt of several texts is read once."""
    read = written = 0
    for texts in prompts:
        read += texts[0].prompt_tokens
        written += sum(len(one.tokens) for one in texts)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def fingerprint(served: Served) -> str:
    """``system_fingerprint``: which bundle answers."""
    return "hasten-" + served.engine.bundle.digest.rpartition(":")[2][:12]


async def token_texts(served: Served) -> TokenTexts:
    """The tokens of a model; read when first asked for.

    Raises:
        BundleError: Its tokenizer cannot be read.
        WorkerError: The bundle was replaced, and its successor is not here yet.
    """
    if served.tokens is None:
        served.tokens = await asyncio.to_thread(_read_tokens, served)
    return served.tokens


def _read_tokens(served: Served) -> TokenTexts:
    name = served.manifest.processor.tokenizer if served.manifest.processor is not None else ""
    stated = {entry.path: entry.sha256 for entry in served.manifest.files}
    try:
        data = (served.engine.bundle.path / name).read_bytes()
    except OSError:
        data = b""
    if sha256_bytes(data) != stated.get(name):
        raise WorkerError(f"the bundle of {served.name} was replaced just now", "Try again")
    return TokenTexts(data)


def _bias(given: dict[str, float]) -> dict[int, float]:
    for token in given:
        if not token.isascii() or not token.isdigit() or len(token) > 9:
            raise ApiError(400, f"logit_bias: {token[:40]!r} is no token id", param="logit_bias", code="invalid_value")
    return {int(token): value for token, value in given.items()}


def _elsewhere(task: str) -> str:
    paths = {"feature-extraction": "/v1/embeddings", "text-classification": "/classify"}
    return f"Ask it at {paths.get(task, '/v2')}"
