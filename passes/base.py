"""The contract of a pass: a frozen dataclass whose fields are its options and whose one method rewrites a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, Protocol, runtime_checkable

import onnx_ir as ir

from artifacts.target import Target

from .statistics import Activation, Moments

Observe = Callable[[ir.Model, Sequence[ir.Value]], Mapping[str, Activation]]
"""Runs a model, as it is now, on calibration data and tells what float values it saw, by name of the value."""
ObserveMoments = Callable[[ir.Model, Sequence[ir.Value]], Mapping[str, Moments]]
"""The same for second moments: K² numbers a value, so they are read when they are asked for, and not held."""


class Effect(Enum):
    """What a pass may do to the numbers; decides which gate it must pass."""

    EXACT = "exact"
    """Equal to the graph before up to the rounding of its floating-point type."""
    LOSSY = "lossy"
    """Changes the numbers; held by the quality budget."""


class Purpose(Enum):
    """What a pass is for; decides when a measurement reverts it."""

    FORM = "form"
    """Brings the graph into the form other passes expect; kept unless it makes the model slower."""
    SPEED = "speed"
    """Kept only where it makes the model faster on the target."""
    SIZE = "size"
    """Makes the model smaller; kept unless it makes the model slower."""


@dataclass(frozen=True)
class Refusal:
    """A place where a pass could have acted and did not.

    Attributes:
        node: Name of the node.
        reason: Why not.
        remedy: What would make it possible; may be empty.
    """

    node: str
    reason: str
    remedy: str = ""


@dataclass(frozen=True)
class Outcome:
    """What a pass did.

    Attributes:
        changed: How many places were rewritten. A second run on the result changes 0.
        refused: Places it left alone, with reasons.
    """

    changed: int
    refused: tuple[Refusal, ...] = ()


@dataclass(frozen=True)
class Context:
    """What a pass may know besides the graph.

    Attributes:
        target: What the graph is compiled for.
        observe: Lent by whoever has calibration data; None where there is none.
        moments: Lent with it, for what needs second moments; None where there is none.
        original: The graph as it was before anything lossy was done to it, for what repairs the numbers; not to be
            changed. None where nobody kept it.
    """

    target: Target
    observe: Observe | None = None
    moments: ObserveMoments | None = None
    original: ir.Model | None = None


@runtime_checkable
class Pass(Protocol):
    """One rewrite of a graph, in place. Implementations are frozen dataclasses; the fields are the options.

    Attributes:
        name: Text form of the pass, in kebab case; unique in the registry.
        effect: What it may do to the numbers.
        purpose: What it is for.
    """

    name: ClassVar[str]
    effect: ClassVar[Effect]
    purpose: ClassVar[Purpose]

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Rewrite ``model`` in place.

        Returns:
            How many places changed and which were refused. Running again changes 0.
        """
        ...
