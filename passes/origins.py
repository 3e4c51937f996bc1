"""Which columns of which modules a product makes, once passes have packed, sorted and scaled them.

A product that no pass of that kind has touched makes the columns of the module that it stands in. The others say so in
the metadata of the node, so that what is trained on the original model still finds its columns in a finished graph.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .sites import ORIGINS, module_path


@dataclass(frozen=True)
class Origin:
    """Neighbouring columns of a module.

    Attributes:
        module: Its path.
        start: The first of them.
        columns: How many.
        factor: What they were multiplied by.
    """

    module: str
    start: int
    columns: int
    factor: float = 1.0


def origins_of(node: ir.Node, columns: int) -> tuple[Origin, ...]:
    """Where the columns of a product come from, in order; empty where that is not known any more.

    Args:
        node: The product.
        columns: How many it makes.
    """
    text = node.metadata_props.get(ORIGINS)
    if text is None:
        return (Origin(module_path(node), 0, columns),)
    found = tuple(Origin(*fields) for fields in json.loads(text))
    return found if sum(origin.columns for origin in found) == columns else ()


def set_origins(node: ir.Node, origins: Iterable[Origin]) -> None:
    """Say where the columns of a product come from; nothing: that is not known any more."""
    fields = [[one.module, one.start, one.columns, one.factor] for one in _joined(origins)]
    node.metadata_props[ORIGINS] = json.dumps(fields, separators=(",", ":"))


def scale_origins(node: ir.Node, columns: int, factor: NDArray[np.floating]) -> None:
    """Its columns were multiplied by one number; or by several, and are those of no module any more."""
    alike = factor.size == 1 and math.isfinite(float(factor.reshape(-1)[0]))
    by = float(factor.reshape(-1)[0]) if alike else 0.0
    set_origins(node, [replace(one, factor=one.factor * by) for one in origins_of(node, columns)] if by else ())


def sort_origins(node: ir.Node, order: NDArray[np.int64]) -> None:
    """Its columns were sorted: the n-th is now what the ``order[n]``-th was."""
    single = [
        replace(one, start=one.start + index, columns=1)
        for one in origins_of(node, len(order))
        for index in range(one.columns)
    ]
    set_origins(node, [single[index] for index in order] if single else ())


def _joined(origins: Iterable[Origin]) -> Sequence[Origin]:
    """With those that continue each other as one."""
    found: list[Origin] = []
    for one in origins:
        last = found[-1] if found else None
        if last is not None and replace(last, start=last.start + last.columns, columns=one.columns) == one:
            found[-1] = replace(last, columns=last.columns + one.columns)
        else:
            found.append(one)
    return found
