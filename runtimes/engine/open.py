"""The engine by the name that users know it by."""

from __future__ import annotations

import os
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from artifacts.errors import UsageError

from .calls import EngineOptions
from .engine import Engine

if TYPE_CHECKING:
    from ..responses.cache import ResponseCache


def serve_engine(path: str | os.PathLike[str], *, cache: ResponseCache | None = None, **options: Any) -> Engine:
    """A bundle served to many callers at once, by worker processes on every device asked for.

    ``async with hasten.serve_engine(OUT) as engine: await engine.embed([…])``; without ``async``, ``with`` gives the
    same methods to be called without ``await``.

    Args:
        path: The bundle's folder.
        cache: Keeps answers to deterministic requests; see `runtimes.responses`. None: nothing is kept.
        options: The fields of `EngineOptions`: ``workers``, ``device``, ``idle_timeout`` …

    Raises:
        UsageError: There is no such option, or it makes no sense. The bundle is opened when the engine is started.
    """
    names = [one.name for one in fields(EngineOptions)]
    if unknown := [name for name in options if name not in names]:
        raise UsageError(f"an engine has no option {unknown[0]!r}", f"It has {', '.join(names)}")
    return Engine(path, options=EngineOptions(**options), cache=cache)
