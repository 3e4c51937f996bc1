"""How channels are taken out of a graph, and how what reads the rest is fitted again."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from passes.affine import Floats, matrix_of
from passes.factor.convolution_sites import arrays_of
from passes.quantize.linear import ending
from passes.shapes import dims_of
from passes.sites import ConvSite, LinearSite, constant_of
from passes.splice import Names, add_constant, label
from passes.surgery import remove_dead

from .channel_groups import ChannelGroup
from .channel_scores import Indices, columns

PRUNED = "hasten.pruned.channels"
"""Metadata of a convolution whose outputs were pruned: how many there were."""


def weight_of(site: ConvSite | LinearSite) -> Floats:
    """``W [N, K]`` of ``W x``, in the order of the axes of a kernel."""
    return arrays_of(site)[0] if isinstance(site, ConvSite) else matrix_of(site).T


def bias_of(site: ConvSite | LinearSite) -> Floats | None:
    """``[N]``, as far as it belongs to what the node itself makes."""
    if isinstance(site, ConvSite):
        return arrays_of(site)[1]
    end = ending(site)
    return end.bias if end.last is site.node else None


def cut(model: ir.Model, names: Names, group: ChannelGroup, kept: Indices) -> None:
    """Take all but some channels out of everything in the group.

    Args:
        model: The graph.
        names: Of its values.
        group: Not blocked. Its sites still name nodes of the graph; their constants may have changed.
        kept: The channels that stay, in their order.
    """
    change = _Change(model.graph, names)
    for site in (*group.makers, *group.depthwise):
        change.take(site.node, 1, 0, kept)
        if len(site.node.inputs) > 2 and site.node.inputs[2] is not None:
            change.take(site.node, 2, 0, kept)
    for site in group.makers:
        site.node.metadata_props.setdefault(PRUNED, str(group.width))
    for site in group.depthwise:
        site.node.attributes.add(ir.AttrInt64("group", len(kept)))
    for reader in group.readers:
        node = reader.site.node
        if isinstance(reader.site, ConvSite):
            change.take(node, 1, 1, kept)
        else:
            change.take(node, 1, 1 if reader.site.transposed else 0, columns(kept, reader.taps))
    for vector in group.vectors:
        change.take(vector.node, vector.index, vector.axis, kept)
    for value, taps in group.values.items():
        _shrink(value, len(kept) * taps)
    for node in group.reshapes:
        change.reshape(node, len(kept) * group.values[node.outputs[0]])


def refill(model: ir.Model, names: Names, site: ConvSite | LinearSite, weight: Floats, bias: Floats) -> None:
    """Give a site other numbers.

    Args:
        model: The graph.
        names: Of its values.
        site: Of the graph as it is now.
        weight: ``W [N, K]``.
        bias: ``[N]``, of what the node itself makes. A MatMul hands it to the constant that is added behind it.
    """
    change = _Change(model.graph, names)
    node = site.node
    if isinstance(site, ConvSite):
        change.put(node, 1, weight.reshape(site.shape))
        change.put(node, 2, bias)
        return
    end = ending(site)
    change.put(node, 1, weight if site.transposed else weight.T)
    if end.last is not node and end.bias is not None:
        index = next(index for index, value in enumerate(end.last.inputs) if constant_of(value) is not None)
        change.put(end.last, index, end.bias + bias)
    elif node.op_type == "Gemm":
        change.put(node, 2, bias)


def has_bias(site: ConvSite | LinearSite) -> bool:
    """Whether `refill` has a place for one."""
    if isinstance(site, ConvSite):
        return True
    end = ending(site)
    return end.bias is not None or (site.node.op_type == "Gemm" and end.rest is None)


class _Change:
    """Puts constants of other shapes into a graph; each node gets its own."""

    def __init__(self, graph: ir.Graph, names: Names) -> None:
        self._graph = graph
        self._names = names

    def take(self, node: ir.Node, index: int, axis: int, kept: Indices) -> None:
        tensor = constant_of(node.inputs[index])
        if tensor is None:
            raise ValueError(f"input {index} of {label(node)} is no constant any more")
        self.put(node, index, np.take(tensor.numpy(), kept, axis))

    def put(self, node: ir.Node, index: int, array: NDArray[np.generic]) -> None:
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        old = node.inputs[index]
        base = old.name if old is not None and old.name else f"{node.outputs[0].name}.{index}"
        name = self._names.fresh(base)
        node.replace_input_with(index, add_constant(self._graph, name, np.ascontiguousarray(array)))
        if old is not None:
            remove_dead([old])

    def reshape(self, node: ir.Node, length: int) -> None:
        tensor = constant_of(node.inputs[1])
        if tensor is None:
            raise ValueError(f"the target of {label(node)} is no constant any more")
        target = np.array(tensor.numpy())
        if target[1] > 0:
            target[1] = length
            self.put(node, 1, target)


def _shrink(value: ir.Value, length: int) -> None:
    dims = dims_of(value)
    if dims is not None and len(dims) > 1 and value.shape is not None:
        value.shape = ir.Shape([*(value.shape[:1]), length, *(value.shape[2:])])
