"""A server from its first socket to its last answer: signals, draining, successors of bundles and of keys."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path

import uvicorn

from artifacts.errors import RequestError, UsageError

from ..responses.cache import ResponseCache
from .app import build_app
from .auth import Keys
from .log import Log
from .models import MakeEngine, Models
from .options import ServeOptions
from .protocol import guarded
from .watch import Watch

INTERRUPTED = 130
_BACKLOG = 2048
_POLL = 0.05
_LOGGERS = dict.fromkeys(("asyncio", "hasten"), logging.WARNING) | dict.fromkeys(
    ("uvicorn.error", "uvicorn.access"), logging.ERROR
)
"""What libraries say that is taken into the log, from these levels on: uvicorn warns of each client that errs."""


class _Server(uvicorn.Server):
    """uvicorn, but for signals, which are handled here, and for TLS handshakes, which are given a time."""

    patience = 10.0

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept connections at the sockets."""
        await self.lifespan.startup()
        loop, config = asyncio.get_running_loop(), self.config

        def connection() -> asyncio.Protocol:
            kind: Callable[..., asyncio.Protocol] = config.http_protocol_class
            return kind(config=config, server_state=self.server_state, app_state=self.lifespan.state)

        patience = self.patience if config.ssl else None
        self.servers = [
            await loop.create_server(
                connection, sock=one, ssl=config.ssl, backlog=config.backlog, ssl_handshake_timeout=patience
            )
            for one in sockets or ()
        ]
        self.started = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them alone."""
        yield


class Running:
    """A server at work.

    Args:
        paths: Bundles by the names of their models.
        make: Makes the engine of a bundle.
        options: All else.
        log: Told of what happens.
        cache: What ``make`` gives the engines; closed at the end.
        announce: Called with the URL and the models once both are there.
    """

    def __init__(
        self,
        paths: Mapping[str, Path],
        make: MakeEngine,
        options: ServeOptions,
        log: Log,
        *,
        cache: ResponseCache | None = None,
        announce: Callable[[str, Models], None] = lambda url, models: None,
    ) -> None:
        self._cache = cache
        self._options = options
        self._log = log
        self._announce = announce
        self._keys = None if options.api_keys is None else Keys.read(options.api_keys)
        self._tls = None if options.tls_cert is None else tls_context(options.tls_cert, options.tls_key)
        self._models = Models(paths, make, drain=options.drain, tell=log)
        self._asked = asyncio.Event()
        self._interrupts = 0
        check_exposure(options)

    async def serve(self) -> int:
        """Serve until a signal ends it.

        Returns:
            The exit code: 0, or 130 where an interrupt did not wait for accepted work.

        Raises:
            UsageError: The address cannot be listened at.
            HastenError: A bundle cannot be loaded.
            RequestError: Accepted work was not done within `ServeOptions.drain`, and was given up.
        """
        listener = listen(self._options.host, self._options.port)
        try:
            self._handle_signals()
            loading = asyncio.ensure_future(self._models.start())
            if not await self._first(loading):
                return INTERRUPTED if self._interrupts else 0
            return await self._serve(listener)
        finally:
            listener.close()
            await self._models.close(drain=0.0)
            if self._cache is not None:
                await self._cache.close()

    async def _first(self, loading: asyncio.Future[None]) -> bool:
        """Wait for the models; whether no signal came before they were there."""
        asked = asyncio.ensure_future(self._asked.wait())
        try:
            await asyncio.wait((loading, asked), return_when=asyncio.FIRST_COMPLETED)
            if not loading.done():
                loading.cancel()
                await asyncio.wait((loading,))
                return False
            await loading
            return not self._asked.is_set()
        finally:
            asked.cancel()

    async def _serve(self, listener: socket.socket) -> int:
        told = None if self._cache is None else self._cache.stats
        app = build_app(self._models, self._options, keys=lambda: self._keys, log=self._log, cache=told)
        server = _Server(self._config(app))
        server.patience = self._options.head_timeout
        for name, level in _LOGGERS.items():
            self._log.forward(name, level)
        watch = Watch(self._models, self._options.watch, also=self._reread)
        serving = asyncio.ensure_future(server.serve(sockets=[listener]))
        watching = asyncio.ensure_future(watch.run())
        if hasattr(signal, "SIGHUP"):
            _on(signal.SIGHUP, watch.now)
        try:
            while not server.started and not serving.done():
                await asyncio.sleep(_POLL)
            self._announce(url_of(listener, tls=self._tls is not None), self._models)
            await asyncio.wait(
                (serving, asyncio.ensure_future(self._asked.wait())), return_when=asyncio.FIRST_COMPLETED
            )
            await _stop(watching)  # what it was about to load is closed before the rest is
            return await self._end(server, serving)
        finally:
            watching.cancel()
            serving.cancel()

    async def _end(self, server: _Server, serving: asyncio.Future[None]) -> int:
        """Refuse new work, finish what was accepted, and end."""
        self._models.draining = True
        until = time.monotonic() + self._options.drain
        self._log("ending", {"requests": len(server.server_state.tasks), "drain": self._options.drain})
        while server.server_state.tasks and time.monotonic() < until and self._interrupts < 2:
            await asyncio.sleep(_POLL)
        left = len(server.server_state.tasks)
        for task in list(server.server_state.tasks):
            task.cancel()
        await self._models.close(drain=max(0.0, until - time.monotonic()) if not left else 0.0)
        server.should_exit = True
        server.force_exit = bool(left)
        await serving
        self._log("ended", {"given_up": left})
        if self._interrupts >= 2:
            return INTERRUPTED
        if left:
            raise RequestError(f"{left} requests were not done within {self._options.drain:g} s and were given up")
        return 0

    def _config(self, app: object) -> uvicorn.Config:
        tls = self._tls
        return uvicorn.Config(
            app,  # type: ignore[arg-type]  # uvicorn's own name of an ASGI application
            http=guarded(self._options),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,  # who a client is, its connection says
            server_header=False,
            timeout_keep_alive=self._options.keep_alive,
            backlog=_BACKLOG,
            ssl_context_factory=None if tls is None else lambda config, default: tls,
        )

    def _handle_signals(self) -> None:
        def end(*, interrupt: bool) -> None:
            self._interrupts += int(interrupt)
            self._asked.set()

        _on(signal.SIGTERM, lambda: end(interrupt=False))
        _on(signal.SIGINT, lambda: end(interrupt=True))

    def _reread(self) -> None:
        """Take the keys and the certificate that lie there now; what is broken changes nothing."""
        options = self._options
        try:
            if options.api_keys is not None:
                self._keys = Keys.read(options.api_keys)
            if self._tls is not None and options.tls_cert is not None:
                tls_context(options.tls_cert, options.tls_key)
                self._tls.load_cert_chain(options.tls_cert, options.tls_key)
        except (UsageError, OSError) as error:
            self._log("reload failed", {"error": str(error)}, level="error")


def run_server(
    paths: Mapping[str, Path],
    make: MakeEngine,
    options: ServeOptions,
    log: Log,
    *,
    cache: ResponseCache | None = None,
    announce: Callable[[str, Models], None],
) -> int:
    """`Running.serve` on an event loop of its own (uvloop where there is one); the exit code.

    Raises:
        HastenError: As `Running.serve` does.
    """
    _raise_file_limit(2 * options.max_connections)

    def ready(url: str, models: Models) -> None:
        # What is there now stays: a collector that went through it all held every request up for 30 ms now and then.
        gc.collect()
        gc.freeze()
        announce(url, models)

    async def serve() -> int:
        return await Running(paths, make, options, log, cache=cache, announce=ready).serve()

    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(serve())


def _on(number: int, action: Callable[[], None]) -> None:
    """Do something on a signal, in the event loop."""
    loop = asyncio.get_running_loop()
    try:
        loop.add_signal_handler(number, action)
    except NotImplementedError:  # Windows
        signal.signal(number, lambda *_: loop.call_soon_threadsafe(action))


async def _stop(task: asyncio.Future[None]) -> None:
    task.cancel()
    await asyncio.wait((task,))


def _raise_file_limit(wanted: int) -> None:
    """Let this process open as many connections as it says it takes, as far as the system lets it."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at an address; the port may be 0.

    Raises:
        UsageError: It cannot be had.
    """
    try:
        family, kind, number, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, number)
    except OSError as error:
        raise UsageError(f"{host} is no address: {error.strerror}", "Pass --host 127.0.0.1") from error
    try:
        if sys.platform != "win32":
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(_BACKLOG)
        found.setblocking(False)
    except OSError as error:
        found.close()
        told = f"{host} port {port} cannot be listened at: {error.strerror}"
        raise UsageError(told, "Pass another --port; 0 takes any that is free") from error
    return found


def url_of(listener: socket.socket, *, tls: bool) -> str:
    """Where clients find it."""
    host, port = listener.getsockname()[:2]
    name = f"[{host}]" if ":" in host else host
    return f"{'https' if tls else 'http'}://{name}:{port}"


def check_exposure(options: ServeOptions) -> None:
    """Refuse to listen beyond this machine without keys, unless that was said.

    Raises:
        UsageError: It would.
    """
    if options.api_keys is None and not options.no_auth and not is_loopback(options.host):
        told = f"{options.host} is reached from other machines, and no keys are asked for"
        raise UsageError(told, "Pass --api-keys FILE, or --no-auth if anybody may ask")


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches it."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def tls_context(certificate: Path, key: Path | None) -> ssl.SSLContext:
    """TLS 1.2 or newer with this certificate.

    Raises:
        UsageError: A file cannot be read, or they are none that belong together.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key, password="")
    except ssl.SSLError as error:
        told = f"{certificate} and its key are no certificate: {error.reason or 'no PEM'}"
        raise UsageError(told, "Pass PEM files that belong together, the key without a password") from error
    except OSError as error:
        told = f"{key or certificate} cannot be read: {error.strerror}"
        raise UsageError(told, "Pass --tls-cert FILE --tls-key FILE") from error
    return context


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
