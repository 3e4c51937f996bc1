"""Floating-point types narrower than float32. The rounding is in `rounding`, the choice of nodes in `policy`."""

from .float16 import Float16
from .kv_cache import KvCache

__all__ = ["Float16", "KvCache"]
