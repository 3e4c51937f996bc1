"""Second moments as a compile lends them to passes, in float64 of what ONNX Runtime computes unoptimized."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from encoder_graphs import DISABLED, Array, session

from passes.statistics import Moments

Lent = Callable[[ir.Model, Sequence[ir.Value]], Mapping[str, Moments]]


def lent(data: Mapping[str, Array]) -> Lent:
    """Moments of values of any graph that takes these inputs."""

    def moments(model: ir.Model, values: Sequence[ir.Value]) -> dict[str, Moments]:
        arrays = shown(model, [str(value.name) for value in values], data)
        return {name: moments_of(array) for name, array in arrays.items()}

    return moments


def shown(model: ir.Model, names: Sequence[str], data: Mapping[str, Array]) -> dict[str, Array]:
    """Values of a graph by name."""
    found = {name: data[name] for name in names if name in data}
    asked = [name for name in names if name not in found]
    if asked:
        copy = model.clone()
        made = {value.name: value for node in copy.graph for value in node.outputs}
        copy.graph.outputs.clear()
        copy.graph.outputs.extend(made[name] for name in asked)
        found |= dict(zip(asked, session(copy, DISABLED).run(asked, dict(data)), strict=True))
    return found


def moments_of(array: Array) -> Moments:
    """Of the rows of an array [..., K]."""
    rows = array.reshape(-1, array.shape[-1]).astype(np.float64)
    absmax = np.abs(rows).max(axis=0).astype(np.float32)
    return Moments(len(rows), rows.T @ rows / len(rows), absmax, rows.mean(axis=0))
