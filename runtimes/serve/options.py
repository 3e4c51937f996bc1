"""How a server treats its clients."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ServeOptions:
    """All that `hasten serve` may be told but for the models.

    Attributes:
        host: Address to listen at.
        port: Port; 0: any that is free.
        api_keys: File of keys that requests must carry one of; None: anybody may ask.
        no_auth: Anybody may ask although the address is not loopback.
        cors: Origins whose pages may ask.
        hosts: Host names by which clients may call a loopback server, beside localhost and its addresses.
        tls_cert: Certificates, PEM; None: plain HTTP.
        tls_key: Its private key, PEM; None: in the same file.
        max_body: Most bytes of a body.
        max_head: Most bytes of a request's line and headers.
        max_concurrency: Most requests that are worked on at once; the next is refused at once.
        max_connections: Most connections.
        rate: Requests a second of a key, or of an address where there are no keys; 0: any number.
        burst: Requests that may come at once within the rate; 0: as many as a second gives.
        timeout: Longest seconds for a request's answer, and what a request gets that names none.
        head_timeout: Seconds for a request's line and headers.
        body_timeout: Seconds for a body.
        write_timeout: Seconds that a client may leave an answer unread.
        keep_alive: Seconds that an idle connection is kept.
        drain: Seconds that accepted work has when the server is ended.
        watch: Seconds between looks at the bundles for successors; 0: only SIGHUP asks for one.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: Path | None = None
    no_auth: bool = False
    cors: tuple[str, ...] = ()
    hosts: tuple[str, ...] = ()
    tls_cert: Path | None = None
    tls_key: Path | None = None
    max_body: int = 16 << 20
    max_head: int = 32 << 10
    max_concurrency: int = 1024
    max_connections: int = 2048
    rate: float = 0.0
    burst: float = 0.0
    timeout: float = 600.0
    head_timeout: float = 10.0
    body_timeout: float = 30.0
    write_timeout: float = 30.0
    keep_alive: int = 30
    drain: float = 30.0
    watch: float = 2.0
