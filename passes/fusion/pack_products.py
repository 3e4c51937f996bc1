"""pack-products."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from passes.affine import Affine, affine_of, read_only_by
from passes.base import Context, Effect, Outcome, Purpose, Refusal
from passes.deferred import side_by_side
from passes.origins import Origin, origins_of, set_origins
from passes.sites import constant_of, linear_sites
from passes.splice import Names, add_constant, label, new_value, take_place
from passes.surgery import build, copy_path, opset, remove_dead

from .packed_blocks import block_groups, columns_of, pack_blocks, reason_against_blocks

_OPSET = 13


@dataclass(frozen=True)
class PackProducts:
    """Make one product of the linear sites that read the same value: query, key and value, or gate and up.

    ``xW1 + b1, xW2 + b2, …`` -> ``Split(x [W1 W2 …] + [b1 b2 …])``, with the names of the outputs kept. The new product
    has the module path of the first site; the paths of the others are gone, so passes that name them run before.
    Likewise MatMulNBits of com.microsoft, whose codes and scales are put behind each other as they are.
    Refused: sites of which only some have a constant bias right behind them, weights that others read too (packing
    would keep them twice), MatMulNBits of different blocks, graphs of an opset below 13.
    """

    name: ClassVar[str] = "pack-products"
    effect: ClassVar[Effect] = Effect.EXACT
    purpose: ClassVar[Purpose] = Purpose.SPEED

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Pack; counts the groups."""
        changed = 0
        refused: list[Refusal] = []
        groups: defaultdict[ir.Value, list[Affine | None]] = defaultdict(list)
        first: dict[ir.Value, ir.Node] = {}
        for site in linear_sites(model):
            groups[site.input].append(affine_of(site))
            first.setdefault(site.input, site.node)
        names = Names(model.graph)
        for source, group in groups.items():
            if len(group) < 2:
                continue
            members = [member for member in group if member is not None]
            reason = "a bias is no constant vector" if len(members) < len(group) else _reason_against(model, members)
            if reason:
                refused.append(Refusal(label(first[source]), reason))
            else:
                _pack(model.graph, names, members)
                changed += 1
        for nodes in block_groups(model.graph):
            reason = reason_against_blocks(nodes) or _reason_against_opset(model)
            if reason:
                refused.append(Refusal(label(nodes[0]), reason))
            else:
                _pack_blocks(model.graph, names, nodes)
                changed += 1
        return Outcome(changed, tuple(refused))


def _reason_against(model: ir.Model, members: Sequence[Affine]) -> str:
    biased = sum(member.bias is not None for member in members)
    kinds = {tensor.dtype for member in members if (tensor := constant_of(member.site.weight)) is not None}
    alone = all(read_only_by(member.site.weight, [(member.site.node, 1)]) for member in members)
    reasons = (
        (biased not in (0, len(members)), "some of the products that read its input have a bias, others have none"),
        (not alone, "a weight is used elsewhere too"),
        (len(kinds) > 1, "the weights are not of one type"),
    )
    return next((reason for applies, reason in reasons if applies), _reason_against_opset(model))


def _reason_against_opset(model: ir.Model) -> str:
    return f"Split needs opset {_OPSET}, the graph has {opset(model)}" if opset(model) < _OPSET else ""


def _pack(graph: ir.Graph, names: Names, members: Sequence[Affine]) -> None:
    site = members[0].site
    held = _side_by_side(graph, names.fresh(f"{site.weight.name}.packed"), members)
    base, dtype = str(site.output.name), held.dtype
    source = site.node.inputs[0]
    nodes = [build("MatMul", [source, held], like=site.node, name=names.fresh(f"{base}.packed"), dtype=dtype)]
    set_origins(nodes[0], _origins([(member.site.node, member.site.shape[1]) for member in members]))
    biases = [tensor.numpy() for member in members if (tensor := constant_of(member.bias)) is not None]
    if biases and members[0].bias is not None:
        bias = add_constant(graph, names.fresh(f"{members[0].bias.name}.packed"), np.concatenate(biases))
        name = names.fresh(f"{base}.packed.biased")
        nodes.append(build("Add", [nodes[0].outputs[0], bias], like=site.node, name=name, dtype=dtype))
    graph.insert_before(site.node, nodes)
    _split(graph, names, nodes, [member.output for member in members], [member.site.shape[1] for member in members])


def _side_by_side(graph: ir.Graph, name: str, members: Sequence[Affine]) -> ir.Value:
    """The weights of the members as one initializer."""
    found = [(constant_of(member.site.weight), member.site.transposed) for member in members]
    tensor = side_by_side([(tensor, transposed) for tensor, transposed in found if tensor is not None])
    tensor.name = name
    value = new_value(name, tensor.dtype, ir.Shape(tensor.shape.numpy()))
    value.const_value = tensor
    graph.register_initializer(value)
    return value


def _origins(products: Sequence[tuple[ir.Node, int]]) -> list[Origin]:
    """Of the columns of products behind each other; none where one's are not known."""
    found = [origins_of(node, columns) for node, columns in products]
    return [one for origins in found for one in origins] if all(found) else []


def _pack_blocks(graph: ir.Graph, names: Names, nodes: Sequence[ir.Node]) -> None:
    packed = pack_blocks(graph, names, nodes)
    set_origins(packed, _origins([(node, columns_of(node)) for node in nodes]))
    graph.insert_before(nodes[0], packed)
    _split(graph, names, [packed], [node.outputs[0] for node in nodes], [columns_of(node) for node in nodes])


def _split(
    graph: ir.Graph, names: Names, nodes: Sequence[ir.Node], olds: Sequence[ir.Value], widths: Sequence[int]
) -> None:
    """Let the parts of what the last of the new nodes makes take the places of the old values, whose makers go."""
    last, shape, base = nodes[-1], olds[0].shape, olds[0].name
    for node in nodes:
        node.outputs[0].shape = None if shape is None else ir.Shape([*list(shape)[:-1], sum(widths)])
    dtype = last.outputs[0].dtype or ir.DataType.FLOAT
    sizes = add_constant(graph, names.fresh(f"{base}.widths"), np.array(widths, np.int64))
    outputs = [new_value(names.fresh(f"{base}.part"), dtype) for _ in olds]
    split = ir.node("Split", [last.outputs[0], sizes], {"axis": -1}, outputs=outputs, name=f"{outputs[0].name}.Split")
    copy_path(last, split)
    graph.insert_after(last, split)
    for old, output in zip(olds, outputs, strict=True):
        shape = old.shape
        take_place(output, old)
        output.shape = shape
        remove_dead([old])
