"""``hasten serve``: bundles behind HTTP."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from artifacts.errors import InstallationError, UsageError

from .make import Size
from .use import machine_options

if TYPE_CHECKING:
    from runtimes.engine.engine import Engine
    from runtimes.responses.cache import ResponseCache
    from runtimes.serve.log import Log
    from runtimes.serve.models import Models
    from runtimes.serve.options import ServeOptions

_PACKAGES = {"starlette", "uvicorn", "httptools", "pydantic", "orjson", "prometheus_client", "diskcache", "redis"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/@-]{0,127}")
_ENGINE = (
    *("workers", "threads", "device", "provider", "variant", "slots", "prefix_cache", "pause", "queue_requests"),
    *("queue_tokens", "idle_timeout", "hang_timeout"),
)
_SERVER = (
    *("host", "port", "api_keys", "no_auth", "cors", "hosts", "tls_cert", "tls_key", "max_body", "max_concurrency"),
    *("max_connections", "rate", "burst", "timeout", "body_timeout", "head_timeout", "write_timeout", "keep_alive"),
    *("drain", "watch"),
)
_SECONDS = click.FloatRange(min=0, max=86400, min_open=True)
_COUNT = click.IntRange(1, 1 << 40)
_FILE = click.Path(path_type=Path)
_WAIT = click.FloatRange(0, 86400)
_OPTIONS: tuple[tuple[str, Any, Any, str], ...] = (
    ("--host", str, "127.0.0.1", "Address to listen at."),
    ("--port", click.IntRange(0, 65535), 8000, "Port; 0: a free one."),
    ("--api-keys", _FILE, None, "Ask for a key of this file."),
    ("--new-key", str, None, "Make a key of this name, add its hash to the file of --api-keys, show it once."),
    ("--tls-cert", _FILE, None, "Certificate, PEM: serve over TLS."),
    ("--tls-key", _FILE, None, "Its key, PEM."),
    ("--workers", click.IntRange(1, 256), None, "Processes of each model.  [default: measured]"),
    ("--slots", click.IntRange(1, 1024), None, "Language models: texts written at once.  [default: 8]"),
    ("--prefix-cache", Size(), None, "Language models: bytes kept of earlier prompts.  [default: 256MiB]"),
    ("--pause", _SECONDS, None, "Language models: longest gap in a text for reading prompts.  [default: 0.1]"),
    ("--queue-requests", _COUNT, None, "Requests that wait, at most.  [default: 4096]"),
    ("--queue-tokens", _COUNT, None, "Tokens that wait, at most.  [default: 1048576]"),
    ("--idle-timeout", _SECONDS, None, "Free the memory of a model after so many idle seconds."),
    ("--hang-timeout", _SECONDS, None, "Replace a worker after so many silent seconds.  [default: 60]"),
    ("--cache", str, None, "Keep answers in this folder, or in Redis: redis://host:port/0."),
    ("--cache-size", Size(), None, "Bytes of the cache.  [default: 1GiB]"),
    ("--cache-age", _SECONDS, None, "Seconds for which an answer is kept.  [default: no end]"),
    ("--max-body", Size(), "16MiB", "Largest body of a request."),
    ("--max-concurrency", _COUNT, 1024, "Requests at once; more are refused."),
    ("--max-connections", _COUNT, 2048, "Connections at once."),
    ("--rate", click.FloatRange(0), 0.0, "Requests a second of a key, or of an address; 0: any number."),
    ("--burst", click.FloatRange(0), 0.0, "Requests at once within the rate; 0: those of a second."),
    ("--timeout", _SECONDS, 600.0, "Seconds for an answer, at most."),
    ("--head-timeout", _SECONDS, 10.0, "Seconds for the headers of a request to come."),
    ("--body-timeout", _SECONDS, 30.0, "Seconds for its body to come."),
    ("--write-timeout", _SECONDS, 30.0, "Seconds that a client may leave its answer unread."),
    ("--keep-alive", click.IntRange(1, 3600), 30, "Seconds that an idle connection is kept."),
    ("--drain", _WAIT, 30.0, "Seconds that accepted work has at the end."),
    ("--watch", _WAIT, 2.0, "Seconds between looks for new bundles; 0: only SIGHUP asks for them."),
    ("--log", click.Choice(["text", "json"]), "text", "Form of the log."),
)
"""Name, type, default and help."""
_SEVERAL = (
    ("--name", "names", "NAME=BUNDLE", "Serve a bundle by this name; repeatable."),
    ("--cors", "cors", "ORIGIN", "Let pages of this origin ask; repeatable."),
    ("--allow-host", "hosts", "NAME", "Answer to this host name too; repeatable."),
)


def _serve_options(command: Any) -> Any:
    for flag, kind, default, text in reversed(_OPTIONS):
        shown = default is not None
        command = click.option(flag, type=kind, default=default, show_default=shown, help=text)(command)
    told = "Ask for no keys even where other machines reach the server."
    command = click.option("--no-auth", is_flag=True, help=told)(command)
    for flag, name, metavar, text in reversed(_SEVERAL):
        command = click.option(flag, name, metavar=metavar, multiple=True, help=text)(command)
    return command


@click.command("serve", short_help="Serve bundles over HTTP.")
@click.argument("bundles", nargs=-1, type=click.Path(path_type=Path))
@_serve_options
@machine_options
def serve_command(bundles: tuple[Path, ...], names: tuple[str, ...], new_key: str | None, **options: Any) -> int:
    """Serve BUNDLES over HTTP: OpenAI's interface (/v1), the Open Inference Protocol (/v2), a page (/).

    Ctrl-C and SIGTERM finish the work that was accepted and end with 0; a second Ctrl-C ends at once with 130. SIGHUP
    loads bundles, keys and certificates that were replaced.
    """
    try:
        if new_key is not None:
            return _new_key(options["api_keys"], new_key, bundles)
        return _serve(named(bundles, names), options)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in _PACKAGES:
            raise
        raise InstallationError(f"{error.name} is not installed", "pip install 'hasten[serve]'") from error


def named(bundles: tuple[Path, ...], names: tuple[str, ...]) -> dict[str, Path]:
    """Bundles by name: the one given, or the bundle's own.

    Raises:
        UsageError: There is none, a name is none, or two are the same.
        BundleError: Not a bundle.
    """
    from artifacts.bundle import open_bundle

    found: list[tuple[str, Path]] = []
    for text in names:
        name, _, place = text.partition("=")
        if not _NAME.fullmatch(name) or not place:
            raise UsageError(f"--name {text} is no NAME=BUNDLE", "Write --name small=path/to/bundle")
        found.append((name, Path(place)))
    found += [(open_bundle(path, verify=False).manifest.name, path) for path in bundles]
    if not found:
        raise UsageError("no bundle was given", "hasten serve BUNDLE")
    for name, path in found:
        if sum(name == other for other, _ in found) > 1:
            raise UsageError(f"two bundles are named {name}", f"Name one: --name OTHER={path}")
    return dict(found)


def _new_key(file: Path | None, name: str, bundles: tuple[Path, ...]) -> int:
    from runtimes.serve.auth import new_key

    if file is None or bundles:
        told = "--new-key needs --api-keys FILE" if file is None else "--new-key makes a key and serves nothing"
        raise UsageError(told, "hasten serve --api-keys FILE --new-key NAME")
    click.echo(new_key(file, name))
    click.echo(f"{file}: the key of {name} is shown this once; only its hash was written", err=True)
    return 0


def _serve(paths: dict[str, Path], options: dict[str, Any]) -> int:
    from runtimes.engine.calls import EngineOptions
    from runtimes.engine.engine import Engine
    from runtimes.serve.log import Log
    from runtimes.serve.options import ServeOptions
    from runtimes.serve.run import run_server

    if options["tls_key"] is not None and options["tls_cert"] is None:
        raise UsageError("--tls-key is for --tls-cert", "Pass both")
    engine = EngineOptions(**{name: options[name] for name in _ENGINE if options[name] is not None})
    server = ServeOptions(**{name: options[name] for name in _SERVER})
    cache, log = _cache(options), Log(options["log"])

    def make(path: Path) -> Engine:
        return Engine(path, options=engine, cache=cache)

    return run_server(paths, make, server, log, cache=cache, announce=_announcer(log, server))


def _cache(options: dict[str, Any]) -> ResponseCache | None:
    if options["cache"] is None:
        if options["cache_size"] is not None or options["cache_age"] is not None:
            raise UsageError("there is no cache to limit", "Pass --cache too")
        return None
    from runtimes.responses.opening import open_cache

    size = {} if options["cache_size"] is None else {"max_bytes": options["cache_size"]}
    return open_cache(options["cache"], max_age=options["cache_age"], **size)


def _announcer(log: Log, options: ServeOptions) -> Callable[[str, Models], None]:
    def announce(url: str, models: Models) -> None:
        for served in models:
            workers = [f"{worker.provider or '?'} ({worker.variant})" for worker in served.engine.stats().workers]
            log("model", {"name": served.name, "task": served.task, "workers": workers})
        keys = "asked for" if options.api_keys is not None else "not asked for"
        log("serving", {"url": url, "keys": keys})

    return announce
