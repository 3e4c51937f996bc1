"""Values in Redis, shared by servers."""

from __future__ import annotations

import math
from typing import Any
from urllib.parse import urlsplit

from artifacts.errors import InstallationError, UsageError

SCHEMES = ("redis", "rediss")
_PREFIX = "hasten:"
_CONNECT = 1.0
_WAIT = 1.0


class RedisStore:
    """Sealed values under ``hasten:<key>`` in a Redis server. How much it holds is its own ``maxmemory``."""

    def __init__(self, url: str, *, max_age: float | None) -> None:
        """Nothing is connected before the first use.

        Args:
            url: ``redis://[[user]:password@]host[:port][/database]``, or ``rediss://`` for TLS.
            max_age: Seconds after which Redis forgets a value; None: it does not.

        Raises:
            InstallationError: redis is not installed.
            UsageError: The URL is none.
        """
        try:
            from redis.asyncio import Redis
            from redis.asyncio.retry import Retry
            from redis.backoff import NoBackoff
        except ImportError as error:
            raise InstallationError("redis is not installed", "pip install 'hasten[serve]'") from error
        self._name = _without_secrets(url)
        try:
            # One retry: a connection that was idle while the server restarted is replaced by a fresh one.
            self._client: Any = Redis.from_url(
                url, socket_connect_timeout=_CONNECT, socket_timeout=_WAIT, retry=Retry(NoBackoff(), 1)
            )
        except (ValueError, TypeError) as error:
            raise UsageError(f"{self._name} is no Redis URL", "Write redis://host:port/database") from error
        self._expiry = None if max_age is None else max(1, math.ceil(1000.0 * max_age))

    def __str__(self) -> str:
        return self._name

    async def load(self, key: str) -> bytes | None:
        """The sealed value, or None."""
        found = await self._client.get(_PREFIX + key)
        return found if isinstance(found, bytes) else None

    async def save(self, key: str, sealed: bytes) -> None:
        """Keep a sealed value."""
        await self._client.set(_PREFIX + key, sealed, px=self._expiry)

    async def probe(self) -> None:
        """Fails if a value can not be kept at present."""
        await self._client.set(f"{_PREFIX}probe", b"", px=1000)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    def held(self) -> None:
        """None: the server holds others' values too."""
        return


def _without_secrets(url: str) -> str:
    """The URL as it may stand in a log: without user and password."""
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "the URL"
    return f"{parts.scheme}://{parts.hostname or ''}{port}{parts.path}"
