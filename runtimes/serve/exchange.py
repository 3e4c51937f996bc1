"""One request and its answer, as the gate and the log see them."""

from __future__ import annotations

import asyncio
import secrets
import time

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Message, Scope, Send

from .errors import ApiError

ABORT = "hasten.abort"
"""The extension of a request's scope that ends its connection."""


class UnreadError(Exception):
    """The client does not read its answer."""


def new_name() -> str:
    """What an answer's ``x-request-id`` says."""
    return "req-" + secrets.token_hex(12)


class Exchange:
    """What became of a request so far.

    Args:
        scope: Of the request.
        send: To the client.
        patience: Seconds that the client may leave the answer unread.

    Attributes:
        name: What the answer's ``x-request-id`` and the log call it.
        facts: More for its line in the log, such as the model; never what a prompt says.
        key: Who asks, by the name of the key; empty without keys.
        status: Of the answer; 0 before it begins.
        done: The answer is complete.
        failure: What went wrong when the status was sent already.
    """

    def __init__(self, scope: Scope, send: Send, patience: float) -> None:
        self.name = new_name()
        self.facts: dict[str, object] = {}
        self.headers = Headers(scope=scope)
        self.path: str = scope["path"]
        self.method: str = scope["method"]
        self.address: str = (scope.get("client") or ("", 0))[0]
        self.key = ""
        self.status = 0
        self.done = False
        self.failure: Exception | None = None
        self.received = 0
        self.sent = 0
        self._begin = time.perf_counter()
        self._extensions = scope.get("extensions") or {}
        self._send = send
        self._patience = patience

    @property
    def client(self) -> str:
        """Whose rate it counts against."""
        return f"key {self.key}" if self.key else f"address {self.address}"

    def note(self, **facts: object) -> None:
        """Add to what the log will say."""
        self.facts.update(facts)

    async def send(self, message: Message) -> None:
        """As ASGI's ``send``.

        Raises:
            UnreadError: The client does not read.
        """
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self.name.encode())]
        elif message["type"] == "http.response.body":
            self.sent += len(message.get("body", b""))
        try:
            async with asyncio.timeout(self._patience):
                await self._send(message)
        except TimeoutError as error:
            raise UnreadError from error
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.done = True

    async def refuse(self, error: ApiError) -> None:
        """Answer with an error; where an answer has begun already, end the connection instead.

        Raises:
            UnreadError: The client does not read.
        """
        if self.status:
            await self.cut()
            return
        body = error.body(self.path)
        told = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
        headers = [(name.encode(), value.encode()) for name, value in told.items()]
        await self.send({"type": "http.response.start", "status": error.status, "headers": headers})
        await self.send({"type": "http.response.body", "body": body})

    async def cut(self) -> None:
        """End the connection now, whatever waits to be sent."""
        abort = self._extensions.get(ABORT)
        if abort is not None:
            abort()
            await asyncio.sleep(0.0)  # the protocol is told of it in the loop's next round

    def line(self) -> dict[str, object]:
        """What the log says of it."""
        return {
            "id": self.name,
            "method": self.method,
            "path": self.path[:200],
            "status": self.status,
            "ms": round((time.perf_counter() - self._begin) * 1e3, 2),
            "address": self.address,
            "key": self.key,
            "in": self.received,
            "out": self.sent,
            **self.facts,
        }


def exchange_of(request: Request) -> Exchange:
    """The exchange that a request is part of."""
    found: Exchange = request.scope["state"]["exchange"]
    return found
