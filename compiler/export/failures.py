"""What torch and transformers raise on a model they cannot load or trace."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

import torch
from huggingface_hub.errors import StrictDataclassError

FAILURES = (
    RuntimeError,  # OnnxExporterError among them
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    AssertionError,  # torch's layers, on sizes that make no sense
    OSError,
    ImportError,
    torch._dynamo.exc.TorchDynamoException,
)
"""All but interrupts and lack of memory."""
LOADING_FAILURES = (*FAILURES, StrictDataclassError)
"""The same, and what transformers raises on a config that makes no sense."""


def first_line(error: BaseException) -> str:
    """The first line of what went wrong first, at most 300 characters."""
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    lines = [line.strip() for line in str(root).splitlines() if line.strip()]
    return (lines[0] if lines else type(root).__name__)[:300]


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Tracing keeps what it makes, and a collector that looks for garbage in it takes a sixth of the export's time."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()
