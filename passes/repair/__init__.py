"""What compression changed is fitted again to what the graph computed before. The mathematics is in `regression`."""

from .repair import Repair

__all__ = ["Repair"]
