"""What every request passes before and behind the routes: who asks, how much, how long; and that errors are JSON."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .auth import Keys
from .errors import ApiError, api_error
from .exchange import Exchange, UnreadError, new_name
from .limits import Lag, Load, Rates
from .log import Log
from .models import Models
from .options import ServeOptions

HEALTH = ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready")
"""Answered always: without a key, while the server ends, and whatever the load."""
QUIET = (*HEALTH, "/load")
"""What is asked again and again, and not logged: the page asks how it goes every second."""
PUBLIC = (*HEALTH, "/", "/openapi.json")
"""Need no key: they tell nothing of the models."""
STATIC = "/static/"
LOOPBACK = ("localhost", "127.0.0.1", "::1")
_DISCARD = 2.0
"""Seconds that the rest of a body which is too large is read and thrown away, so that its sender sees the answer."""
_CLOSE = {"connection": "close"}
_LONG_WAIT = 0.25
"""Seconds in the queues of all models from which on a server that is a little behind refuses unread."""
_COMPANY = 8
"""Requests in work from which on a delay may be of their making. With fewer the machine had other things to do."""
_HELD_BODIES = 16
"""As many of the largest bodies may be held at once."""


class Gate:
    """ASGI middleware around the routes.

    Args:
        app: The routes.
        models: Whether the server is ending.
        options: Limits.
        keys: The keys of now; None: anybody may ask.
        log: Told of each request.
    """

    def __init__(
        self, app: ASGIApp, *, models: Models, options: ServeOptions, keys: Callable[[], Keys | None], log: Log
    ) -> None:
        self._app = app
        self._models = models
        self._options = options
        self._keys = keys
        self._log = log
        self._rates = Rates(options.rate, options.burst or options.rate) if options.rate > 0.0 else None
        self.load = Load(options.max_concurrency, _HELD_BODIES * options.max_body)
        self._lag = Lag()
        self._shed_since = 0
        self._hosts = {host.lower() for host in (*LOOPBACK, *options.hosts)} if _is_open(options) else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI says."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if scope["method"] == "POST" and self._lag.late(self._queued) and self.load.requests >= _COMPANY:
            await self._shed(scope["path"], send)
            return
        exchange = Exchange(scope, send, self._options.write_timeout)
        scope.setdefault("state", {})["exchange"] = exchange
        gone = False
        try:
            gone = await self._answer(scope, receive, exchange)
        except UnreadError:
            exchange.note(cut="the client does not read")
            await exchange.cut()
        except asyncio.CancelledError:
            if not self._models.draining:
                raise
            await self._fail(exchange, _ending("the server ended before the answer was there"))
        except Exception as error:  # noqa: BLE001 - the last resort: a client sees JSON, and the log where it was
            await self._fail(exchange, error)
            error.__traceback__ = None  # it holds frames that hold the work that holds the error
        finally:
            if exchange.failure is not None:
                self._note(exchange, exchange.failure)
            if exchange.path not in QUIET:
                self._log("request", {**exchange.line(), **({"cut": "the client left"} if gone else {})})
            del scope["state"]["exchange"]  # what holds itself waits for the collector

    async def _answer(self, scope: Scope, receive: Receive, exchange: Exchange) -> bool:
        """Answer, or raise why not; whether the client left before the end."""
        health = exchange.path in HEALTH
        if not health:
            self._admit(scope, exchange)
        body = await self._body(receive, exchange)
        counted = exchange.method == "POST"
        try:
            if counted and not self.load.begin():
                counted = False
                raise _busy("the server works on as many requests as it takes at once")
            return await self._run(scope, body, receive, exchange)
        finally:
            if counted:
                self.load.end()
            self.load.free(len(body))

    def _queued(self) -> bool:
        """Whether who asks now waits for long, whatever the model."""
        waits = [served.engine.wait for served in self._models]
        return bool(waits) and min(waits) > _LONG_WAIT

    async def _shed(self, path: str, send: Send) -> None:
        """Refuse a request unread, with as little work as can be; the log tells how many, once a second."""
        loop = asyncio.get_running_loop()
        if not self._shed_since:
            loop.call_later(1.0, self._tell_shed)
        self._shed_since += 1
        error = _busy("more requests come than the server can read")
        body = error.body(path)
        told = {"content-type": "application/json", "content-length": str(len(body)), "x-request-id": new_name()}
        headers = [(name.encode(), value.encode()) for name, value in (told | error.headers).items()]
        await send({"type": "http.response.start", "status": error.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _tell_shed(self) -> None:
        count, self._shed_since = self._shed_since, 0
        self._log("shed", {"requests": count})

    def _admit(self, scope: Scope, exchange: Exchange) -> None:
        """Refuse who may not ask.

        Raises:
            ApiError: Why.
        """
        self._check_origin(exchange, scope)
        keys = self._keys()
        if keys is not None and exchange.path not in PUBLIC and not exchange.path.startswith(STATIC):
            exchange.key = _authenticate(exchange, keys)
        if self._models.draining:
            raise _ending("the server is ending")
        if self._rates is not None and (wait := self._rates.take(exchange.client)) > 0.0:
            after = {"retry-after": str(max(1, math.ceil(wait)))}
            told_of = f"{self._options.rate:g} requests a second are allowed"
            raise ApiError(429, told_of, kind="rate_limit_error", code="rate_limit_exceeded", headers=after)

    def _check_origin(self, exchange: Exchange, scope: Scope) -> None:
        """A page of another site may not ask, unless it is named; nor may a name that only pretends to be this host."""
        hosts = exchange.headers.getlist("host")
        if len(hosts) != 1 and (hosts or scope.get("http_version") != "1.0"):
            raise ApiError(400, "a request has one Host header", headers=_CLOSE)
        name = _host(hosts[0]) if hosts else None
        if self._hosts is not None and hosts and name not in self._hosts:
            told = f"this server is not called {hosts[0][:100]!r}; --allow-host lets it be"
            raise ApiError(421, told, code="unknown_host", headers=_CLOSE)
        origin = exchange.headers.get("origin")
        if origin is None or origin in self._options.cors or "*" in self._options.cors:
            return
        if not hosts or _netloc(origin) != hosts[0].lower():
            raise ApiError(403, "pages of another origin may not ask; --cors lets one", code="cors")

    async def _body(self, receive: Receive, exchange: Exchange) -> bytes:
        """The whole body; its room is held until `Load.free`.

        Raises:
            ApiError: It is too large, or takes too long; or the server holds as much as it can.
        """
        most = self._options.max_body
        declared = exchange.headers.get("content-length")
        if declared is None and "transfer-encoding" not in exchange.headers:
            return b""
        if declared is not None and (not declared.isascii() or not declared.isdigit() or len(declared) > 20):
            raise ApiError(400, "Content-Length is no number", headers=_CLOSE)
        if declared is not None and int(declared) > most:
            if exchange.headers.get("expect", "").lower() != "100-continue":
                await _discard(receive)
            raise _too_large(most)
        chunks: list[bytes] = []
        try:
            async with asyncio.timeout(self._options.body_timeout):
                await self._read(receive, exchange, chunks)
        except TimeoutError as error:
            self.load.free(sum(map(len, chunks)))
            told = f"the body did not come within {self._options.body_timeout:g} s"
            raise ApiError(408, told, kind="timeout_error", code="slow_body", headers=_CLOSE) from error
        except BaseException:
            self.load.free(sum(map(len, chunks)))
            raise
        return b"".join(chunks) if len(chunks) > 1 else chunks[0]

    async def _read(self, receive: Receive, exchange: Exchange, chunks: list[bytes]) -> None:
        """Append what comes to ``chunks``, room taken for each."""
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _LeftError
            chunk: bytes = message.get("body", b"")
            more = message.get("more_body", False)
            exchange.received += len(chunk)
            if exchange.received > self._options.max_body:
                if more:
                    await _discard(receive)
                raise _too_large(self._options.max_body)
            if not self.load.hold(len(chunk)):
                raise _busy("the server holds as much of bodies as it takes at once")
            chunks.append(chunk)

    async def _run(self, scope: Scope, body: bytes, receive: Receive, exchange: Exchange) -> bool:
        """Let the routes answer; a client that leaves cancels the work. Whether it left."""
        left = asyncio.Event()
        given = [body]

        async def replay() -> Message:
            if given:
                return {"type": "http.request", "body": given.pop(), "more_body": False}
            await left.wait()
            return {"type": "http.disconnect"}

        work = asyncio.ensure_future(self._app(scope, replay, exchange.send))
        watch = asyncio.ensure_future(_until_left(receive))
        try:
            await asyncio.wait((work, watch), return_when=asyncio.FIRST_COMPLETED)
            if work.done() or exchange.done:
                await work
                return False
        except asyncio.CancelledError:
            await _end(work)
            raise
        finally:
            watch.cancel()
        left.set()
        await _end(work)
        return True

    async def _fail(self, exchange: Exchange, error: Exception) -> None:
        if isinstance(error, _LeftError):
            return
        self._note(exchange, error)
        try:
            await exchange.refuse(api_error(error))
        except UnreadError:
            await exchange.cut()

    def _note(self, exchange: Exchange, error: Exception) -> None:
        told = api_error(error)
        if told.code == "internal_error":
            self._log.bug(error, {"id": exchange.name})
        exchange.note(error=told.code or told.kind)


class _LeftError(Exception):
    """The client left before its request was complete."""


def _is_open(options: ServeOptions) -> bool:
    """Whether names must be checked: a page that calls its own name 127.0.0.1 would else read what it likes."""
    return options.api_keys is None and not options.no_auth


def _authenticate(exchange: Exchange, keys: Keys) -> str:
    """The name of who asks.

    Raises:
        ApiError: The key is missing, or none of ours.
    """
    given = exchange.headers.getlist("authorization")
    scheme, _, key = given[0].partition(" ") if len(given) == 1 else ("", "", "")
    name = keys.who(key.strip()) if scheme.lower() == "bearer" else None
    if name is None:
        what = "this API key is not known" if given else "an API key is missing: Authorization: Bearer KEY"
        told = {"www-authenticate": "Bearer"}
        raise ApiError(401, what, kind="authentication_error", code="invalid_api_key", headers=told)
    return name


async def _end(work: asyncio.Future[None]) -> None:
    """Cancel the work, and wait until it has cleaned up; nobody is left to be told what came of it."""
    work.cancel()
    await asyncio.wait((work,))
    if not work.cancelled():
        work.exception()


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _discard(receive: Receive) -> None:
    """Read the rest of a body for a moment: who still writes would lose the answer to a reset connection."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_DISCARD):
            while (message := await receive())["type"] == "http.request" and message.get("more_body", False):
                pass


def _host(header: str) -> str:
    """The name in a Host header, without its port."""
    try:
        return (urlsplit("//" + header).hostname or "").rstrip(".")
    except ValueError:
        return ""


def _netloc(origin: str) -> str:
    """Host and port of an origin; empty for ``null`` and what is none."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most} bytes", code="body_too_large", headers=_CLOSE)


def _ending(what: str) -> ApiError:
    return ApiError(503, what, kind="server_error", code="ending", headers={**_CLOSE, "retry-after": "1"})


def _busy(what: str) -> ApiError:
    return ApiError(429, what, kind="rate_limit_error", code="overloaded", headers={"retry-after": "1"})
