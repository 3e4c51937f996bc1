"""A server that asks for keys over TLS, lets one origin ask, and bounds rates and requests at once."""

from __future__ import annotations

import json
import shutil
import signal
import ssl
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
import serving
from serving import Server

from runtimes.serve.auth import Keys, new_key

ORIGIN = "https://page.example"
BODY = {"model": "enc", "input": "a cat"}
RATE, BURST, AT_ONCE = 5, 40, 2

if shutil.which("openssl") is None or shutil.which("curl") is None:
    pytest.skip("openssl and curl are needed", allow_module_level=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def certificate(folder: Path) -> tuple[Path, Path]:
    return make_certificate(folder / "cert.pem", folder / "key.pem")


def make_certificate(certificate: Path, key: Path) -> tuple[Path, Path]:
    subject = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
    kind = ("-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    command = ["openssl", "req", *kind, *subject, "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


@pytest.fixture(scope="module")
def keys(folder: Path) -> dict[str, str]:
    return {name: new_key(folder / "keys", name) for name in ("alice", "bob", "carol", "dora")}


@pytest.fixture(scope="module")
def server(folder: Path, certificate: tuple[Path, Path], keys: dict[str, str]) -> Iterator[Server]:
    names = (
        f"enc={serving.write_encoder(folder / 'enc').path}",
        f"llm={serving.write_decoder(folder / 'llm', context=4096).path}",
    )
    words = [
        "--name",
        names[0],
        "--name",
        names[1],
        "--host",
        "0.0.0.0",
        "--api-keys",
        folder / "keys",
        "--cors",
        ORIGIN,
    ]
    words += ["--tls-cert", certificate[0], "--tls-key", certificate[1], "--rate", str(RATE), "--burst", str(BURST)]
    with serving.serving(
        *words, "--max-concurrency", str(AT_ONCE), "--workers", "1", "--watch", "0", "--head-timeout", "2"
    ) as found:
        yield found


@pytest.fixture(scope="module")
def trusted(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificate[0]))


@pytest.fixture
def web(server: Server, trusted: ssl.SSLContext) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, verify=trusted, timeout=30.0) as found:
        yield found


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


class TestKeys:
    def test_the_real_client(self, server: Server, trusted: ssl.SSLContext, keys: dict[str, str]) -> None:
        with httpx.Client(verify=trusted) as web:
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=keys["alice"], http_client=web, max_retries=0)
            assert len(client.embeddings.create(model="enc", input="a").data[0].embedding) == 8
            wrong = client.with_options(api_key="hasten-" + "x" * 43)
            with pytest.raises(openai.AuthenticationError, match="not known"):
                wrong.embeddings.create(model="enc", input="a")

    def test_curl(self, server: Server, certificate: tuple[Path, Path], keys: dict[str, str]) -> None:
        command = [
            "curl",
            "-sS",
            "--cacert",
            str(certificate[0]),
            f"{server.url}/v1/embeddings",
            "-d",
            json.dumps(BODY),
        ]
        done = subprocess.run(
            [*command, "-H", f"Authorization: Bearer {keys['alice']}"], capture_output=True, check=True
        )
        assert json.loads(done.stdout)["data"][0]["object"] == "embedding"
        without = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        assert without["error"]["code"] == "invalid_api_key"

    @pytest.mark.parametrize(
        "headers",
        [
            {},
            {"authorization": ""},
            {"authorization": "Bearer"},
            {"authorization": "Basic YTpi"},
            {"authorization": "Bearer alice"},
            {"authorization": "Bearer hasten-" + "x" * 20_000},
            {"authorization": "Bearer \u00ff"},
        ],
    )  # fmt: skip
    def test_without_one(self, web: httpx.Client, headers: dict[str, str]) -> None:
        answer = web.post(
            "/v1/embeddings", json=BODY, headers=[(k.encode(), v.encode("latin-1")) for k, v in headers.items()]
        )
        assert answer.status_code == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json()["error"]["code"] == "invalid_api_key"

    def test_two_of_them(self, web: httpx.Client, keys: dict[str, str]) -> None:
        both = [(b"authorization", f"Bearer {keys[name]}".encode()) for name in ("alice", "bob")]
        assert web.post("/v1/embeddings", json=BODY, headers=both).status_code == 401

    def test_what_is_open_to_all(self, web: httpx.Client) -> None:
        for path in ("/healthz", "/readyz", "/v2/health/live", "/", "/openapi.json", "/static/page.js"):
            assert web.get(path).status_code == 200, path
        for path in ("/v1/models", "/metrics", "/load", "/v2/models/enc", "/static/../v1/models", "/none"):
            assert web.get(path).status_code == 401, path

    def test_the_log_names_who_asked_and_holds_no_key(
        self, server: Server, web: httpx.Client, keys: dict[str, str]
    ) -> None:
        answer = web.post("/v1/embeddings", json=BODY, headers=bearer(keys["bob"]))
        assert server.wait_for("request", id=answer.headers["x-request-id"])["key"] == "bob"
        assert not [line for line in server.lines if any(key in line for key in keys.values())]

    def test_keys_come_and_go_with_a_hangup(
        self, server: Server, web: httpx.Client, folder: Path, keys: dict[str, str]
    ) -> None:
        late = new_key(folder / "keys", "late")
        assert web.get("/v1/models", headers=bearer(late)).status_code == 401
        server.process.send_signal(signal.SIGHUP)
        until = time.monotonic() + 20.0
        while web.get("/v1/models", headers=bearer(late)).status_code == 401 and time.monotonic() < until:
            time.sleep(0.05)
        assert web.get("/v1/models", headers=bearer(late)).status_code == 200
        whole = (folder / "keys").read_text()
        (folder / "keys").write_text("nonsense")
        server.process.send_signal(signal.SIGHUP)
        server.wait_for("reload failed")
        assert web.get("/v1/models", headers=bearer(late)).status_code == 200, "a broken file changes nothing"
        (folder / "keys").write_text(whole)
        assert Keys.read(folder / "keys").who(keys["alice"]) == "alice"


