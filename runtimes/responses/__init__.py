"""Answers kept for requests that come again: exact match, deterministic requests only, on SQLite or in Redis."""

from __future__ import annotations

from .cache import CacheStats, ResponseCache
from .keys import request_key
from .opening import open_cache

__all__ = ["CacheStats", "ResponseCache", "open_cache", "request_key"]
