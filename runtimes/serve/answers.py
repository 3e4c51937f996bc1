"""What the server answers, as the OpenAPI document describes it: schemas alone, the answers are written elsewhere."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0)]
Datatype = Literal[
    "BOOL", "INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64", "FP16", "FP32", "FP64",
    "BF16", "BYTES",
]  # fmt: skip
Finish = Literal["stop", "length", "tool_calls"]


class Answer(BaseModel):
    """Exactly these fields."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetail(Answer):
    """What went wrong.

    Attributes:
        message: For people, in one line.
        type: Kind of error.
        param: The field that it is about.
        code: For programs.
    """

    message: str
    type: str
    param: str | None
    code: str | None


class Error(Answer):
    """A request that was not answered."""

    error: ErrorDetail


class ProtocolError(Answer):
    """A request of the Open Inference Protocol that was not answered."""

    error: str


class Status(Answer):
    """Whether the server can answer."""

    status: Literal["ok", "ready", "not ready", "ending"]


class Model(Answer):
    """A model, or an adapter on it."""

    id: str
    object: Literal["model"]
    created: Count
    owned_by: Literal["hasten"]
    task: str
    digest: str
    context: Count | None
    reload_failure: str | None
    parent: str | None = None


class ModelList(Answer):
    """All models."""

    object: Literal["list"]
    data: list[Model]


class ReadUsage(Answer):
    """Tokens read."""

    prompt_tokens: Count
    total_tokens: Count


class Usage(ReadUsage):
    """Tokens read and written."""

    completion_tokens: Count


class Embedding(Answer):
    """The vector of a text: numbers, or base64 of float32, little-endian."""

    object: Literal["embedding"]
    index: Count
    embedding: list[float] | str


class EmbeddingAnswer(Answer):
    """Of POST /v1/embeddings."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: ReadUsage


class _Texts(Answer):
    id: str
    created: Count
    model: str
    system_fingerprint: str
    usage: Usage


class CompletionChoice(Answer):
    """A text that goes on."""

    index: Count
    text: str
    logprobs: dict[str, Any] | None
    finish_reason: Finish | None


class CompletionAnswer(_Texts):
    """Of POST /v1/completions without ``stream``."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class ChatMessage(Answer):
    """What the model says, or the tools it calls."""

    role: Literal["assistant"]
    content: str | None
    refusal: None = None
    tool_calls: list[dict[str, Any]] | None = None


class ChatChoice(Answer):
    """A message."""

    index: Count
    message: ChatMessage
    logprobs: dict[str, Any] | None
    finish_reason: Finish | None


class ChatAnswer(_Texts):
    """Of POST /v1/chat/completions without ``stream``."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class Server(Answer):
    """Of GET /v2."""

    name: str
    version: str
    extensions: list[str]


class Live(Answer):
    """Of GET /v2/health/live."""

    live: bool


class Ready(Answer):
    """Of GET /v2/health/ready."""

    ready: bool


class ModelReady(Ready):
    """Of GET /v2/models/{name}/ready."""

    name: str


class TensorMetadata(Answer):
    """A tensor that a model takes or gives; -1: any extent."""

    name: str
    datatype: Datatype
    shape: list[int]
    parameters: dict[str, Any]


class ModelMetadata(Answer):
    """Of GET /v2/models/{name}."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class InputTensor(Answer):
    """A tensor that is sent: its data here, flat or nested, or ``binary_data_size`` bytes behind the JSON."""

    name: str
    datatype: Datatype
    shape: list[Annotated[int, Field(ge=1)]]
    parameters: dict[str, Any] | None = None
    data: list[Any] | None = None


class WantedOutput(BaseModel):
    """An output that is asked for."""

    name: str
    parameters: dict[str, Any] | None = None


class InferenceRequest(Answer):
    """POST /v2/models/{name}/infer."""

    id: str = ""
    parameters: dict[str, Any] | None = None
    inputs: Annotated[list[InputTensor], Field(min_length=1)]
    outputs: list[WantedOutput] | None = None


class OutputTensor(Answer):
    """A tensor of an answer."""

    name: str
    datatype: Datatype
    shape: list[Count]
    parameters: dict[str, Any] | None = None
    data: list[Any] | None = None


class InferenceAnswer(Answer):
    """Of POST /v2/models/{name}/infer."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[OutputTensor]
