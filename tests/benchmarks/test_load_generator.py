"""The load generator against a real server, in its own process; and the curves that are drawn."""

from __future__ import annotations

import json
import socket
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import curves
import load_generator
import pytest
from load_generator import Load, percentile

PAUSE = 0.02
EVENTS = (
    'data: {"choices": [{"text": "a"}]}\n\ndata: {"choices": [], "usage": {"completion_tokens": 7}}\n\ndata: [DONE]\n\n'
)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:  # the name is http.server's
        told = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        time.sleep(PAUSE)
        if told == "drop":
            self.close_connection = True
            return
        if told == "stream":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for event in (EVENTS[:30].encode(), EVENTS[30:].encode(), b""):
                self.wfile.write(b"%x\r\n%b\r\n" % (len(event), event))
            return
        body = json.dumps({"data": [{"embedding": told}]}).encode()
        self.send_response({"full": 429, "late": 504, "wrong": 400}.get(told, 200))
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_closed_load_keeps_so_many_requests_going(port: int) -> None:
    found = load_generator.run(Load(port, "/", ["a", "b", "c"], clients=4, seconds=0.5, keep=True))
    assert not found.failed
    assert all(one >= PAUSE for one in found.latencies)
    # Four at once, each of at least a pause; a busy machine may do fewer.
    assert 4 <= len(found.latencies) <= 4 * (0.5 / PAUSE + 1)
    assert {(index, answer) for index, answer in found.answers} == {(0, "a"), (1, "b"), (2, "c")}
    assert found.rate == pytest.approx(len(found.latencies) / found.seconds)


def test_open_load_does_not_wait_for_answers(port: int) -> None:
    found = load_generator.run(Load(port, "/", ["a"], clients=64, rate=100.0, seconds=1.0))
    assert not found.failed
    # Poisson: 100 requests, five standard deviations either way.
    assert 50 <= len(found.latencies) <= 150


def test_answers_are_told_apart(port: int) -> None:
    found = load_generator.run(Load(port, "/", ["full", "late", "wrong", "drop", "a"], clients=1, seconds=0.6))
    assert found.refused
    assert found.late
    assert {failure[:3] for failure in found.failed} == {"400", "Inc"}


@pytest.mark.parametrize(("told", "count"), [("alone", 0), ("same name", 1), ("twice", 1)])
def test_what_is_answered_twice_is_seen(told: str, count: int) -> None:
    """Two answers of one name, or bytes that nobody asked for."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=_answer, args=(listener, told))
        thread.start()
        found = load_generator.run(Load(listener.getsockname()[1], "/", ["a"], seconds=0.1))
        thread.join()
    assert len(found.latencies) == 2
    assert found.twice == count


def _answer(listener: socket.socket, told: str) -> None:
    """Two requests, the second later than any more are sent."""
    connection = listener.accept()[0]
    with connection:
        for number in range(2):
            connection.recv(1 << 16)
            time.sleep(0.2 * number)
            name = "one" if told == "same name" else f"request {number}"
            answer = f"HTTP/1.1 200 OK\r\nX-Request-Id: {name}\r\nContent-Length: 2\r\n\r\n{{}}".encode()
            connection.sendall(answer * (2 if told == "twice" and number else 1))
        connection.recv(1)


def test_tokens_of_streams_are_counted(port: int) -> None:
    found = load_generator.run(Load(port, "/", ["stream"], seconds=0.2))
    assert found.tokens == 7 * len(found.latencies) > 0
    assert len(found.first) == len(found.latencies)


def test_percentiles() -> None:
    assert percentile([], 0.5) is None
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([3.0, 1.0, 2.0], 0.99) == 3.0


def test_curves_are_drawn() -> None:
    methods = {"first": {"10": 1.001, "20": 1.01}, "second <b>": {"10": 1.0, "20": 1.0101}}
    picture = curves.draw({"family": methods}, "a machine")
    root = ET.fromstring(picture)
    texts = ["".join(one.itertext()) for one in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"family", "second <b>", "20 %", "a machine"} <= set(texts)
    assert len(list(root.iter("{http://www.w3.org/2000/svg}polyline"))) == 2
    heights = [float(one.get("y", "0")) for one in root.iter() if one.text in methods]
    assert abs(heights[0] - heights[1]) >= 15.0
    assert picture == curves.draw({"family": methods}, "a machine")
