"""Second moments as a compile lends them to passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
import pytest
from encoder_graphs import DISABLED, Array, run

from artifacts.target import CPU
from passes.base import Context
from passes.statistics import Moments


def _context(data: Mapping[str, Array]) -> Context:
    def moments(model: ir.Model, values: Sequence[ir.Value]) -> dict[str, Moments]:
        return {str(value.name): _moments(_seen(model, str(value.name), data)) for value in values}

    return Context(CPU, moments=moments)


def _seen(model: ir.Model, name: str, data: Mapping[str, Array]) -> Array:
    if name in data:
        return data[name]
    copy = model.clone()
    found = next(value for node in copy.graph for value in node.outputs if value.name == name)
    copy.graph.outputs.clear()
    copy.graph.outputs.append(found)
    return run(copy, data, DISABLED)


def _moments(array: Array) -> Moments:
    rows = array.reshape(-1, array.shape[-1]).astype(np.float64)
    absmax = np.abs(rows).max(axis=0).astype(np.float32)
    return Moments(len(rows), rows.T @ rows / len(rows), absmax, rows.mean(axis=0))


@pytest.fixture
def calibrated() -> Callable[[Mapping[str, Array]], Context]:
    """A context whose calibration data are the given inputs, run in ONNX Runtime without optimizations."""
    return _context
