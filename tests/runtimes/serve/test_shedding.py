"""A server that is behind refuses what it has not read, in the shape of each interface, and tells how many."""

from __future__ import annotations

import asyncio
import io
import json
import time
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from runtimes.serve.gate import Gate
from runtimes.serve.log import Log
from runtimes.serve.models import Models
from runtimes.serve.options import ServeOptions

PATHS = ("/v1/embeddings", "/v2/models/m/infer")


Found = tuple[list[httpx.Response], list[httpx.Response], httpx.Response, list[dict[str, Any]]]


async def read(request: Request) -> PlainTextResponse:
    body = await request.body()
    if busy := float(request.headers.get("x-busy", 0.0)):
        time.sleep(busy)
        await request.app.state.release.wait()
    return PlainTextResponse(str(len(body)))


def asked(before: int, lateness: float) -> Found:
    """(POSTs beside so many that took that long together, POSTs afterwards, a health check, what was logged)."""
    told = io.StringIO()
    app = Starlette(routes=[Route(path, read, methods=["GET", "POST"]) for path in (*PATHS, "/healthz")])

    async def make(name: str, path: object) -> Any:
        raise AssertionError("no engine is asked for")

    models = Models({}, make, drain=1.0, tell=lambda *_, **__: None)
    gate = Gate(app, models=models, options=ServeOptions(), keys=lambda: None, log=Log("json", told))

    async def work() -> tuple[list[httpx.Response], list[httpx.Response], httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gate), base_url="http://localhost") as client:
            app.state.release = asyncio.Event()
            busy = {"x-busy": str(lateness / before)}
            beside = [client.post(PATHS[0], content=b"first", headers=busy) for _ in range(before)]
            held = asyncio.gather(*beside)
            await asyncio.sleep(lateness + 0.02)
            late = [await client.post(path, content=b"abc") for path in PATHS]
            health = await client.get("/healthz")
            app.state.release.set()
            await held
            await asyncio.sleep(1.2)
            for _ in range(100):
                after = [await client.post(path, content=b"abc") for path in PATHS]
                if all(one.status_code == 200 for one in after):
                    break
                await asyncio.sleep(0.02)
            return late, after, health

    return (*asyncio.run(work()), [json.loads(line) for line in told.getvalue().splitlines()])


def test_a_server_that_is_behind_refuses_unread() -> None:
    late, after, health, lines = asked(20, 0.5)
    assert [one.status_code for one in late] == [429, 429]
    assert late[0].json()["error"]["code"] == "overloaded"
    assert "than the server can read" in late[1].json()["error"]
    assert all(one.headers["retry-after"] == "1" and one.headers["x-request-id"].startswith("req-") for one in late)
    assert len({one.headers["x-request-id"] for one in late}) == 2
    assert health.status_code == 200
    assert [(one.status_code, one.text) for one in after] == [(200, "3"), (200, "3")]
    assert sum(line["requests"] for line in lines if line["event"] == "shed") >= 2


def test_a_server_that_was_held_up_by_others_refuses_nobody() -> None:
    late, after, _, lines = asked(1, 0.5)
    assert [one.status_code for one in (*late, *after)] == [200] * 4
    assert not [line for line in lines if line["event"] == "shed"]
