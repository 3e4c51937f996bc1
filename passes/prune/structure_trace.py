"""Following an axis of channels through a graph, from the products that make them to the products that read them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import onnx_ir as ir

from passes.affine import affine_of
from passes.shapes import Dims, contents_of, dims_of, reshaped
from passes.sites import STANDARD_DOMAINS, LinearSite, constant_of, integer_attribute
from passes.surgery import MICROSOFT, integers, needed, only_user

from .structure import BlockedError, Lane, NewShape, PackedSource

PACKED = "Run it before pack-products and pack-attention"
UNFLATTEN = "Run unflatten-products before"

_UNARY = (
    *(
        "Abs",
        "Cast",
        "Celu",
        "Clip",
        "Cos",
        "Elu",
        "Erf",
        "Exp",
        "Floor",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "Identity",
    ),
    *(
        "LeakyRelu",
        "Log",
        "Mish",
        "Neg",
        "QuickGelu",
        "Reciprocal",
        "Relu",
        "Selu",
        "Sigmoid",
        "Sign",
        "Sin",
        "Softplus",
    ),
    *("Softsign", "Sqrt", "Swish", "Tanh", "ThresholdedRelu"),
)
_LINEAR = ("Cast", "Identity", "Neg", "Add", "Sub")
_BILINEAR = ("Mul", "Div")
_ELEMENTWISE = ("Add", "Sub", "Mul", "Div", "Pow", "Max", "Min", "PRelu", "Where", "BiasGelu", "FastGelu")
_NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "LpNormalization")
_REDUCTIONS = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceSumSquare")


class Tracer:
    """Traces lanes of one graph, as it is now."""

    def __init__(self, sites: Mapping[ir.Node, LinearSite]) -> None:
        """The linear sites of the graph, by their node."""
        self._sites = sites
        self._lane = Lane(0)
        self._ports: Collection[ir.Node] = ()
        self._seen: set[tuple[ir.Node, bool]] = set()
        self._pending: list[ir.Value] = []
        self._rules: dict[str, Callable[[ir.Node], None]] = {
            **dict.fromkeys((*_UNARY, *_ELEMENTWISE), self._elementwise),
            **dict.fromkeys(_NORMS, self._norm),
            **dict.fromkeys(_REDUCTIONS, self._reduction),
            **dict.fromkeys(("Reshape", "Unsqueeze", "Squeeze"), self._reshape),
            "Transpose": self._transpose,
            "Slice": self._slice,
            "Split": self._split,
            "Concat": self._concat,
            "Pad": self._pad,
            "RotaryEmbedding": self._rotary,
            "Shape": self._shape,
        }

    def trace(self, seed: ir.Value, count: int, ports: Collection[ir.Node] = ()) -> Lane:
        """The lane of the last axis of a value, cut in ``count`` parts; it may end in the nodes ``ports`` too.

        Raises:
            BlockedError: It runs into something that it does not see through.
        """
        self._begin(count, ports)
        self._add(seed, -1)
        while self._pending:
            value = self._pending.pop()
            self._upstream(value)
            self._downstream(value)
        return self._lane

    def upstream(self, seed: ir.Value, count: int) -> tuple[Lane, BlockedError | None]:
        """Only what the last axis of a value is made of, and what is in the way; the lane is as far as it was seen."""
        self._begin(count, ())
        self._add(seed, -1)
        blocked: BlockedError | None = None
        while self._pending:
            try:
                self._upstream(self._pending.pop())
            except BlockedError as error:
                blocked = error
        return self._lane, blocked

    def _begin(self, count: int, ports: Collection[ir.Node]) -> None:
        self._lane, self._ports = Lane(count), ports
        self._seen.clear()
        self._pending.clear()

    def _add(self, value: ir.Value | None, axis: int) -> None:
        """Let a value be of the lane."""
        value = needed(value)
        known = self._lane.axes.get(value)
        if known == axis:
            return
        dims = dims_of(value)
        if known is not None or (dims is not None and len(dims) < -axis):
            raise BlockedError(value.producer(), "its channels lie along two axes")
        extent = None if dims is None else dims[axis]
        if isinstance(extent, int) and extent % self._lane.count:
            raise BlockedError(value.producer(), f"{extent} channels are no multiple of {self._lane.count}")
        self._lane.axes[value] = axis
        self._pending.append(value)

    def _upstream(self, value: ir.Value) -> None:
        node = value.producer()
        if node is None:
            raise BlockedError(None, f"{value.name} is given, not made by the graph")
        if node in self._ports:
            self._lane.ports.add((node, -1 - list(node.outputs).index(value)))
        elif node in self._sites:
            self._source(self._sites[node], self._lane.axes[value])
        elif node.op_type == "Split" and self._lane.axes[value] == self._from_end(
            node, integer_attribute(node, "axis", 0)
        ):
            self._packed(node, list(node.outputs).index(value))
        else:
            self._through(node)

    def _downstream(self, value: ir.Value) -> None:
        if value.is_graph_output():
            raise BlockedError(value.producer(), f"{value.name} is an output of the graph")
        for use in value.uses():
            if use.node in self._ports:
                self._lane.ports.add((use.node, use.idx))
            elif use.node in self._sites:
                self._sink(self._sites[use.node], value)
            else:
                self._through(use.node)

    def _source(self, site: LinearSite, axis: int) -> None:
        if (site.node, True) in self._seen:
            return
        self._seen.add((site.node, True))
        self._check_side(site, site.shape[1], axis)
        if site.bias is not None:
            if affine_of(site) is None:
                raise BlockedError(site.node, f"the bias of {site.path} is no constant vector")
            self._lane.cuts.append((site.node, 2, -1))
        self._lane.sources.append(site)

    def _packed(self, split: ir.Node, index: int) -> None:
        """Note columns of a product of several that the Split cuts off."""
        whole = needed(split.inputs[0])
        maker = whole.producer()
        makers = [] if maker is None else [maker, *(value.producer() for value in maker.inputs if value is not None)]
        sites = [self._sites[node] for node in makers if node is not None and node in self._sites]
        affine = affine_of(sites[0]) if sites else None
        if affine is None or affine.output is not whole or only_user(whole) is not split or "split" in split.attributes:
            raise BlockedError(split, "what it splits is no product that it alone reads", PACKED)
        part = PackedSource(affine, split, index)
        if not all(part.sizes) or self._from_end(split, integer_attribute(split, "axis", 0)) != -1:
            raise BlockedError(split, "the sizes of its parts are not known", PACKED)
        if part.sizes[index] % self._lane.count:
            raise BlockedError(split, f"{part.sizes[index]} channels are no multiple of {self._lane.count}")
        if not any(known.split is split and known.index == index for known in self._lane.packed):
            self._lane.packed.append(part)

    def _sink(self, site: LinearSite, value: ir.Value) -> None:
        if (site.node, False) in self._seen:
            return
        self._seen.add((site.node, False))
        if site.input is not value:
            raise BlockedError(site.node, f"{site.path} adds the channels to its product")
        self._check_side(site, site.shape[0], self._lane.axes[value])
        self._lane.sinks.append(site)

    def _check_side(self, site: LinearSite, length: int, axis: int) -> None:
        if axis != -1 or length % self._lane.count:
            raise BlockedError(site.node, f"{site.path} mixes them with others")

    def _through(self, node: ir.Node) -> None:
        if (node, False) in self._seen:
            return
        self._seen.add((node, False))
        rule = self._rules.get(node.op_type) if node.domain in (*STANDARD_DOMAINS, MICROSOFT) else None
        if rule is None:
            raise BlockedError(node, f"channels cannot be followed through {node.op_type}")
        rule(node)

    def _axis(self, node: ir.Node) -> int:
        """The axis of a node that leaves it where it is."""
        return next(self._lane.axes[v] for v in (*node.outputs, *node.inputs) if v is not None and v in self._lane.axes)

    def _elementwise(self, node: ir.Node) -> None:
        axis = self._axis(node)
        self._add(node.outputs[0], axis)
        for index in range(len(node.inputs)):
            self._operand(node, index, axis)
        along = sum(value in self._lane.axes for value in node.inputs if value is not None)
        if node.op_type not in (*_LINEAR, *_BILINEAR, "Concat") or (node.op_type in _BILINEAR and along > 1):
            self._lane.nonlinear = True

    def _operand(self, node: ir.Node, index: int, axis: int) -> None:
        """An operand that has the axis, or is broadcast along it."""
        value = node.inputs[index]
        if value is None:
            return
        tensor = constant_of(value)
        dims: Dims | None = dims_of(value) if tensor is None else tuple(tensor.shape.numpy())
        if value not in self._lane.axes and dims is not None and (len(dims) < -axis or dims[axis] == 1):
            return
        if tensor is None:
            self._add(value, axis)
        elif int(tensor.shape.numpy()[axis]) % self._lane.count:
            raise BlockedError(node, f"a constant of it has no multiple of {self._lane.count} channels")
        else:
            self._lane.cuts.append((node, index, axis))

    def _same(self, node: ir.Node) -> None:
        axis = self._axis(node)
        self._add(node.inputs[0], axis)
        for output in node.outputs:
            self._add(output, axis)

    def _norm(self, node: ir.Node) -> None:
        self._avoid(node, self._from_end(node, integer_attribute(node, "axis", -1)), to_end=True)
        self._same(node)

    def _reduction(self, node: ir.Node) -> None:
        axes = integers(node.inputs[1]) if len(node.inputs) > 1 else None
        if "axes" in node.attributes:
            axes = tuple(node.attributes["axes"].as_ints())
        if not axes or integer_attribute(node, "keepdims", 1) != 1:
            raise BlockedError(node, f"channels cannot be followed through this {node.op_type}")
        for axis in axes:
            self._avoid(node, self._from_end(node, axis))
        self._same(node)

    def _slice(self, node: ir.Node) -> None:
        axes = integers(node.inputs[3]) if len(node.inputs) > 3 else None
        if axes is None:
            raise BlockedError(node, "it slices axes that are not told")
        for axis in axes:
            self._avoid(node, self._from_end(node, axis), remedy=PACKED)
        self._same(node)

    def _split(self, node: ir.Node) -> None:
        self._avoid(node, self._from_end(node, integer_attribute(node, "axis", 0)), remedy=PACKED)
        self._same(node)

    def _concat(self, node: ir.Node) -> None:
        self._avoid(node, self._from_end(node, integer_attribute(node, "axis", 0)))
        self._elementwise(node)

    def _pad(self, node: ir.Node) -> None:
        pads = integers(node.inputs[1])
        if pads is None or (len(node.inputs) > 3 and node.inputs[3] is not None):
            raise BlockedError(node, "it pads axes that are not told")
        rank, axis = len(pads) // 2, self._axis(node)
        if pads[rank + axis] or pads[axis]:
            raise BlockedError(node, "it pads the channels")
        self._same(node)

    def _rotary(self, node: ir.Node) -> None:
        if self._axis(node) not in (-1, -3):
            raise BlockedError(node, "it turns other axes than those of heads")
        if integer_attribute(node, "num_heads", 0):
            self._lane.counted.append(node)
        self._same(node)

    def _transpose(self, node: ir.Node) -> None:
        if "perm" not in node.attributes:
            raise BlockedError(node, "it does not say how it permutes")
        order = tuple(node.attributes["perm"].as_ints())
        source, result, rank = needed(node.inputs[0]), node.outputs[0], len(order)
        if result in self._lane.axes:
            self._add(source, order[rank + self._lane.axes[result]] - rank)
        else:
            self._add(result, order.index(rank + self._lane.axes[source]) - rank)

    def _shape(self, node: ir.Node) -> None:
        """Lengths of other axes may be read."""
        value = needed(node.inputs[0])
        dims = dims_of(value)
        if dims is None:
            raise BlockedError(node, "it reads a shape of unknown rank")
        place = len(dims) + self._lane.axes[value]
        start, end = integer_attribute(node, "start", 0), integer_attribute(node, "end", len(dims))
        if not start % len(dims) <= place < (end if end >= 0 else end + len(dims)):
            return
        for use in node.outputs[0].uses():
            chosen = integers(use.node.inputs[1]) if use.node.op_type == "Gather" else None
            if start or chosen is None or place in [index % len(dims) for index in chosen]:
                raise BlockedError(node, "the number of channels is read from a shape")

    def _reshape(self, node: ir.Node) -> None:
        source, result = needed(node.inputs[0]), node.outputs[0]
        before, after = dims_of(source), dims_of(result)
        if after is None and node.op_type == "Reshape":
            after = reshaped(node)
        if before is None or after is None:
            raise BlockedError(node, "the shapes around it are not known", "Run infer-shapes before")
        forward = source in self._lane.axes
        here, there = (before, after) if forward else (after, before)
        place = len(here) + self._lane.axes[source if forward else result]
        other = _counterpart(here, there, place, self._lane.count)
        if other is None:
            raise BlockedError(node, f"the channels are not provably an axis of {list(there)}", UNFLATTEN)
        self._add(result if forward else source, other - len(there))
        if node.op_type == "Reshape":
            self._target(node, before, after, other if forward else place)

    def _target(self, node: ir.Node, before: Dims, after: Dims, place: int) -> None:
        """Note the target that the Reshape gets, unless it finds the length by itself."""
        stated = contents_of(node.inputs[1])
        if stated is not None and len(stated) == len(after) and stated[place] in (-1, 0):
            return
        if stated is not None and all(isinstance(dim, int) for dim in stated):
            self._lane.shapes.append(NewShape(node, tuple(int(dim) for dim in stated), place))
            return
        target: list[int] = []
        copied = True
        for index, dim in enumerate(after):
            copied = copied and index < len(before) and dim == before[index]
            if not isinstance(dim, int) and not copied:
                raise BlockedError(node, "its target shape is computed", UNFLATTEN)
            target.append(dim if isinstance(dim, int) else 0)
        self._lane.shapes.append(NewShape(node, tuple(target), place))

    def _from_end(self, node: ir.Node, axis: int) -> int:
        """An axis of what the node reads, counted from the end."""
        if axis < 0:
            return axis
        dims = dims_of(node.outputs[0]) or dims_of(node.inputs[0])
        if dims is None:
            raise BlockedError(node, "the shapes around it are not known", "Run infer-shapes before")
        return axis - len(dims)

    def _avoid(self, node: ir.Node, axis: int, *, to_end: bool = False, remedy: str = "") -> None:
        """Refuse a node that works along the channels: an axis, or all from there to the last."""
        own = self._axis(node)
        if own == axis or (to_end and own > axis):
            raise BlockedError(node, f"{node.op_type} works along the channels", remedy)


def _counterpart(here: Dims, there: Dims, place: int, count: int) -> int | None:
    """Where the axis ``place`` of ``here`` lies in ``there``, a reshaping of it; None where that cannot be told."""
    if here[: place + 1] == there[: place + 1]:
        return place
    if here[:place] == there[:place] and len(there) > place:
        one, other = here[place:], there[place:]
        for merged, apart in ((one, other), (other, one)):
            if len(apart) == len(merged) + 1 and apart[0] == count and merged[1:] == apart[2:]:
                width = apart[1]
                if isinstance(width, int) and merged[0] == count * width:
                    return place
    if len(here) - place <= len(there) and here[place:] == there[len(there) - len(here) + place :]:
        return place + len(there) - len(here)
    return None
