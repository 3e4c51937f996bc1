"""Channels that run through a graph: what must shrink with them when some of them go, and the shrinking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from passes.affine import Affine, Floats, Use, matrix_of, read_only_by, refill
from passes.base import Refusal
from passes.shapes import last_dim
from passes.sites import LinearSite, constant_of, integer_attribute
from passes.splice import Names, add_constant, label
from passes.surgery import integers, needed, remove_dead

Indices = NDArray[np.intp]

PRUNED = "hasten.pruned."
"""Beginning of the metadata keys of a node that tell what of it was pruned, and how many there were, in decimal."""


class BlockedError(Exception):
    """Channels cannot be removed, because of a node.

    Attributes:
        refusal: The node, why, and what would help.
    """

    def __init__(self, node: ir.Node | None, reason: str, remedy: str = "") -> None:
        super().__init__(reason)
        self.refusal = Refusal("" if node is None else label(node), reason, remedy)


@dataclass(frozen=True, eq=False)
class NewShape:
    """A Reshape whose target names the length of the channels' axis.

    Attributes:
        node: The Reshape.
        target: Its target; 0 copies an extent.
        place: Index of the channels' axis in it.
    """

    node: ir.Node
    target: tuple[int, ...]
    place: int


@dataclass(frozen=True, eq=False)
class PackedSource:
    """Columns of a product that a Split cuts off: queries of a product of queries, keys and values.

    Attributes:
        affine: The product, with its bias.
        split: The Split, the only reader of what the product makes.
        index: Which of its outputs.
    """

    affine: Affine
    split: ir.Node
    index: int

    @property
    def sizes(self) -> list[int]:
        """How long the parts are now."""
        stated = integers(self.split.inputs[1]) if len(self.split.inputs) > 1 else None
        return [last_dim(value) or 0 for value in self.split.outputs] if stated is None else list(stated)

    @property
    def weights(self) -> int:
        """Elements of the weight in these columns."""
        return self.affine.site.shape[0] * self.sizes[self.index]


@dataclass(eq=False)
class Lane:
    """Values that share an axis of channels, cut in equal parts: neurons, or heads.

    Attributes:
        count: How many parts there are.
        axes: The axis of each value that is of the channels, counted from the end; its length is a multiple of count.
        sources: Linear sites whose columns are the channels.
        packed: Products of which some columns are.
        sinks: Linear sites whose rows are.
        cuts: Constants with such an axis: (node, index of the input, axis).
        shapes: Reshapes to rewrite.
        counted: Nodes whose attribute num_heads is the count.
        ports: Nodes where the lane ends beside sources and sinks: (node, index), outputs counted as -1 - index.
        nonlinear: Between sources and sinks stands what is no linear map.
    """

    count: int
    axes: dict[ir.Value, int] = field(default_factory=dict)
    sources: list[LinearSite] = field(default_factory=list)
    packed: list[PackedSource] = field(default_factory=list)
    sinks: list[LinearSite] = field(default_factory=list)
    cuts: list[tuple[ir.Node, int, int]] = field(default_factory=list)
    shapes: list[NewShape] = field(default_factory=list)
    counted: list[ir.Node] = field(default_factory=list)
    ports: set[tuple[ir.Node, int]] = field(default_factory=set)
    nonlinear: bool = False

    @property
    def read(self) -> ir.Value:
        """The value that all sinks read, ``[..., count * width]``.

        Raises:
            BlockedError: There is none, or they read different ones.
        """
        inputs = {site.input for site in self.sinks}
        if len(inputs) != 1:
            node = self.sinks[0].node if self.sinks else None
            raise BlockedError(
                node, "no product reads the channels" if not inputs else "products read them differently"
            )
        return next(iter(inputs))

    @property
    def width(self) -> int:
        """Channels of a part, as the sinks read them."""
        return self.sinks[0].shape[0] // self.count

    @property
    def weights(self) -> int:
        """Elements of the weights that are of the channels."""
        whole = sum(site.shape[0] * site.shape[1] for site in (*self.sources, *self.sinks))
        return whole + sum(part.weights for part in self.packed)

    @property
    def sites(self) -> list[LinearSite]:
        """All linear sites that it is made by and read by."""
        return [*self.sources, *(part.affine.site for part in self.packed), *self.sinks]

    def matrix(self) -> Floats:
        """The weights of all sinks beside each other, float32 ``[K, N1 + N2 + …]``."""
        return np.concatenate([matrix_of(site) for site in self.sinks], axis=1)


def shrink(graph: ir.Graph, names: Names, lane: Lane, kept: Indices, matrix: Floats | None = None) -> None:
    """Keep some parts of the channels only: weights, vectors, target shapes and the shapes that values state.

    Args:
        graph: The graph.
        names: Of the graph.
        lane: As traced in the graph as it is.
        kept: Indices of the parts that stay, ascending.
        matrix: What the rows of the sinks that stay become, ``[K', N1 + N2 + …]``; by default they stay as they are.
    """
    for site in lane.sources:
        _put_weight(site, np.take(matrix_of(site), _elements(kept, site.shape[1] // lane.count), axis=1))
    for part in lane.packed:
        _shrink_packed(graph, names, part, kept, lane.count)
    parts = (
        np.split(matrix, np.cumsum([site.shape[1] for site in lane.sinks])[:-1], axis=1) if matrix is not None else []
    )
    for index, site in enumerate(lane.sinks):
        rows = _elements(kept, site.shape[0] // lane.count)
        _put_weight(site, parts[index] if parts else np.take(matrix_of(site), rows, axis=0))
    for node, index, axis in lane.cuts:
        cut_constant(graph, names, (node, index), axis, kept, lane.count)
    for shape in lane.shapes:
        _put_shape(graph, names, shape, len(kept), lane.count)
    for node in lane.counted:
        node.attributes["num_heads"] = ir.AttrInt64("num_heads", len(kept))
    for value, axis in lane.axes.items():
        resize(value, axis, len(kept), lane.count)


def cut_constant(graph: ir.Graph, names: Names, use: Use, axis: int, kept: Indices, count: int) -> None:
    """Keep some of ``count`` equal parts of an axis of a constant input; a constant that others read is copied."""
    tensor = constant_of(use[0].inputs[use[1]])
    length = 0 if tensor is None else int(tensor.shape.numpy()[axis])
    _keep(graph, names, use, _elements(kept, length // count), axis)


def _keep(graph: ir.Graph, names: Names, use: Use, elements: Indices, axis: int) -> None:
    """Keep some elements along an axis of a constant input; a constant that others read is copied."""
    node, index = use
    old = needed(node.inputs[index])
    tensor = constant_of(old)
    if tensor is None:
        raise ValueError(f"{old.name} is no constant any more")
    array = np.ascontiguousarray(np.take(tensor.numpy(), elements, axis=axis))
    if read_only_by(old, [use]) and tensor.dtype == ir.DataType.FLOAT:
        refill(old, array)
        old.shape = ir.Shape(array.shape)
        return
    name = names.fresh(f"{old.name}.{node.outputs[0].name}")
    node.replace_input_with(index, add_constant(graph, name, array))
    remove_dead([old])


def resize(value: ir.Value, axis: int, parts: int, count: int) -> None:
    """Let the stated shape of a value have ``parts`` of ``count`` equal parts of an axis, where it states that."""
    if value.shape is None or len(value.shape) < -axis:
        return
    shape = value.shape.copy()
    extent = shape[axis]
    if isinstance(extent, int):
        shape[len(shape) + axis] = extent // count * parts
    value.shape = shape


def mark(node: ir.Node, what: str, count: int) -> None:
    """Note on a node that something of it was pruned, and how many there were; a rerun leaves it alone."""
    node.metadata_props[PRUNED + what] = str(count)


def is_marked(node: ir.Node, what: str) -> bool:
    """Whether that was noted."""
    return PRUNED + what in node.metadata_props


def unfit_weights(sites: Sequence[LinearSite]) -> None:
    """Refuse weights that cannot shrink.

    Raises:
        BlockedError: One is not float32, not finite, or read by other nodes too.
    """
    for site in sites:
        tensor = constant_of(site.weight)
        if tensor is None or tensor.dtype != ir.DataType.FLOAT:
            raise BlockedError(site.node, f"the weight of {site.path} is not float32", "Prune before precision changes")
        if not read_only_by(site.weight, [(site.node, 1)]):
            raise BlockedError(site.node, f"the weight of {site.path} is used elsewhere too")
        if not np.isfinite(tensor.numpy()).all():
            raise BlockedError(site.node, f"the weight of {site.path} has values that are not finite")


def heads_of(node: ir.Node) -> tuple[int, int]:
    """(heads of the queries, heads of keys and values) that an attention states."""
    heads = integer_attribute(node, "num_heads", 0)
    return heads, integer_attribute(node, "kv_num_heads", heads)


def _elements(parts: Indices, width: int) -> Indices:
    """Indices of the elements of the parts, each of ``width`` neighbours."""
    found: Indices = (parts[:, None] * width + np.arange(width)).reshape(-1)
    return found


def _put_weight(site: LinearSite, matrix: Floats) -> None:
    stored = matrix.T if site.transposed else matrix
    refill(site.weight, stored)
    site.weight.shape = ir.Shape(stored.shape)


def _shrink_packed(graph: ir.Graph, names: Names, part: PackedSource, kept: Indices, count: int) -> None:
    """Take columns out of a packed product, its bias, and the sizes of its parts."""
    site, sizes = part.affine.site, part.sizes
    start, size = sum(sizes[: part.index]), sizes[part.index]
    inside = start + _elements(kept, size // count)
    columns = np.concatenate([np.arange(start), inside, np.arange(start + size, sum(sizes))])
    _put_weight(site, np.take(matrix_of(site), columns, axis=1))
    use = part.affine.bias_use
    if use is not None:
        _keep(graph, names, use, columns, -1)
    sizes[part.index] = len(inside)
    old = part.split.inputs[1] if len(part.split.inputs) > 1 else None
    part.split.resize_inputs(2)
    held = add_constant(graph, names.fresh(f"{part.split.outputs[0].name}.sizes"), np.array(sizes, np.int64))
    part.split.replace_input_with(1, held)
    part.split.attributes.pop("num_outputs", None)
    if old is not None:
        remove_dead([old])
    for value in dict.fromkeys((site.output, part.affine.output)):
        if value.shape is not None:
            value.shape = ir.Shape([*list(value.shape)[:-1], sum(sizes)])


def _put_shape(graph: ir.Graph, names: Names, shape: NewShape, parts: int, count: int) -> None:
    target = list(shape.target)
    target[shape.place] = target[shape.place] // count * parts
    old = needed(shape.node.inputs[1])
    held = add_constant(graph, names.fresh(f"{shape.node.outputs[0].name}.shape"), np.array(target, np.int64))
    shape.node.replace_input_with(1, held)
    if "allowzero" in shape.node.attributes:
        del shape.node.attributes["allowzero"]
    remove_dead([old])
