"""Clients that leave in the middle, bundles that are replaced under load: work is cancelled, requests are not lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import serving
from serving import Server

from artifacts.bundle import open_bundle
from runtimes.load import load
from runtimes.tasks import Generator

LONG: dict[str, Any] = {"model": "llm", "max_tokens": 3900, "logit_bias": {"2": -1000}}  # it never ends by itself
LONG["messages"] = [{"role": "user", "content": "a"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("serve")
    for seed in (0, 1):
        serving.write_decoder(root / f"llm{seed}", seed=seed, context=4096)
    shutil.copytree(root / "llm0" / "bundle", root / "live")
    serving.write_encoder(root / "enc")
    return root


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    words = ("--name", f"llm={folder / 'live'}", "--name", f"enc={folder / 'enc'}", "--workers", "1")
    with serving.serving(*words, "--write-timeout", "1", "--watch", "0.2", "--drain", "60") as found:
        yield found


@pytest.fixture
def web(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60.0) as found:
        yield found


def metric(web: httpx.Client, name: str, model: str = "llm") -> float:
    """The sum of a metric's values for a model."""
    lines = [line for line in web.get("/metrics").text.splitlines() if line.startswith((f"{name}{{", f"{name} "))]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if f'model="{model}"' in line)


def until(done: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end
        time.sleep(0.02)


def idle(web: httpx.Client) -> bool:
    return metric(web, "hasten_worker_active_texts") == 0.0


def request_bytes(body: dict[str, Any], path: str = "/v1/chat/completions") -> bytes:
    data = json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


class TestLeaving:
    def test_a_stream_is_cancelled(self, server: Server, web: httpx.Client) -> None:
        before = metric(web, "hasten_engine_requests_cancelled_total")
        with web.stream("POST", "/v1/chat/completions", json={**LONG, "stream": True}) as answer:
            name = answer.headers["x-request-id"]
            lines = answer.iter_lines()
            assert all(line == "" or line.startswith("data: {") for line in (next(lines) for _ in range(9)))
            assert metric(web, "hasten_worker_active_texts") == 1.0
        line = server.wait_for("request", id=name)
        assert (line["cut"], line["status"], line["model"]) == ("the client left", 200, "llm")
        until(lambda: idle(web))
        assert metric(web, "hasten_engine_requests_cancelled_total") == before + 1

    def test_an_answer_that_nobody_waits_for_is_cancelled(self, server: Server, web: httpx.Client) -> None:
        before = metric(web, "hasten_engine_requests_cancelled_total")
        with server.connect() as client:
            client.sendall(request_bytes(LONG))
            until(lambda: not idle(web))
        until(lambda: idle(web))
        assert metric(web, "hasten_engine_requests_cancelled_total") == before + 1
        assert [one for one in server.events if one["event"] == "request" and one["status"] == 0]

    def test_a_client_that_does_not_read_is_cut_off(self, server: Server, web: httpx.Client) -> None:
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with client:
            client.connect(("127.0.0.1", server.port))
            client.sendall(request_bytes({**LONG, "n": 8, "temperature": 1.0, "stream": True}))
            line = server.wait_for("request", cut="the client does not read")
        assert line["status"] == 200
        until(lambda: idle(web))

    def test_many_at_once(self, server: Server, web: httpx.Client) -> None:
        clients = [server.connect() for _ in range(24)]
        for client in clients:
            client.sendall(request_bytes({**LONG, "stream": True}))
        until(lambda: not idle(web))
        for client in clients:
            client.close()
        until(lambda: idle(web))
        short = {**LONG, "max_tokens": 2}
        assert web.post("/v1/chat/completions", json=short).status_code == 200


class TestTime:
    def test_an_answer_that_would_come_too_late(self, web: httpx.Client) -> None:
        answer = web.post("/v1/chat/completions", json={**LONG, "timeout": 0.3})
        assert answer.status_code in (504, 429), "its time was over, or could not be enough"
        assert answer.json()["error"]["code"] in ("deadline_exceeded", "overloaded")
        assert answer.status_code == 504 or int(answer.headers["retry-after"]) >= 1
        until(lambda: idle(web))

    def test_a_stream_that_comes_too_late_ends_with_an_error(self, server: Server, web: httpx.Client) -> None:
        answer = web.post("/v1/chat/completions", json={**LONG, "timeout": 0.5, "stream": True})
        if answer.status_code == 429:
            pytest.skip("refused at once: by what it has measured, the engine knew")
        events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["error"]["code"] == "deadline_exceeded"
        line = server.wait_for("request", id=answer.headers["x-request-id"])
        assert (line["status"], line["error"]) == (200, "deadline_exceeded")
        until(lambda: idle(web))


def test_a_worker_that_is_killed_costs_nobody_an_answer(server: Server, web: httpx.Client) -> None:
    asked = {**LONG, "max_tokens": 400}
    wanted = web.post("/v1/chat/completions", json=asked).json()["choices"][0]["message"]["content"]
    with web.stream("POST", "/v1/chat/completions", json={**asked, "stream": True}) as answer:
        lines = answer.iter_lines()
        said = [next(lines) for _ in range(9)]
        workers = web.get("/load").json()["models"][0]["stats"]["workers"]
        os.kill(workers[0]["pid"], signal.SIGKILL)
        said += list(lines)
    events = [json.loads(line.removeprefix("data: ")) for line in said if line.startswith("data: {")]
    assert "".join(one["choices"][0]["delta"].get("content", "") for one in events) == wanted
    # Where the whole text was on its way already, the loss of the worker is noticed after it.
    until(lambda: metric(web, "hasten_engine_worker_restarts_total") == 1.0)


class TestReload:
    def replace(self, folder: Path, source: Path) -> None:
        """What lies at ``live`` becomes a copy of another bundle, between two looks of the server."""
        shutil.rmtree(folder / "next", ignore_errors=True)
        shutil.copytree(source, folder / "next")
        shutil.rmtree(folder / "old", ignore_errors=True)
        (folder / "live").rename(folder / "old")
        (folder / "next").rename(folder / "live")

    def digest(self, web: httpx.Client) -> tuple[str, str | None]:
        found = web.get("/v1/models/llm").json()
        return found["digest"], found["reload_failure"]

    def test_no_request_is_lost(self, server: Server, web: httpx.Client, folder: Path) -> None:
        short = {**LONG, "max_tokens": 8}
        first = web.post("/v1/chat/completions", json=short).json()
        answers: list[httpx.Response] = []
        stop = threading.Event()

        def ask() -> None:
            with httpx.Client(base_url=server.url, timeout=60.0) as one:
                while not stop.is_set():
                    answers.append(one.post("/v1/chat/completions", json=short))

        threads = [threading.Thread(target=ask) for _ in range(4)]
        with web.stream("POST", "/v1/chat/completions", json={**LONG, "max_tokens": 1500, "stream": True}) as stream:
            for thread in threads:
                thread.start()
            self.replace(folder, folder / "llm1" / "bundle")
            server.wait_for("reloaded", model="llm")
            told = "".join(stream.iter_text())
        until(lambda: answers[-1].json()["system_fingerprint"] != first["system_fingerprint"])
        stop.set()
        for thread in threads:
            thread.join()
        assert told.endswith("data: [DONE]\n\n"), "what had begun on the old bundle was finished there"
        assert f'"{first["system_fingerprint"]}"' in told
        assert {one.status_code for one in answers} == {200}
        texts = {one.json()["system_fingerprint"]: one.json()["choices"][0]["message"]["content"] for one in answers}
        assert len(texts) == 2
        assert len(set(texts.values())) == 2, "each bundle gave its own answers"
        assert metric(web, "hasten_model_loads_total") == 2.0

    def test_a_broken_bundle_changes_nothing_and_is_told(self, server: Server, web: httpx.Client, folder: Path) -> None:
        good = self.digest(web)[0]
        bundles = [folder / name / "bundle" for name in ("llm0", "llm1")]
        other = next(one for one in bundles if open_bundle(one).digest != good)
        shutil.copytree(other, folder / "broken")
        weights = next((folder / "broken").glob("*.onnx"))
        weights.write_bytes(weights.read_bytes()[:-1] + b"x")
        self.replace(folder, folder / "broken")
        until(lambda: self.digest(web)[1] is not None)
        assert self.digest(web)[0] == good
        assert "hash" in str(self.digest(web)[1]) or "cpu-fp32.onnx" in str(self.digest(web)[1])
        assert web.post("/v1/chat/completions", json={**LONG, "max_tokens": 2}).status_code == 200
        assert web.get("/readyz").status_code == 200
        failed = len([one for one in server.events if one["event"] == "reload failed"])
        time.sleep(0.8)
        assert len([one for one in server.events if one["event"] == "reload failed"]) == failed, "tried once"
        self.replace(folder, other)
        until(lambda: self.digest(web)[0] != good)
        assert self.digest(web)[1] is None

    def test_a_hangup_without_news_changes_nothing(self, server: Server, web: httpx.Client) -> None:
        before = metric(web, "hasten_model_loads_total")
        server.process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert metric(web, "hasten_model_loads_total") == before

    def test_a_folder_that_is_gone(self, server: Server, web: httpx.Client, folder: Path) -> None:
        short = {**LONG, "max_tokens": 2}
        assert web.post("/v1/chat/completions", json=short).status_code == 200
        (folder / "live").rename(folder / "away")
        server.process.send_signal(signal.SIGHUP)
        until(lambda: self.digest(web)[1] is not None)
        assert web.post("/v1/chat/completions", json=short).status_code == 200
        (folder / "away").rename(folder / "live")
        server.process.send_signal(signal.SIGHUP)
        until(lambda: self.digest(web)[1] is None)


def test_an_adapter_that_is_added_while_the_server_works(server: Server, web: httpx.Client, folder: Path) -> None:
    from decoder_graphs import tiny_llama
    from lora_folders import write_lora

    from compiler.adapters import add_adapter

    asked = {**LONG, "max_tokens": 12}
    missing = web.post("/v1/chat/completions", json={**asked, "model": "llm:style"})
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    live = web.get("/v1/models/llm").json()["digest"]
    add_adapter(folder / "live", write_lora(folder / "style", tiny_llama(0, context=4096), rank=4), "style")
    until(lambda: web.get("/v1/models/llm").json()["digest"] != live, 60.0)
    assert [one["id"] for one in web.get("/v1/models").json()["data"]] == ["llm", "llm:style", "enc"]
    plain, styled = (
        web.post("/v1/chat/completions", json={**asked, "model": name}).json() for name in ("llm", "llm:style")
    )
    assert styled["model"] == "llm:style"
    with load(folder / "live", cache=False) as model:
        assert isinstance(model, Generator)
        options: dict[str, Any] = {"max_new_tokens": 12, "bias": {2: -1000.0}}
        for answer, adapter in ((plain, {}), (styled, {"adapter": "style"})):
            wanted = model.generate(LONG["messages"], **options, **adapter).text
            assert answer["choices"][0]["message"]["content"] == wanted
    assert plain["choices"][0]["message"]["content"] != styled["choices"][0]["message"]["content"]
