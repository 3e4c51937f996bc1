"""Products with weights in blocks (com.microsoft MatMulNBits) that read one value, made one: part of pack-products."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from passes.affine import read_only_by
from passes.sites import constant_of, integer_attribute
from passes.splice import Names, add_constant
from passes.surgery import MICROSOFT, build, is_operator, needed

_COLUMNS = "N"
_CODES, _SCALES, _ZERO_POINTS, _ORDER, _BIAS = 1, 2, 3, 4, 5
"""Indices of inputs; all but the order of rows are laid out column after column of the weight."""
_SUFFIXES = ("_uint8", "_int4", "_int2", "_scale", "_zero_point", "_bias")


def block_groups(graph: ir.Graph) -> list[list[ir.Node]]:
    """The nodes that read the same value, where there are several, in graph order."""
    groups: defaultdict[ir.Value, list[ir.Node]] = defaultdict(list)
    for node in graph:
        if is_operator(node, "MatMulNBits", domain=MICROSOFT):
            groups[needed(node.inputs[0])].append(node)
    return [group for group in groups.values() if len(group) > 1]


def reason_against_blocks(group: Sequence[ir.Node]) -> str:
    """Why the nodes cannot be made one; empty where they can."""
    forms = {_form(node) for node in group}
    operands = [
        (node, index) for node in group for index in range(1, len(node.inputs)) if node.inputs[index] is not None
    ]
    variable = any(constant_of(node.inputs[index]) is None for node, index in operands)
    alone = all(read_only_by(needed(node.inputs[index]), [(node, index)]) for node, index in operands)
    reasons = (
        (len(forms) > 1, "its weights are stored in other blocks or types than those of the products beside it"),
        (variable, "a weight is no constant"),
        (not alone, "a weight is used elsewhere too"),
        (any(_input(node, _ORDER) is not None for node in group), "its rows are in an order of their own"),
    )
    return next((reason for applies, reason in reasons if applies), "")


def pack_blocks(graph: ir.Graph, names: Names, group: Sequence[ir.Node]) -> ir.Node:
    """One node, in no graph yet, whose output has those of the group behind each other along the last axis.

    The constants, column after column, are put behind each other as they are; a bias that only some have is 0 for the
    others.
    """
    first = group[0]
    joined = [_joined(graph, names, group, index) for index in (_CODES, _SCALES, _ZERO_POINTS, _ORDER, _BIAS)]
    inputs = [first.inputs[0], *joined]
    while inputs[-1] is None:
        inputs.pop()
    attributes = {name: attribute.value for name, attribute in first.attributes.items()}
    attributes[_COLUMNS] = sum(columns_of(node) for node in group)
    name, dtype = names.fresh(f"{first.outputs[0].name}.packed"), first.outputs[0].dtype
    return build("MatMulNBits", inputs, like=first, name=name, domain=MICROSOFT, attributes=attributes, dtype=dtype)


def columns_of(node: ir.Node) -> int:
    """N: how long the last axis of what the node makes is."""
    return integer_attribute(node, _COLUMNS, 0)


def _joined(graph: ir.Graph, names: Names, group: Sequence[ir.Node], index: int) -> ir.Value | None:
    values = [_input(node, index) for node in group]
    present = [value for value in values if value is not None]
    if not present:
        return None
    kind = _array(present[0]).dtype
    arrays = [
        np.zeros(columns_of(node), kind) if value is None else _array(value)
        for node, value in zip(group, values, strict=True)
    ]
    return add_constant(graph, names.fresh(_packed_name(str(present[0].name))), np.concatenate(arrays))


def _array(value: ir.Value) -> NDArray[np.generic]:
    tensor = constant_of(value)
    if tensor is None:
        raise ValueError(f"{value.name} is no constant any more")
    return tensor.numpy()


def _packed_name(name: str) -> str:
    """Of the weight packed: the ending that says what part of it this is stays the ending."""
    ending = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), "")
    return f"{name.removesuffix(ending)}.packed{ending}"


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if len(node.inputs) > index else None


def _form(node: ir.Node) -> tuple[object, ...]:
    """What must be equal for two nodes to be packed: all but N, which inputs there are, their types and ranks."""
    attributes = {name: attribute.value for name, attribute in node.attributes.items() if name != _COLUMNS}
    kinds: list[object] = []
    for index in (_CODES, _SCALES, _ZERO_POINTS, _ORDER):
        tensor = constant_of(_input(node, index))
        kinds.append(None if tensor is None else (tensor.dtype, len(tensor.shape)))
    return (*sorted(attributes.items()), *kinds)
