"""What a pass reads of a convolution before it takes it apart, and how it puts a chain in its place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from passes.affine import Floats
from passes.shapes import dims_of
from passes.sites import ConvSite, constant_of, convolution_sites
from passes.splice import Names, add_constant, take_place
from passes.surgery import build, remove_dead

from .convolution_forms import Chain, Geometry, Step

Attributes = dict[str, int | float | str | Sequence[int]]

FACTORED = "hasten.factored"
"""Metadata of the nodes of a chain: what its convolution cost, on the last one, and 0 on the others."""


def site_of(model: ir.Model, node: ir.Node) -> ConvSite:
    """The site of a node that was one when the pass began: what it reads may have another maker by now.

    Raises:
        ValueError: It is none.
    """
    site = next((site for site in convolution_sites(model) if site.node is node), None)
    if site is None:
        raise ValueError(f"{node.name} is no convolution any more")
    return site


def unfit(site: ConvSite) -> str:
    """Why the numbers of a convolution cannot be worked with; empty if they can."""
    kernel, bias = constant_of(site.weight), constant_of(site.bias)
    if site.group != 1:
        return f"it has {site.group} groups"
    if kernel is None or kernel.dtype != ir.DataType.FLOAT:
        return "the kernel is not float32"
    if site.bias is not None and (bias is None or bias.dtype != ir.DataType.FLOAT):
        return "the bias is no constant of float32"
    if not np.isfinite(kernel.numpy()).all() or (bias is not None and not np.isfinite(bias.numpy()).all()):
        return "the kernel or the bias has values that are not finite"
    return ""


def arrays_of(site: ConvSite) -> tuple[Floats, Floats | None]:
    """Kernel as float32 [N, C * taps] and bias [N]."""
    kernel, bias = constant_of(site.weight), constant_of(site.bias)
    if kernel is None:
        raise ValueError(f"{site.weight.name} is no constant any more")
    return kernel.numpy().reshape(site.shape[0], -1), None if bias is None else bias.numpy()


def planes(site: ConvSite) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Height and width before and after; None where they are not known."""
    found = []
    for value in (site.input, site.output):
        dims = dims_of(value)
        height, width = dims[2:] if dims is not None and len(dims) == 4 else (None, None)
        if not isinstance(height, int) or not isinstance(width, int):
            return None
        found.append((height, width))
    return found[0], found[1]


def geometry(site: ConvSite, memory: int = 0) -> Geometry:
    """How it walks, and what memory costs; planes of unknown size count as one place of the output."""
    before, after = planes(site) or (site.strides, (1, 1))
    return Geometry(site.shape, site.strides, site.pads, site.dilations, before, after, memory)


def cost(site: ConvSite, memory: int) -> int:
    """Work for one example, see `Geometry.dense`; 0 where the planes are of unknown size."""
    walk = geometry(site, memory)
    if planes(site) is None:
        return 0
    more = walk.areas[0] * walk.shape[1] * (site.group - 1)  # the kernel tells of the channels of one group
    return walk.dense + memory * more


def multiply_adds(site: ConvSite) -> int:
    """For one example; 0 where the planes are of unknown size."""
    return 0 if planes(site) is None else geometry(site).dense


def replace_by_chain(
    model: ir.Model, names: Names, site: ConvSite, chain: Chain, bias: Floats, *, spent: int
) -> None:  # fmt: skip
    """Put the chain in the place of the convolution, which cost ``spent``; the last node makes what the site made."""
    read = [value for value in site.node.inputs if value is not None]
    builder = _Builder(model, names, site)
    total: ir.Value | None = None
    for place, steps in enumerate(chain.branches):
        last = place == len(chain.branches) - 1
        value = builder.branch(steps, bias if last else None)
        total = value if total is None else builder.sum(total, value)
    if total is None:
        raise ValueError("a chain has no branches")
    convolutions = [node for node in builder.nodes if node.op_type == "Conv"]
    for node in convolutions:
        node.metadata_props[FACTORED] = "0"
    convolutions[-1].metadata_props[FACTORED] = str(spent)
    model.graph.insert_before(site.node, builder.nodes)
    take_place(total, site.output)
    model.graph.remove(site.node, safe=True)
    remove_dead(read)


class _Builder:
    """Makes the nodes that take the place of one convolution."""

    def __init__(self, model: ir.Model, names: Names, site: ConvSite) -> None:
        self.nodes: list[ir.Node] = []
        self._graph = model.graph
        self._names = names
        self._site = site
        self._planes = planes(site)

    def branch(self, steps: Sequence[Step], bias: Floats | None) -> ir.Value:
        """Convolutions one after the other; the last one adds the bias."""
        value = self._site.input
        plane = self._planes[0] if self._planes is not None else None
        for step in steps:
            inputs = [value, self._constant("factor", step.weight)]
            if bias is not None and step is steps[-1]:
                inputs.append(self._constant("bias", bias))
            plane = None if plane is None else _walked(plane, step)
            value = self._node("Conv", inputs, len(step.weight), plane, _attributes(step))
        return value

    def sum(self, left: ir.Value, right: ir.Value) -> ir.Value:
        """Of two branches."""
        plane = self._planes[1] if self._planes is not None else None
        return self._node("Add", [left, right], self._site.shape[0], plane, {})

    def _constant(self, part: str, array: Floats) -> ir.Value:
        return add_constant(self._graph, self._names.fresh(f"{self._site.weight.name}.{part}"), array)

    def _node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value],
        channels: int,
        plane: tuple[int, int] | None,
        attributes: Attributes,
    ) -> ir.Value:
        source = self._site.input.shape
        shape = ir.Shape([source[0], channels, *plane]) if plane is not None and source is not None else None
        name = self._names.fresh(f"{self._site.output.name}.{len(self.nodes)}")
        node = build(op_type, inputs, like=self._site.node, name=name, attributes=attributes, shape=shape)
        node.outputs[0].dtype = ir.DataType.FLOAT
        self.nodes.append(node)
        return node.outputs[0]


def _attributes(step: Step) -> Attributes:
    return {
        "kernel_shape": step.weight.shape[2:],
        "strides": step.strides,
        "pads": step.pads,
        "dilations": step.dilations,
        "group": step.group,
    }


def _walked(plane: tuple[int, int], step: Step) -> tuple[int, int]:
    """Height and width of what a step makes of such a plane."""
    sizes = []
    for axis in range(2):
        reach = step.dilations[axis] * (step.weight.shape[2 + axis] - 1) + 1
        sizes.append((plane[axis] + step.pads[axis] + step.pads[axis + 2] - reach) // step.strides[axis] + 1)
    return sizes[0], sizes[1]
