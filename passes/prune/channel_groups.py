"""Channels of feature maps that live and die together: outputs of convolutions that are added, normalized, pooled."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import onnx_ir as ir

from passes.base import Refusal
from passes.factor.convolution_sites import unfit
from passes.quantize.linear import ending
from passes.shapes import dims_of
from passes.sites import ConvSite, LinearSite, constant_of, convolution_sites, integer_attribute, linear_sites
from passes.splice import label
from passes.surgery import integers, is_operator

_ALONE = (
    *(
        "Relu",
        "LeakyRelu",
        "Elu",
        "Selu",
        "Celu",
        "Sigmoid",
        "HardSigmoid",
        "HardSwish",
        "Tanh",
        "Softplus",
        "Softsign",
    ),
    *("Mish", "Gelu", "Erf", "Clip", "Identity", "Dropout", "Abs", "Exp", "Neg", "Sqrt"),
    *("MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool"),
)
"""Operators that give each channel of their first input a channel of their own."""
_TOGETHER = ("Add", "Sub", "Mul", "Div", "Max", "Min", "PRelu")
"""Operators that give each channel what they make of that channel of two inputs."""


@dataclass(frozen=True, eq=False)
class Reader:
    """A product over the channels.

    Attributes:
        site: A convolution of one group, or a linear site behind a flattened map.
        taps: Inputs of the product that belong to one channel; those of a channel lie side by side.
    """

    site: ConvSite | LinearSite
    taps: int


@dataclass(frozen=True)
class Vector:
    """A constant that has a number for each channel.

    Attributes:
        node: Its reader.
        index: Which input of that.
        axis: Of the constant: the channels.
    """

    node: ir.Node
    index: int
    axis: int


@dataclass(eq=False)
class ChannelGroup:
    """Maps whose channels go together.

    Attributes:
        width: Channels.
        makers: Convolutions of one group that make them.
        depthwise: Convolutions that have a kernel for each.
        readers: Products over them.
        vectors: Constants with a number for each.
        reshapes: Nodes that flatten a map to a stated length.
        values: All maps, with the elements of the second axis that belong to one channel.
        blocked: Why none can go; None where they can.
    """

    width: int
    makers: list[ConvSite] = field(default_factory=list)
    depthwise: list[ConvSite] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)
    vectors: list[Vector] = field(default_factory=list)
    reshapes: list[ir.Node] = field(default_factory=list)
    values: dict[ir.Value, int] = field(default_factory=dict)
    blocked: Refusal | None = None

    def block(self, node: ir.Node | None, reason: str) -> None:
        """Let none go; the first reason stays."""
        if self.blocked is None:
            name = label(node) if node is not None else label(self.makers[0].node)
            self.blocked = Refusal(name, reason)

    def absorb(self, other: ChannelGroup) -> None:
        """Take all that the other has."""
        for name in ("makers", "depthwise", "readers", "vectors", "reshapes"):
            getattr(self, name).extend(getattr(other, name))
        self.values |= other.values
        self.blocked = self.blocked or other.blocked


def channel_groups(model: ir.Model) -> list[ChannelGroup]:
    """All groups of the main graph, in the order of their first convolutions; blocked ones too.

    Followed: convolutions, BatchNormalization, pooling, mean over the plane, arithmetic of two maps or of a map and a
    constant, functions of single elements, Flatten and Reshape to ``[batch, channels * plane]``, MatMul and Gemm. What
    any other operator reads, and what the graph gives, is blocked.
    """
    trace = _Trace(model)
    for node in model.graph:
        trace.visit(node)
    groups = list({id(group): group for group in trace.groups.values()}.values())
    for group in groups:
        for value in group.values:
            if value.is_graph_output():
                group.block(value.producer(), "the graph gives these channels to its caller")
            for node, _ in value.uses():
                if node.graph is not model.graph:
                    group.block(node, "a branch or a loop reads these channels")
    return groups


class _Trace:
    """Walks the nodes in order and keeps the group of each map."""

    def __init__(self, model: ir.Model) -> None:
        self._convolutions = {site.node: site for site in convolution_sites(model)}
        self._linear = {site.node: site for site in linear_sites(model)}
        self.groups: dict[ir.Value, ChannelGroup] = {}

    def visit(self, node: ir.Node) -> None:
        seen = [value for value in node.inputs if value in self.groups]
        site = self._convolutions.get(node)
        if site is not None and not unfit(site):
            self._convolution(site)
        elif not seen or self._followed(node, site):
            return
        else:
            for value in seen:
                self.groups[value].block(node, f"{node.op_type} reads these channels")

    def _convolution(self, site: ConvSite) -> None:
        group = self.groups.get(site.input)
        if group is not None:
            if group.values[site.input] == 1 and group.width == site.shape[1]:
                group.readers.append(Reader(site, site.shape[2] * site.shape[3]))
            else:
                group.block(site.node, "the convolution does not read these channels as such")
        self.groups[site.output] = ChannelGroup(site.shape[0], makers=[site], values={site.output: 1})

    def _followed(self, node: ir.Node, site: ConvSite | None) -> bool:
        """Whether the node is one of those that are known; the group of its first input then knows it too."""
        first = node.inputs[0]
        group = self.groups.get(first) if first is not None else None
        if is_operator(node, *_TOGETHER):
            return self._together(node)
        if group is None or first is None:
            return False
        if site is not None:
            return self._depthwise(group, site)
        if node in self._linear:
            return _linear(group, self._linear[node])
        if is_operator(node, *_ALONE) or _is_plane_mean(node):
            self._give(group, node, group.values[first])
        elif is_operator(node, "BatchNormalization") and _has_channels(node, group):
            group.vectors += [Vector(node, index, 0) for index in range(1, 5)]
            self._give(group, node, 1)
        elif _flattens(node, group):
            group.reshapes += [node] if node.op_type == "Reshape" else []
            self._give(group, node, group.values[first] * _plane(first))
        else:
            return False
        return True

    def _give(self, group: ChannelGroup, node: ir.Node, taps: int) -> None:
        """Let the first output of a node belong to the group."""
        group.values[node.outputs[0]] = taps
        self.groups[node.outputs[0]] = group

    def _depthwise(self, group: ChannelGroup, site: ConvSite) -> bool:
        kernel, bias = constant_of(site.weight), constant_of(site.bias)
        known = kernel is not None and (site.bias is None or bias is not None)
        if not known or not site.group == group.width == site.shape[0] or group.values[site.input] != 1:
            return False
        group.depthwise.append(site)
        self._give(group, site.node, 1)
        return True

    def _together(self, node: ir.Node) -> bool:
        inputs = [value for value in node.inputs if value is not None]
        maps = [value for value in inputs if value in self.groups]
        group, taps = self.groups[maps[0]], self.groups[maps[0]].values[maps[0]]
        rank = len(dims_of(maps[0]) or ())
        vectors: list[Vector] = []
        for index, value in enumerate(inputs):
            if value in self.groups:
                other = self.groups[value]
                if (other.width, other.values[value], len(dims_of(value) or ())) != (group.width, taps, rank):
                    return False
                continue
            vector = _vector(node, index, rank, group.width * taps)
            if vector is None or (vector.axis >= 0 and taps != 1):
                return False
            vectors += [vector] if vector.axis >= 0 else []
        for value in maps[1:]:
            self._join(group, self.groups[value])
        group.vectors += vectors
        self._give(group, node, taps)
        return True

    def _join(self, group: ChannelGroup, other: ChannelGroup) -> None:
        if group is not other:
            group.absorb(other)
            self.groups.update(dict.fromkeys(other.values, group))


def _linear(group: ChannelGroup, site: LinearSite) -> bool:
    taps = group.values[site.input]
    tensor = constant_of(site.weight)
    dims = dims_of(site.input)
    if tensor is None or tensor.dtype != ir.DataType.FLOAT or dims is None or len(dims) != 2:
        return False
    if site.shape[0] != group.width * taps or (site.bias is not None and ending(site).rest is not None):
        return False
    group.readers.append(Reader(site, taps))
    return True


def _vector(node: ir.Node, index: int, rank: int, width: int) -> Vector | None:
    """How a constant meets the channels of a map of that rank: axis -1 if the same for all; None if it does not."""
    tensor = constant_of(node.inputs[index])
    if tensor is None or not rank:
        return None
    shape = tuple(tensor.shape.numpy())
    axis = len(shape) - (rank - 1)
    if len(shape) > rank:
        return None
    if axis < 0 or shape[axis] == 1:
        return Vector(node, index, -1)
    if shape[axis] != width or prod(shape) != width:
        return None
    return Vector(node, index, axis)


def _has_channels(node: ir.Node, group: ChannelGroup) -> bool:
    """Whether a normalization has constants for each channel, and no outputs besides."""
    tensors = [constant_of(value) for value in node.inputs[1:5]]
    constants = all(tensor is not None and tuple(tensor.shape.numpy()) == (group.width,) for tensor in tensors)
    training = integer_attribute(node, "training_mode", 0) != 0 or any(value.uses() for value in node.outputs[1:])
    return constants and len(tensors) == 4 and not training


def _is_plane_mean(node: ir.Node) -> bool:
    """Whether a node takes the mean, or the like, over both axes of the plane of a map."""
    if not is_operator(node, "ReduceMean", "ReduceMax", "ReduceSum", "ReduceL2"):
        return False
    dims = dims_of(node.inputs[0])
    stated = node.attributes.get("axes")
    axes = integers(node.inputs[1]) if len(node.inputs) > 1 else None if stated is None else stated.as_ints()
    return dims is not None and len(dims) == 4 and axes is not None and {axis % 4 for axis in axes} == {2, 3}


def _plane(value: ir.Value) -> int:
    """Elements of a map that belong to one channel of one example; 0 where that is not known."""
    dims = dims_of(value)
    sizes = [dim if isinstance(dim, int) else 0 for dim in (dims or (0, 0, 0))[2:]]
    return prod(sizes)


def _flattens(node: ir.Node, group: ChannelGroup) -> bool:
    """Whether a node makes ``[batch, channels * plane]`` of a map of known plane."""
    source = node.inputs[0]
    if source is None or not _plane(source) or group.values[source] != 1:
        return False
    if is_operator(node, "Flatten"):
        return integer_attribute(node, "axis", 1) == 1
    target = integers(node.inputs[1]) if is_operator(node, "Reshape") else None
    length = group.width * _plane(source)
    dims, made = dims_of(source), dims_of(node.outputs[0])
    if target is None or len(target) != 2 or dims is None:
        return False
    return target[1] == length or (target[1] == -1 and (target[0] in (0, dims[0]) or (made or (0, 0))[1] == length))


def by_node(groups: list[ChannelGroup]) -> dict[ir.Node, ChannelGroup]:
    """The group of which each convolution makes channels."""
    return {site.node: group for group in groups for site in group.makers}
