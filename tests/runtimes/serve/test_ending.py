"""How a server ends: accepted work is finished, new work is refused, and the exit code says how it went."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import serving
from serving import Server

LONG: dict[str, Any] = {"model": "llm", "max_tokens": 600, "logit_bias": {"2": -1000}}
LONG["messages"] = [{"role": "user", "content": "a"}]
ENDLESS = {**LONG, "max_tokens": 60_000}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serving.write_decoder(tmp_path_factory.mktemp("serve") / "llm", context=65536).path


@contextmanager
def started(bundle: Path, *words: str) -> Iterator[Server]:
    with serving.serving("--name", f"llm={bundle}", "--workers", "1", *words) as server:
        children = psutil.Process(server.process.pid).children(recursive=True)
        assert children
        yield server
        assert not [child.pid for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]


class Asking(threading.Thread):
    """A request on a thread of its own."""

    def __init__(self, server: Server, body: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self.server, self.body = server, body
        self.begun = threading.Event()
        self.text = ""
        self.status = 0
        self.failure: Exception | None = None
        self.start()

    def run(self) -> None:
        url = f"{self.server.url}/v1/chat/completions"
        try:
            with httpx.stream("POST", url, json=self.body, timeout=60.0) as answer:
                self.status = answer.status_code
                for text in answer.iter_text():
                    self.text += text
                    self.begun.set()
        except httpx.HTTPError as error:
            self.failure = error


def wait_until_accepted(web: httpx.Client, count: int) -> None:
    end = time.monotonic() + 20.0
    while f'hasten_engine_requests_accepted_total{{model="llm"}} {count}.0' not in web.get("/metrics").text:
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_server_ends_at_once(bundle: Path, number: int) -> None:
    with started(bundle) as server:
        begin = time.monotonic()
        assert server.end(number) == 0
        assert time.monotonic() - begin < 10.0


def test_accepted_work_is_finished_and_new_work_is_refused(bundle: Path) -> None:
    with started(bundle) as server, httpx.Client(base_url=server.url, timeout=30.0) as web:
        streamed, whole = Asking(server, {**LONG, "stream": True}), Asking(server, {**LONG, "max_tokens": 700})
        assert streamed.begun.wait(20.0)
        wait_until_accepted(web, 2)
        server.process.send_signal(signal.SIGTERM)
        server.wait_for("ending")
        ready = web.get("/readyz")
        assert (ready.status_code, ready.json()) == (503, {"status": "ending"})
        assert web.get("/healthz").status_code == 200
        refused = web.post("/v1/chat/completions", json=LONG)
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "ending")
        assert (refused.headers["retry-after"], refused.headers["connection"]) == ("1", "close")
        assert server.process.poll() is None
        assert server.process.wait(60.0) == 0
        for one in (streamed, whole):
            one.join(20.0)
            assert (one.failure, one.status) == (None, 200)
        assert streamed.text.endswith("data: [DONE]\n\n")
        assert '"completion_tokens":700' in whole.text


def test_work_that_takes_too_long_is_given_up_and_told(bundle: Path) -> None:
    with started(bundle, "--drain", "0.5") as server, httpx.Client(base_url=server.url, timeout=30.0) as web:
        streamed, whole = Asking(server, {**ENDLESS, "stream": True}), Asking(server, ENDLESS)
        assert streamed.begun.wait(20.0)
        wait_until_accepted(web, 2)
        assert server.end() == 11
        whole.join(20.0)
        assert (whole.status, '"code":"ending"' in whole.text) == (503, True)
        streamed.join(20.0)
        assert "[DONE]" not in streamed.text or '"error"' in streamed.text
        assert server.lines[-1].startswith("hasten: 2 requests were not done within 0.5 s")


def test_a_terminal_interrupts_the_whole_group_and_work_is_finished_all_the_same(bundle: Path) -> None:
    with started(bundle) as server:
        asking = Asking(server, {**LONG, "stream": True})
        assert asking.begun.wait(20.0)
        os.killpg(server.process.pid, signal.SIGINT)
        assert server.process.wait(60.0) == 0
        asking.join(20.0)
        assert asking.text.endswith("data: [DONE]\n\n")
        assert '"error"' not in asking.text


def test_a_second_interrupt_waits_for_nothing(bundle: Path) -> None:
    with started(bundle, "--drain", "60") as server:
        asking = Asking(server, {**ENDLESS, "stream": True})
        assert asking.begun.wait(20.0)
        server.process.send_signal(signal.SIGINT)
        server.wait_for("ending")
        begin = time.monotonic()
        assert server.end(signal.SIGINT) == 130
        assert time.monotonic() - begin < 10.0


def test_a_reload_and_the_end_at_once(bundle: Path) -> None:
    with started(bundle, "--watch", "0.05") as server:
        manifest = bundle / "manifest.json"
        for _ in range(3):
            manifest.touch()
            server.process.send_signal(signal.SIGHUP)
        server.process.send_signal(signal.SIGTERM)
        server.process.send_signal(signal.SIGHUP)
        assert server.process.wait(30.0) == 0
