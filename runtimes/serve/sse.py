"""Answers that are sent while they are made: server-sent events (WHATWG HTML, 9.2)."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .errors import api_error
from .exchange import Exchange, UnreadError

DONE = b"data: [DONE]\n\n"
"""The last event of OpenAI's streams."""
_HEAD = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
_HEAD.append((b"x-accel-buffering", b"no"))  # nginx would hold the events back


def event(document: object) -> bytes:
    """A JSON document as an event."""
    return b"data: %b\n\n" % orjson.dumps(document)


class Events(Response):
    """A stream of events. What goes wrong after the first one is the last event.

    Args:
        first: The first event: what goes wrong before it has a status of its own.
        rest: The others; closed at the end, and where the client leaves.
        exchange: Told of what goes wrong.
    """

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None], exchange: Exchange) -> None:
        self.background = None
        self._first = first
        self._rest = rest
        self._exchange = exchange

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI says."""
        try:
            await send({"type": "http.response.start", "status": 200, "headers": _HEAD})
            await send({"type": "http.response.body", "body": self._first, "more_body": True})
            try:
                async for one in self._rest:
                    await send({"type": "http.response.body", "body": one, "more_body": True})
            except UnreadError:
                raise
            except Exception as error:  # noqa: BLE001 - the status is sent: the client is told by an event
                self._exchange.failure = error
                last = orjson.loads(api_error(error).body(self._exchange.path))
                await send({"type": "http.response.body", "body": event(last) + DONE, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await self._rest.aclose()


async def stream(events: AsyncGenerator[bytes, None], exchange: Exchange) -> Events:
    """The answer of some events, once the first of them is there.

    Raises:
        HastenError: There is no first event, and why.
    """
    return Events(await anext(events), events, exchange)
