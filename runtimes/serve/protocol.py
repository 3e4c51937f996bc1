"""HTTP/1.1 as uvicorn speaks it, with bounds on time, size and number that it lacks, and errors that are JSON."""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from .errors import ApiError
from .exchange import ABORT
from .options import ServeOptions


class GuardedProtocol(HttpToolsProtocol):
    """One connection.

    A client has `ServeOptions.head_timeout` seconds for a request's line and headers, from the connection's first
    moment or the first byte of a later request, and `ServeOptions.max_head` bytes; trailers count as headers.
    """

    options: ClassVar[ServeOptions] = ServeOptions()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._timer: asyncio.TimerHandle | None = None
        self._in_head = True  # of a request that may not have begun yet
        self._begun = False
        self._head = self._raw = 0
        self._refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client connected."""
        super().connection_made(transport)
        if len(self.connections) > self.options.max_connections:
            self._refuse(503, "the server has as many connections as it takes", "overloaded")
            return
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is gone."""
        self._unwatch()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes came."""
        if self._refused or self.parser is None:
            return
        begun = self._begun
        super().data_received(data)
        if self._begun and self._timer is None and not self._refused:
            self._watch()
        if begun and self._begun:  # a header that never ends is told to nobody: its bytes are counted here
            self._raw += len(data)
            if self._raw > self.options.max_head:
                self._refuse_head()

    def on_message_begin(self) -> None:
        """A request's line begins."""
        self._in_head = self._begun = True
        self._head = self._raw = 0
        super().on_message_begin()
        self.scope["extensions"] = {ABORT: self.transport.abort}  # type: ignore[dict-item]  # an extension of our own

    def on_url(self, url: bytes) -> None:
        """A piece of the path."""
        self._head += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer."""
        self._head += len(name) + len(value) + 4
        if self._in_head:
            super().on_header(name, value)
        elif self._head > self.options.max_head:
            self._refused = True
            self.transport.abort()

    def on_headers_complete(self) -> None:
        """The routes can begin."""
        self._in_head = self._begun = False
        self._unwatch()
        if self._head > self.options.max_head:
            self._refuse_head()
        if self._refused:
            return
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The next request may come."""
        self._in_head, self._head = True, 0
        if not self._refused:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """What came is no HTTP."""
        self._refuse(400, "this is no HTTP/1.1 request", "invalid_http")

    def _unsupported_upgrade_warning(self) -> None:
        """An upgrade that is not offered is no event: the request is answered as it stands."""

    def _refuse_head(self) -> None:
        self._refuse(431, f"the headers are larger than {self.options.max_head} bytes", "headers_too_large")

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Answer and close; where the answer to an earlier request is under way, only close."""
        if self._refused:
            return
        self._refused = True
        self._unwatch()
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            if self.pipeline or cycle.response_started or not cycle.more_body:
                self.transport.close()
                return
            cycle.disconnected = True  # what is wrong is in its own body
            cycle.message_event.set()
        body = ApiError(status, message, code=code).body("")
        head = [STATUS_LINE[status], b"content-type: application/json\r\n", b"connection: close\r\n"]
        head.append(b"content-length: %d\r\n\r\n" % len(body))
        self.transport.write(b"".join((*head, body)))
        self.transport.close()

    def _watch(self) -> None:
        self._timer = self.loop.call_later(self.options.head_timeout, self._late)

    def _unwatch(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _late(self) -> None:
        self._timer = None
        if self._in_head and not self.transport.is_closing():
            self._refuse(408, f"the headers did not come within {self.options.head_timeout:g} s", "slow_headers")


def guarded(given: ServeOptions) -> type[GuardedProtocol]:
    """The protocol with these options."""

    class Bound(GuardedProtocol):
        options = given

    return Bound
