"""What a client is told when a request is not answered: a status and JSON, in the shape of the interface it used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from http import HTTPStatus

import orjson
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from artifacts.errors import (
    DataError,
    DeadlineError,
    HastenError,
    InstallationError,
    OverloadError,
    UsageError,
    WorkerError,
)

from .models import UnknownModelError

PROTOCOL = "/v2"
"""Paths of the Open Inference Protocol begin with it: its errors are ``{"error": "…"}``."""


class ApiError(Exception):
    """An answer that is none.

    Attributes:
        status: Of HTTP.
        message: For people.
        kind: OpenAI's ``type``.
        param: The field it is about; None: no single one.
        code: OpenAI's ``code``.
        headers: Sent with it.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self, path: str) -> bytes:
        """The JSON document, in the shape that clients of ``path`` read."""
        if path == PROTOCOL or path.startswith(PROTOCOL + "/"):
            return orjson.dumps({"error": self.message})
        told = {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}
        return orjson.dumps({"error": told})


def api_error(error: Exception) -> ApiError:
    """What is told of an error; one that is none of ours is told without its text, which may quote a prompt."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        return _of_http(error)
    if isinstance(error, ValidationError):
        return invalid(error)
    for kinds, status, kind, code in _TOLD:
        if isinstance(error, kinds):
            param = "model" if kinds is UnknownModelError else None
            return ApiError(status, str(error), kind=kind, param=param, code=code, headers=_patience(error))
    return ApiError(500, "this is a bug of the server; its log says where", kind="server_error", code="internal_error")


def invalid(error: ValidationError) -> ApiError:
    """The first thing that a request's schema found; never the value, which may be a prompt."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {first['msg'].removeprefix('Invalid JSON: ')}", code="invalid_json")
    steps: list[str] = []
    for step in first["loc"]:  # alternatives of a union add their own names: they are no part of the document
        if isinstance(step, str) and (not step.replace("_", "").isalnum() or step in _KINDS):
            break
        steps.append(str(step))
    param = ".".join(steps)[:200] or None
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"there is no parameter {param!r} here", param=param, code="unknown_parameter")
    return ApiError(400, f"{param}: {message}" if param else message, param=param, code="invalid_value")


def error_response(error: Exception, path: str) -> Response:
    """The answer that tells of an error."""
    told = api_error(error)
    headers = {"content-type": "application/json", **told.headers}
    return Response(told.body(path), status_code=told.status, headers=headers)


async def on_error(request: Request, error: Exception) -> Response:
    """`error_response` for starlette."""
    return error_response(error, request.scope["path"])


def _of_http(error: HTTPException) -> ApiError:
    """What the router says of paths and methods."""
    told = {404: "there is nothing at this path", 405: "this path does not take this method"}
    message = told.get(error.status_code) or error.detail or HTTPStatus(error.status_code).phrase
    return ApiError(error.status_code, message, code=f"http_{error.status_code}", headers=dict(error.headers or {}))


def _patience(error: Exception) -> dict[str, str]:
    """When it is worth another try."""
    if isinstance(error, OverloadError):
        return {"retry-after": str(max(1, math.ceil(min(error.retry_after, 3600.0))))}
    return {"retry-after": "1"} if isinstance(error, WorkerError) else {}


_TOLD: tuple[tuple[type[Exception] | tuple[type[Exception], ...], int, str, str | None], ...] = (
    (UnknownModelError, 404, "invalid_request_error", "model_not_found"),
    ((UsageError, DataError), 400, "invalid_request_error", None),
    (OverloadError, 429, "rate_limit_error", "overloaded"),
    (DeadlineError, 504, "timeout_error", "deadline_exceeded"),
    (WorkerError, 503, "server_error", "worker_failed"),
    (InstallationError, 501, "server_error", "not_installed"),
    (HastenError, 500, "server_error", "model_failed"),
)
"""Errors, the first that fits: status, OpenAI's ``type`` and ``code``."""
_KINDS = {"str", "int", "float", "bool", "dict", "list", "none"}
