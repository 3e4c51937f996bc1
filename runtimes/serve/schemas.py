"""What requests of OpenAI's interface may hold. A value of another type is refused, and so is a field nobody knows.

Fields that clients send and that have nothing to say here (`user`, `store`, `metadata` …) are taken and ignored; those
that ask for what is not offered are refused by name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Count = Annotated[int, Field(ge=1, le=1 << 31)]
Seed = Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)]
_MOST_TEXTS = 128
_IGNORED = "Taken for the clients that send it; nothing depends on it."


class Strict(BaseModel):
    """JSON types as they stand: no number is made of a text."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class _Asked(Strict):
    """Of every request.

    Attributes:
        model: Name of the model, or ``name:adapter``; None: the only one.
        user: Ignored.
        priority: hasten's own: -10 to 10, higher first.
        timeout: hasten's own: seconds after which the answer is worthless.
    """

    model: str | None = None
    user: str | None = Field(None, description=_IGNORED)
    priority: Annotated[int, Field(ge=-10, le=10)] = 0
    timeout: Annotated[float, Field(gt=0, le=86400)] | None = None


class EmbeddingRequest(_Asked):
    """POST /v1/embeddings."""

    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Count | None = None


class StreamOptions(Strict):
    """What a stream tells beside the text."""

    include_usage: bool = False
    include_obfuscation: bool | None = Field(None, description=_IGNORED)


class JsonSchema(Strict):
    """A JSON schema by OpenAI's name."""

    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """What form an answer has to take."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise ValueError("json_schema has no schema")
        return self


class _Generation(_Asked):
    """What both interfaces of text generation take."""

    max_tokens: Count | None = None
    temperature: float | None = None
    top_p: float | None = None
    n: Annotated[int, Field(ge=1, le=_MOST_TEXTS)] | None = None
    stop: str | list[str] | None = None
    seed: Seed | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    regex: str | None = None
    choices: list[str] | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        given = [name for name in ("regex", "choices") if getattr(self, name) is not None]
        if self.response_format is not None and self.response_format.type != "text":
            given.append("response_format")
        if len(given) > 1:
            raise ValueError(f"{given[0]} and {given[1]} were both given")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options are for stream: true")
        return self


class CompletionRequest(_Generation):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=100)] | None = None
    best_of: Annotated[int, Field(ge=1, le=_MOST_TEXTS)] | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _offered(self) -> Self:
        if self.suffix:
            raise ValueError("suffix is not offered: the model only goes on with a text")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise ValueError("best_of is not offered, unless it is n")
        if self.echo and self.logprobs is not None:
            raise ValueError("logprobs of the prompt are not offered: leave out echo or logprobs")
        return self


class Part(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: str
    text: str | None = None


class Message(BaseModel):
    """A message of a chat; what else it holds is the chat template's business."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    role: str
    content: str | list[Part] | None = None
    tool_calls: list[dict[str, Any]] | None = None


class Function(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    """A tool."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    type: Literal["function"] = "function"
    function: Function


class ChatRequest(_Generation):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=100)] | None = None
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    modalities: list[Literal["text"]] | None = None
    parallel_tool_calls: bool | None = Field(None, description=_IGNORED)
    store: bool | None = Field(None, description=_IGNORED)
    metadata: dict[str, Any] | None = Field(None, description=_IGNORED)
    service_tier: str | None = Field(None, description=_IGNORED)
    prediction: dict[str, Any] | None = Field(None, description=_IGNORED)
    verbosity: str | None = Field(None, description=_IGNORED)
    safety_identifier: str | None = Field(None, description=_IGNORED)
    prompt_cache_key: str | None = Field(None, description=_IGNORED)
    prompt_cache_retention: str | None = Field(None, description=_IGNORED)

    @model_validator(mode="after")
    def _offered(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is for logprobs: true")
        if self.tool_choice not in (None, "auto", "none"):
            raise ValueError("tool_choice is 'auto' or 'none' here: no call can be forced")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens differ")
        return self