class TestOrigins:
    def test_the_one_that_may(self, web: httpx.Client, keys: dict[str, str]) -> None:
        asked = {
            "origin": ORIGIN,
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization",
        }
        preflight = web.options("/v1/embeddings", headers=asked)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == ORIGIN
        answer = web.post("/v1/embeddings", json=BODY, headers={"origin": ORIGIN, **bearer(keys["alice"])})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, ORIGIN)
        refused = web.post("/v1/embeddings", json=BODY, headers={"origin": ORIGIN})
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, ORIGIN)

    def test_another(self, web: httpx.Client, keys: dict[str, str]) -> None:
        asked = {"origin": "https://evil.example", "access-control-request-method": "POST"}
        preflight = web.options("/v1/embeddings", headers=asked)
        assert (preflight.status_code, preflight.json()["error"]["code"]) == (403, "cors")
        assert "access-control-allow-origin" not in preflight.headers
        answer = web.post("/v1/embeddings", json=BODY, headers={"origin": asked["origin"], **bearer(keys["alice"])})
        assert answer.status_code == 403
        assert "access-control-allow-origin" not in answer.headers


class TestLoad:
    def test_a_key_that_asks_too_often(self, web: httpx.Client, keys: dict[str, str]) -> None:
        found = [web.get("/v1/models", headers=bearer(keys["carol"])) for _ in range(BURST * 2)]
        assert {one.status_code for one in found} == {200, 429}
        assert [one.status_code for one in found[:BURST]] == [200] * BURST
        refused = next(one for one in found if one.status_code == 429)
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert int(refused.headers["retry-after"]) >= 1
        assert web.get("/v1/models", headers=bearer(keys["alice"])).status_code == 200, "others are not held up"
        time.sleep(1.0 / RATE + 0.1)
        assert web.get("/v1/models", headers=bearer(keys["carol"])).status_code == 200

    def test_more_requests_than_are_worked_on_at_once(self, web: httpx.Client, keys: dict[str, str]) -> None:
        asked = {"model": "llm", "messages": [{"role": "user", "content": "a"}], "stream": True, "max_tokens": 4000}
        asked["logit_bias"] = {"2": -1000}  # it never ends by itself
        mine = bearer(keys["dora"])
        streams = [web.stream("POST", "/v1/chat/completions", json=asked, headers=mine) for _ in range(AT_ONCE)]
        opened = [one.__enter__() for one in streams]
        try:
            assert [one.status_code for one in opened] == [200] * AT_ONCE
            refused = web.post("/v1/embeddings", json=BODY, headers=mine)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
            assert refused.headers["retry-after"] == "1"
            assert web.get("/v1/models", headers=mine).status_code == 200
        finally:
            for one in streams:
                one.__exit__(None, None, None)
        until = time.monotonic() + 20.0
        while web.post("/v1/embeddings", json=BODY, headers=mine).status_code == 429 and time.monotonic() < until:
            time.sleep(0.3)
        assert web.post("/v1/embeddings", json=BODY, headers=mine).status_code == 200


def test_a_handshake_that_does_not_come(server: Server) -> None:
    begin = time.monotonic()
    assert server.raw(b"") == b""
    assert server.raw(b"\x16\x03\x01\x02\x00\x01") == b""
    assert time.monotonic() - begin < 15.0


def test_plain_http_gets_nowhere(server: Server) -> None:
    data = server.raw(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert b"200" not in data


def test_old_tls_is_refused(server: Server) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.maximum_version = ssl.TLSVersion.TLSv1_1
    with server.connect() as plain, pytest.raises((ssl.SSLError, OSError)):
        old.wrap_socket(plain, server_hostname="localhost")
