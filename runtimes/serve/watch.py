"""Looks whether a bundle has a successor: another manifest.json lies where it was."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from artifacts.manifest import MANIFEST_NAME

from .models import Models

Seen = tuple[int, int, int] | None


class Watch:
    """Reloads models whose bundle was replaced.

    Args:
        models: Them.
        seconds: Between two looks; 0: only `now` looks.
        also: Called where `now` was, before the models.
    """

    def __init__(self, models: Models, seconds: float, *, also: Callable[[], None] = lambda: None) -> None:
        self._models = models
        self._seconds = seconds
        self._also = also
        self._asked = asyncio.Event()
        self._seen: dict[str, Seen] = {served.name: _look(served.path) for served in models}

    def now(self) -> None:
        """Look at once, and at all."""
        self._asked.set()

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            try:
                async with asyncio.timeout(self._seconds or None):  # wait_for may swallow a cancellation
                    await self._asked.wait()
            except TimeoutError:
                await self._reload(everything=False)
                continue
            self._asked.clear()
            self._also()
            await self._reload(everything=True)

    async def _reload(self, *, everything: bool) -> None:
        """Reload what has changed; a bundle that is broken is not tried again until it changes."""
        for served in self._models:
            seen = await asyncio.to_thread(_look, served.path)
            if seen == self._seen.get(served.name) and not everything:
                continue
            if seen is None and not everything:  # between two bundles: the new one is about to be there
                continue
            self._seen[served.name] = seen
            await self._models.reload(served.name)


def _look(path: Path) -> Seen:
    try:
        found = (path / MANIFEST_NAME).stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
