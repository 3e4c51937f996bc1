"""What a request leaves is freed at once: nothing waits for a collector that would hold up other requests."""

from __future__ import annotations

import asyncio
import gc
import io
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from runtimes.serve.errors import ApiError
from runtimes.serve.exchange import exchange_of
from runtimes.serve.gate import Gate
from runtimes.serve.log import Log
from runtimes.serve.models import Models
from runtimes.serve.options import ServeOptions

REQUESTS = 50


class Cycle:
    """A request as uvicorn has it: what sends the answer holds the scope."""

    def __init__(self, method: str, path: str) -> None:
        head = {"type": "http", "http_version": "1.1", "method": method, "path": path, "query_string": b""}
        headers = [(b"host", b"localhost"), (b"content-length", b"3")]
        self.scope: dict[str, Any] = {**head, "headers": headers, "client": ("127.0.0.1", 1), "state": {}}
        self.given = [{"type": "http.request", "body": b"abc", "more_body": False}]
        self.left = asyncio.Event()
        self.status = 0

    async def receive(self) -> dict[str, Any]:
        if self.given:
            return self.given.pop()
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.status = message.get("status", self.status)


async def answer(request: Request) -> PlainTextResponse:
    exchange_of(request).note(model="m")
    return PlainTextResponse(str(len(await request.body())))


async def refuse(request: Request) -> PlainTextResponse:
    try:
        raise ValueError("why")
    except ValueError as error:
        raise ApiError(429, "no", code="overloaded") from error


async def fail(request: Request) -> PlainTextResponse:
    raise ZeroDivisionError


@pytest.mark.parametrize(
    ("path", "status"), [("/answer", 200), ("/refuse", 429), ("/fail", 500), ("/none", 404), ("/gone", 0)]
)
def test_a_request_leaves_nothing_to_collect(path: str, status: int) -> None:
    async def linger(request: Request) -> PlainTextResponse:
        await asyncio.sleep(60)
        raise AssertionError

    routes = {"/answer": answer, "/refuse": refuse, "/fail": fail, "/gone": linger}

    async def make(name: str, path: object) -> Any:
        raise AssertionError("no engine is asked for")

    models = Models({}, make, drain=1.0, tell=lambda *_, **__: None)
    log = Log("json", io.StringIO())
    gate = Middleware(Gate, models=models, options=ServeOptions(), keys=lambda: None, log=log)
    app = Starlette(routes=[Route(*one, methods=["POST"]) for one in routes.items()], middleware=[gate])

    async def ask() -> int:
        cycle = Cycle("POST", path)
        if path == "/gone":
            asyncio.get_running_loop().call_later(0.005, cycle.left.set)
        await app(cycle.scope, cycle.receive, cycle.send)
        return cycle.status

    async def work() -> tuple[set[int], int]:
        await ask()
        await asyncio.sleep(0.05)
        gc.collect()
        gc.disable()
        try:
            found = {await ask() for _ in range(REQUESTS)}
            await asyncio.sleep(0.05)
            return found, gc.collect()
        finally:
            gc.enable()

    found, left = asyncio.run(work())
    assert found == {status}
    assert left < REQUESTS
