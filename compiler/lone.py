"""One linear operator as a graph of its own: what a form of it costs on the target, and what it does to the numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Protocol, TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from artifacts.target import Target
from passes.base import Context, Observe, ObserveMoments, Pass
from passes.statistics import ActivationAccumulator, MomentsAccumulator

Floats = NDArray[np.float32]

INPUT, OUTPUT = "x", "y"
_OPSET, _IR = 21, 10
_Seen = TypeVar("_Seen")
_Seen_co = TypeVar("_Seen_co", covariant=True)


class _Accumulator(Protocol[_Seen_co]):
    def update(self, array: Floats) -> None: ...

    def result(self) -> _Seen_co: ...


def lone_model(weight: Floats, bias: Floats, *, copies: int = 1) -> ir.Model:
    """``y = x @ W + b`` for ``x [rows, K]``, as exporters write it; several of them side by side, each with an input.

    Args:
        weight: float32 [K, N].
        bias: float32 [N].
        copies: How many. The graph inputs are ``x0``..., the outputs ``y0``...
    """
    (k, n), nodes, inputs, outputs, constants = weight.shape, [], [], [], []
    for index in range(copies):
        x = _value(f"{INPUT}{index}", ("rows", k))
        product, y = _value(f"product{index}", ("rows", n)), _value(f"{OUTPUT}{index}", ("rows", n))
        w, b = _constant(f"weight{index}", weight), _constant(f"bias{index}", bias)
        nodes += [
            ir.node("MatMul", [x, w], outputs=[product], name=f"site{index}"),
            ir.node("Add", [product, b], outputs=[y], name=f"add{index}"),
        ]
        inputs.append(x)
        outputs.append(y)
        constants += [w, b]
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=constants, opset_imports={"": _OPSET}, name="lone")
    return ir.Model(graph, ir_version=_IR)


def rewritten(model: ir.Model, form: Pass | None, target: Target, sample: Floats) -> ir.Model | None:
    """The model in that form, as the pass emits it for the target; None where it refuses.

    Args:
        model: Of `lone_model`; rewritten in place.
        form: None for the plain float32 form.
        target: What it is for.
        sample: float32 [rows, K] of the input, for passes that need to know its range.
    """
    if form is None:
        return model
    outcome = form.run(model, Context(target, observing(sample), observing_moments(sample)))
    return model if outcome.changed else None


def observing(sample: Floats) -> Observe:
    """What calibration would say of values that look like ``sample [rows, K]``."""
    return _saying(ActivationAccumulator(INPUT), sample)


def observing_moments(sample: Floats) -> ObserveMoments:
    """The same for second moments."""
    return _saying(MomentsAccumulator(INPUT), sample)


def _saying(
    accumulator: _Accumulator[_Seen], sample: Floats
) -> Callable[[ir.Model, Sequence[ir.Value]], dict[str, _Seen]]:
    """Says the same of every value. The sample is looked at when it is asked for first, and once."""

    @cache
    def seen() -> _Seen:
        accumulator.update(sample)
        return accumulator.result()

    return lambda _, values: {str(value.name): seen() for value in values}


def _value(name: str, shape: tuple[str | int, ...]) -> ir.Value:
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))


def _constant(name: str, array: Floats) -> ir.Value:
    tensor = ir.tensor(array, name=name)
    return ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(array.shape), const_value=tensor)
