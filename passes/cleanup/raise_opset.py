"""raise-opset."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnxscript.version_converter import ConvertVersionPass

from passes.base import Context, Effect, Outcome, Purpose, Refusal
from passes.surgery import opset


@dataclass(frozen=True)
class RaiseOpset:
    """Convert a graph of an older opset to ``minimum``, the first that has the operators the fusions make (Gelu: 20).

    Refused: graphs that the converter cannot take there; they stay as they are.

    Attributes:
        minimum: The standard opset that the graph should have at least.
    """

    name: ClassVar[str] = "raise-opset"
    effect: ClassVar[Effect] = Effect.EXACT
    purpose: ClassVar[Purpose] = Purpose.FORM

    minimum: int = 20

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Convert the graph; changed is 1 if it was."""
        version = opset(model)
        if version == 0 or version >= self.minimum:
            return Outcome(0)
        with _quiet():
            ConvertVersionPass(target_version=self.minimum, fallback=True)(model)
        if opset(model) >= self.minimum:
            return Outcome(1)
        reason = f"opset {version} could not be converted to {self.minimum}"
        return Outcome(0, (Refusal("", reason, f"Export the model with opset {self.minimum} or higher"),))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the converter, which warns each time it hands a graph on to ONNX's own."""
    logger = logging.getLogger("onnxscript.version_converter")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
