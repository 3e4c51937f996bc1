"""Floating-point types narrower than float32. The rounding is in `rounding`, the choice of nodes in `policy`."""

from .float16 import Float16

__all__ = ["Float16"]
