"""pack-products."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from passes.affine import Affine, affine_of, matrix_of, read_only_by
from passes.base import Context, Effect, Outcome, Purpose, Refusal
from passes.sites import constant_of, linear_sites
from passes.splice import Names, add_constant, label, new_value, take_place
from passes.surgery import build, copy_path, opset, remove_dead

_OPSET = 13


@dataclass(frozen=True)
class PackProducts:
    """Make one product of the linear sites that read the same value: query, key and value, or gate and up.

    ``xW1 + b1, xW2 + b2, …`` -> ``Split(x [W1 W2 …] + [b1 b2 …])``, with the names of the outputs kept. The new product
    has the module path of the first site; the paths of the others are gone, so passes that name them run before.
    Refused: sites of which only some have a constant bias right behind them, weights that others read too (packing
    would keep them twice), graphs of an opset below 13.
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
        return Outcome(changed, tuple(refused))


def _reason_against(model: ir.Model, members: Sequence[Affine]) -> str:
    biased = sum(member.bias is not None for member in members)
    kinds = {tensor.dtype for member in members if (tensor := constant_of(member.site.weight)) is not None}
    alone = all(read_only_by(member.site.weight, [(member.site.node, 1)]) for member in members)
    reasons = (
        (biased not in (0, len(members)), "some of the products that read its input have a bias, others have none"),
        (not alone, "a weight is used elsewhere too"),
        (len(kinds) > 1, "the weights are not of one type"),
        (opset(model) < _OPSET, f"Split needs opset {_OPSET}, the graph has {opset(model)}"),
    )
    return next((reason for applies, reason in reasons if applies), "")


def _pack(graph: ir.Graph, names: Names, members: Sequence[Affine]) -> None:
    site = members[0].site
    weight = np.concatenate([matrix_of(member.site) for member in members], axis=1)
    base, dtype = str(site.output.name), ir.DataType.from_numpy(weight.dtype)
    held = add_constant(graph, names.fresh(f"{site.weight.name}.packed"), np.ascontiguousarray(weight))
    source = site.node.inputs[0]
    nodes = [build("MatMul", [source, held], like=site.node, name=names.fresh(f"{base}.packed"), dtype=dtype)]
    biases = [tensor.numpy() for member in members if (tensor := constant_of(member.bias)) is not None]
    if biases and members[0].bias is not None:
        bias = add_constant(graph, names.fresh(f"{members[0].bias.name}.packed"), np.concatenate(biases))
        name = names.fresh(f"{base}.packed.biased")
        nodes.append(build("Add", [nodes[0].outputs[0], bias], like=site.node, name=name, dtype=dtype))
    shape = site.output.shape
    for node in nodes:
        node.outputs[0].shape = None if shape is None else ir.Shape([*list(shape)[:-1], weight.shape[1]])
    widths = np.array([member.site.shape[1] for member in members], np.int64)
    sizes = add_constant(graph, names.fresh(f"{base}.widths"), widths)
    outputs = [new_value(names.fresh(f"{base}.part"), dtype) for _ in members]
    split = ir.node(
        "Split", [nodes[-1].outputs[0], sizes], {"axis": -1}, outputs=outputs, name=f"{outputs[0].name}.Split"
    )
    copy_path(site.node, split)
    nodes.append(split)
    graph.insert_before(site.node, nodes)
    for member, output in zip(members, outputs, strict=True):
        _retire(member, output)


def _retire(member: Affine, output: ir.Value) -> None:
    """Let ``output`` take the place of what the site makes, and remove the site."""
    old = member.output
    shape = old.shape
    take_place(output, old)
    output.shape = shape
    remove_dead([old])
