"""Clients that err or mean harm, through raw sockets: always a JSON error in time, and the server goes on."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator

import httpx
import pytest
import serving
from serving import Server, answer_of, read_all

BODY = b'{"model": "enc", "input": "a cat"}'
MOST = 64 << 10
HEAD_SECONDS = 1.0
BODY_SECONDS = 1.0
LIMITS = ("--max-body", str(MOST), "--head-timeout", str(HEAD_SECONDS), "--body-timeout", str(BODY_SECONDS))
LIMITS += ("--keep-alive", "2", "--write-timeout", "1", "--max-connections", "64", "--watch", "0", "--workers", "1")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("bundles")
    names = (f"enc={serving.write_encoder(root / 'enc').path}", f"llm={serving.write_decoder(root / 'llm').path}")
    with serving.serving("--name", names[0], "--name", names[1], *LIMITS) as found:
        yield found


@pytest.fixture(autouse=True)
def still_well(server: Server) -> Iterator[None]:
    """Whatever a test did, the next client is answered."""
    yield
    assert httpx.post(f"{server.url}/v1/embeddings", content=BODY).status_code == 200
    assert server.process.poll() is None


def post(path: str = "/v1/embeddings", body: bytes = BODY, *headers: str, host: str = "localhost") -> bytes:
    lines = [f"POST {path} HTTP/1.1", f"Host: {host}", f"Content-Length: {len(body)}", "Connection: close", *headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def status_and_code(data: bytes) -> tuple[int, str | None]:
    """Of an answer, which is JSON with one line for people."""
    status, headers, document = answer_of(data)
    assert headers["content-type"] == "application/json"
    assert "Traceback" not in document["error"]["message"]
    return status, document["error"]["code"]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_json"),
        (b"{", "invalid_json"),
        (b"nonsense", "invalid_json"),
        (b'{"model": "enc", "input": "\xff\xfe"}', "invalid_json"),
        (b'{"model": "enc", "input": "\\ud800"}', "invalid_json"),
        (b"\x00" * 100, "invalid_json"),
        (b"[" * 50_000, "invalid_json"),
        (b'{"input":' * 5_000 + b"1" + b"}" * 5_000, "invalid_json"),
        (b"[]", "invalid_value"),
        (b"null", "invalid_value"),
        (b'"text"', "invalid_value"),
        (b'{"model": "enc"}', "invalid_value"),
        (b'{"model": 7, "input": "a"}', "invalid_value"),
        (b'{"model": "enc", "input": 7}', "invalid_value"),
        (b'{"model": "enc", "input": ["a", 7]}', "invalid_value"),
        (b'{"model": "enc", "input": {"text": "a"}}', "invalid_value"),
        (b'{"model": "enc", "input": "a", "encoding_format": "hex"}', "invalid_value"),
        (b'{"model": "enc", "input": "a", "dimensions": "8"}', "invalid_value"),
        (b'{"model": "enc", "input": "a", "dimensions": 8.5}', "invalid_value"),
        (b'{"model": "enc", "input": "a", "dimensions": ' + b"9" * 4000 + b"}", "invalid_value"),
        (b'{"model": "enc", "input": "a", "priority": 11}', "invalid_value"),
        (b'{"model": "enc", "input": "a", "timeout": 0}', "invalid_value"),
        (b'{"model": "enc", "input": "a", "timeout": NaN}', "invalid_value"),
        (b'{"model": "enc", "input": "a", "timeout": 1e999}', "invalid_value"),
        (b'{"model": "enc", "input": "a", "temprature": 1}', "unknown_parameter"),
        (b'{"model": "enc", "input": "a", "__class__": {}}', "unknown_parameter"),
    ],
)
def test_bodies_that_make_no_sense(server: Server, body: bytes, code: str) -> None:
    assert status_and_code(server.raw(post(body=body))) == (400, code)


@pytest.mark.parametrize(
    "body",
    [
        {"messages": "hi"},
        {"messages": []},
        {"messages": [{}]},
        {"messages": [{"role": 1, "content": "a"}]},
        {"messages": [{"role": "user", "content": 1}]},
        {"messages": [{"role": "user", "content": [{"text": "a"}]}]},
        {"messages": ["hi"]},
        {"messages": [{"role": "user", "content": "hi"}], "stream": "yes"},
        {"messages": [{"role": "user", "content": "hi"}], "max_tokens": -1},
        {"messages": [{"role": "user", "content": "hi"}], "n": 1000},
        {"messages": [{"role": "user", "content": "hi"}], "stop": [1]},
        {"messages": [{"role": "user", "content": "hi"}], "seed": 1 << 70},
        {"messages": [{"role": "user", "content": "hi"}], "tools": [{"type": "function"}]},
        {"messages": [{"role": "user", "content": "hi"}], "top_logprobs": 3},
        {"messages": [{"role": "user", "content": "hi"}], "stream_options": {"include_usage": True}},
        {"messages": [{"role": "user", "content": "hi"}], "response_format": {"type": "json_schema"}},
        {"messages": [{"role": "user", "content": "hi"}], "response_format": {"type": "xml"}},
        {"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"messages": []}},
        {"messages": [{"role": "user", "content": "hi"}], "functions": []},
        {"messages": [{"role": "user", "content": "hi"}], "modalities": ["audio"]},
    ],
)
def test_chats_that_make_no_sense(server: Server, body: dict[str, object]) -> None:
    data = json.dumps({"model": "llm", "max_tokens": 2, **body}).encode()
    assert status_and_code(server.raw(post("/v1/chat/completions", data)))[0] == 400


def test_a_value_is_not_repeated_to_who_sent_it(server: Server) -> None:
    data = server.raw(post(body=b'{"model": "enc", "input": {"secret": "value"}}'))
    assert b"secret" not in data
    assert b"value" not in data.partition(b"\r\n\r\n")[2].replace(b"invalid_value", b"")


class TestSizes:
    def test_a_body_that_says_it_is_huge(self, server: Server) -> None:
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: {10**15}\r\n\r\n".encode()
        begin = time.monotonic()
        assert status_and_code(server.raw(head + b"x" * 1000)) == (413, "body_too_large")
        assert time.monotonic() - begin < 10.0

    def test_a_client_that_waits_to_be_told_is_told_at_once(self, server: Server) -> None:
        head = f"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: {10**9}\r\n".encode()

        def seconds_until_told() -> float:
            begin = time.monotonic()
            assert status_and_code(server.raw(head + b"Expect: 100-continue\r\n\r\n")) == (413, "body_too_large")
            return time.monotonic() - begin

        # The best of three times: what else runs on this machine only makes it worse.
        assert any(seconds_until_told() < 1.5 for _ in range(3))

    def test_a_real_client_sees_the_answer(self, server: Server) -> None:
        answer = httpx.post(f"{server.url}/v1/embeddings", content=b"x" * (8 << 20))
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")

    def test_chunks_without_end(self, server: Server) -> None:
        def chunks() -> Iterator[bytes]:
            for _ in range(1000):
                yield b" " * 4096

        answer = httpx.post(f"{server.url}/v1/embeddings", content=chunks())
        assert answer.status_code == 413

    def test_chunks_that_fit(self, server: Server) -> None:
        parts = iter([BODY[:5], BODY[5:]])
        assert httpx.post(f"{server.url}/v1/embeddings", content=parts).status_code == 200

    def test_headers_without_end(self, server: Server) -> None:
        with server.connect() as client:
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n")
            try:
                for index in range(2000):
                    client.sendall(f"x-{index}: {'y' * 100}\r\n".encode())
            except OSError:
                pass
            data = read_all(client)
        assert not data or status_and_code(data) == (431, "headers_too_large")

    @pytest.mark.parametrize("line", ["x-long: " + "y" * 60_000, "\r\n".join(f"x-{index}: y" for index in range(5000))])
    def test_headers_that_are_too_long(self, server: Server, line: str) -> None:
        data = server.raw(f"GET /healthz HTTP/1.1\r\nHost: localhost\r\n{line}\r\n\r\n".encode())
        assert status_and_code(data) == (431, "headers_too_large")

    def test_a_path_that_is_too_long(self, server: Server) -> None:
        data = server.raw(f"GET /{'a' * 60_000} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        assert status_and_code(data) == (431, "headers_too_large")

    def test_trailers_without_end(self, server: Server) -> None:
        head = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        with server.connect() as client:
            client.sendall(head + b"%x\r\n%b\r\n0\r\n" % (len(BODY), BODY))
            try:
                for index in range(5000):
                    client.sendall(f"x-{index}: {'y' * 100}\r\n".encode())
            except OSError:
                return
            assert len(read_all(client)) < MOST


class TestSlowness:
    def test_headers_that_do_not_come(self, server: Server) -> None:
        begin = time.monotonic()
        assert status_and_code(server.raw(b"GET /healthz HTTP/1.1\r\nHost: loc")) == (408, "slow_headers")
        assert HEAD_SECONDS * 0.9 < time.monotonic() - begin < HEAD_SECONDS + 5.0

    def test_headers_that_come_a_byte_at_a_time(self, server: Server) -> None:
        begin = time.monotonic()
        with server.connect() as client:
            client.sendall(b"GET /healthz HTTP/1.1\r\n")
            client.settimeout(0.1)
            found = b""
            while not found and time.monotonic() - begin < 20.0:
                client.sendall(b"x")
                try:
                    found = client.recv(65536)
                except TimeoutError:
                    continue
        assert status_and_code(found) == (408, "slow_headers")

    def test_silence(self, server: Server) -> None:
        begin = time.monotonic()
        assert status_and_code(server.raw(b"")) == (408, "slow_headers")
        assert time.monotonic() - begin < HEAD_SECONDS + 5.0

    def test_a_second_request_that_stalls(self, server: Server) -> None:
        with server.connect() as client:
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\nGET /he")
            data = read_all(client)
        first, second = data.split(b'{"status":"ok"}')
        assert first.startswith(b"HTTP/1.1 200")
        assert status_and_code(second) == (408, "slow_headers")

    def test_a_body_that_does_not_come(self, server: Server) -> None:
        begin = time.monotonic()
        assert status_and_code(server.raw(post()[:-5])) == (408, "slow_body")
        assert BODY_SECONDS * 0.9 < time.monotonic() - begin < BODY_SECONDS + 5.0

    def test_an_idle_connection_is_closed(self, server: Server) -> None:
        with server.connect() as client:
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            begin = time.monotonic()
            assert read_all(client).endswith(b'{"status":"ok"}')
            assert 1.0 < time.monotonic() - begin < 10.0

    def test_slow_clients_do_not_keep_others_out(self, server: Server) -> None:
        """They are there for BODY_SECONDS; the best of three times, as what else runs here only makes it worse."""

        def seconds_beside_them() -> float:
            held = [server.connect() for _ in range(40)]
            try:
                for client in held:
                    client.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n{")
                begin = time.monotonic()
                assert httpx.post(f"{server.url}/v1/embeddings", content=BODY).status_code == 200
                return time.monotonic() - begin
            finally:
                for client in held:
                    client.close()

        assert any(seconds_beside_them() < BODY_SECONDS for _ in range(3))

    def test_more_connections_than_there_may_be(self, server: Server) -> None:
        """Again only where this machine stalled for HEAD_SECONDS: those that say nothing are gone by then."""

        def one_more() -> tuple[tuple[int, str | None], float]:
            begin = time.monotonic()
            held = [server.connect() for _ in range(64)]
            try:
                time.sleep(0.2)
                with server.connect() as one:
                    seconds = time.monotonic() - begin
                    return status_and_code(read_all(one)), seconds
            finally:
                for client in held:
                    client.close()
                time.sleep(0.2)

        for _ in range(3):
            found, seconds = one_more()
            if seconds < HEAD_SECONDS:
                break
        assert found == (503, "overloaded")


class TestHeaders:
    @pytest.mark.parametrize(
        "data",
        [
            b"nonsense\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64,  # a TLS hello
            b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
            b"GET /healthz HTTP/1.1\r\nHost : localhost\r\n\r\n",
            b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nbad header\r\n\r\n",
            b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nx: a\x00b\r\n\r\n",
            b"GET /healthz HTTP/1.1\nHost: localhost\n\n" + b"\x00",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
            b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1e3\r\n\r\n",
            b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nabcd",
            b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999999\r\n\r\n",
            b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\nabc",
            b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        ],
    )  # fmt: skip
    def test_what_is_no_http(self, server: Server, data: bytes) -> None:
        assert answer_of(server.raw(data))[0] in (400, 404, 405, 408)

    def test_length_and_chunks_together(self, server: Server) -> None:
        """What one server takes for a body another takes for a request: it is refused."""
        smuggled = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n"
        head = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n"
        assert status_and_code(server.raw(head + b"\r\n0\r\n\r\n" + smuggled)) == (400, "invalid_http")

    def test_one_host_and_a_known_one(self, server: Server) -> None:
        for lines, status in (
            (b"", 400),
            (b"Host: localhost\r\nHost: localhost\r\n", 400),
            (b"Host: evil.example\r\n", 421),
            (b"Host: localhost.evil.example\r\n", 421),
            (b"Host: \r\n", 421),
            (b"Host: [::1\r\n", 421),
            (b"Host: LOCALHOST:1234\r\n", 200),
            (b"Host: 127.0.0.1\r\n", 200),
            (b"Host: [::1]:8000\r\n", 200),
        ):
            data = server.raw(b"GET /v1/models HTTP/1.1\r\nConnection: close\r\n" + lines + b"\r\n")
            assert answer_of(data)[0] == status, lines

    @pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://localhost:1", "https://[", ""])
    def test_a_page_of_another_origin(self, server: Server, origin: str) -> None:
        data = server.raw(post("/v1/embeddings", BODY, f"Origin: {origin}"))
        assert status_and_code(data) == (403, "cors")
        assert b"access-control" not in data.lower()

    def test_a_page_of_the_servers_own(self, server: Server) -> None:
        data = server.raw(post("/v1/embeddings", BODY, "Origin: http://localhost:9", host="localhost:9"))
        assert answer_of(data)[0] == 200

    def test_a_preflight_is_not_allowed(self, server: Server) -> None:
        asked = {"origin": "http://evil.example", "access-control-request-method": "POST"}
        assert httpx.options(f"{server.url}/v1/embeddings", headers=asked).status_code == 403

    def test_an_upgrade_is_not_offered(self, server: Server) -> None:
        lines = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: x")
        data = "\r\n".join(("GET /healthz HTTP/1.1", "Host: localhost", *lines)).encode() + b"\r\n\r\n"
        assert server.raw(data).startswith(b"HTTP/1.1 200")

    def test_what_a_client_says_of_itself_is_not_believed(self, server: Server) -> None:
        data = server.raw(post("/v1/embeddings", BODY, "X-Forwarded-For: 1.2.3.4", "Forwarded: for=1.2.3.4"))
        name = answer_of(data)[1]["x-request-id"]
        assert server.wait_for("request", id=name)["address"] == "127.0.0.1"

    def test_http_1_0(self, server: Server) -> None:
        assert server.raw(b"GET /healthz HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200")


class TestPaths:
    @pytest.mark.parametrize(
        "path",
        [
            "/v1/models/../../etc/passwd",
            "/v1/models/%2e%2e/%2e%2e/etc/passwd",
            "/static/../models.py",
            "/static/%2e%2e/models.py",
            "/static/..%2fmodels.py",
            "//v1/models",
            "/v1//models",
            "/V1/MODELS",
            "/v1/models/%00",
            "/v1/models/%ff%fe",
            "/v1/models/none%0d%0aX-Injected:%20yes",
            "/v1/embeddings/",
            "/%2561",
            "/;/v1/models",
        ],
    )
    def test_what_is_not_there(self, server: Server, path: str) -> None:
        data = server.raw(f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        status, headers, _ = answer_of(data)
        assert status == 404
        assert "x-injected" not in headers
        assert b"root:" not in data
        assert b"import" not in data

    def test_methods(self, server: Server) -> None:
        for method, path, status in (
            ("GET", "/v1/embeddings", 405),
            ("DELETE", "/v1/models", 405),
            ("BREW", "/v1/models", 400),
            ("TRACE", "/v1/models", 405),
            ("OPTIONS", "*", 400),
        ):
            data = server.raw(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
            assert answer_of(data)[0] in (status, 404), (method, data)

    def test_a_path_is_one_line_of_the_log(self, server: Server) -> None:
        data = server.raw(b"GET /a%0Ab%1b[2J HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert server.wait_for("request", id=answer_of(data)[1]["x-request-id"])["path"] == "/a\nb\x1b[2J"

    def test_an_absolute_url_names_a_path(self, server: Server) -> None:
        data = server.raw(b"GET http://evil.example/healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert answer_of(data)[0] == 200


class TestLeaving:
    def test_before_the_body_is_there(self, server: Server) -> None:
        for _ in range(20):
            with server.connect() as client:
                client.sendall(post()[:-5])

    def test_before_the_answer_is_there(self, server: Server) -> None:
        for _ in range(20):
            with server.connect() as client:
                client.sendall(post())

    def test_half_closed_is_gone(self, server: Server) -> None:
        with server.connect() as client:
            client.sendall(post())
            client.shutdown(socket.SHUT_WR)
            data = read_all(client)
        assert not data or answer_of(data)[0] == 200

    def test_pipelined_requests_are_answered_in_order(self, server: Server) -> None:
        one = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"
        last = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        data = server.raw(one * 50 + last)
        assert data.count(b"HTTP/1.1 200") == 51
        assert data.endswith(b"]}")

    def test_junk_behind_a_request(self, server: Server) -> None:
        data = server.raw(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" + b"\x00" * 100)
        assert data.count(b"HTTP/1.1") <= 2
