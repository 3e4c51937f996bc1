"""Graphs that show what convolutions see and give, as values whose last axis is what moments are taken of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from passes.sites import ConvSite, LinearSite
from passes.splice import Names, add_constant, new_value

Site = ConvSite | LinearSite
_PREFIX = "before."
_LAST = (0, 2, 3, 1)


def seen_by(model: ir.Model, sites: Sequence[Site]) -> tuple[ir.Model, list[ir.Value]]:
    """A copy of the graph that also makes what each site sees.

    Args:
        model: Stays as it is; its tensors are shared.
        sites: Of it. Convolutions have one group.

    Returns:
        The copy, and a value of it for each site: ``[B, H', W', C * taps]``, the inputs under the kernel at each place
        of the output, in the order of the kernel's axes; for a linear site what it reads, ``[..., K]``.
    """
    copy = model.clone()
    twins = _twins(model, copy)
    names = Names(copy.graph)
    return copy, [_seen(copy.graph, names, site, twins[site.input]) for site in sites]


def seen_and_wanted(
    original: ir.Model, model: ir.Model, site: Site, wanted: str
) -> tuple[ir.Model, ir.Value]:  # fmt: skip
    """One graph that holds both, and makes what a site of one sees beside what the other gave in its place.

    Args:
        original: The graph before it was changed, of the same inputs. It stays as it is.
        model: The graph as it is now. It stays so too.
        site: Of ``model``.
        wanted: Name of a value of ``original``, of the same places as the site's output.

    Returns:
        The graph, and a value ``[..., K + N]``: see `seen_by`, then ``wanted`` with its N channels last.
    """
    merged = model.clone()
    names = Names(merged.graph)
    seen = _seen(merged.graph, names, site, _twins(model, merged)[site.input])
    other = _added(merged.graph, names, original, wanted)
    if isinstance(site, ConvSite):
        other = _append(merged.graph, names, "Transpose", [other], {"perm": _LAST})
    return merged, _append(merged.graph, names, "Concat", [seen, other], {"axis": -1})


def _seen(graph: ir.Graph, names: Names, site: Site, source: ir.Value) -> ir.Value:
    if isinstance(site, LinearSite):
        return source
    _, channels, height, width = site.shape
    taps = height * width
    ones = np.tile(np.eye(taps, dtype=np.float32), (channels, 1)).reshape(-1, 1, height, width)
    kernel = add_constant(graph, names.fresh("hasten.patches"), ones)
    geometry = {
        "strides": site.strides,
        "pads": site.pads,
        "dilations": site.dilations,
        "kernel_shape": (height, width),
    }
    patches = _append(graph, names, "Conv", [source, kernel], {**geometry, "group": channels})
    return _append(graph, names, "Transpose", [patches], {"perm": _LAST})


def _added(graph: ir.Graph, names: Names, original: ir.Model, wanted: str) -> ir.Value:
    """Put a whole other graph of the same inputs into a graph, under other names; returns the value of that name.

    Tensors that both hold are there once.
    """
    other = original.clone().graph
    found = next((value for node in other for value in node.outputs if value.name == wanted), None)
    if found is None:
        raise ValueError(f"no node of the original graph makes {wanted!r}")
    other.outputs.clear()
    inputs = {value.name: value for value in graph.inputs}
    for value in other.inputs:
        value.replace_all_uses_with(inputs[value.name])
    held = {id(value.const_value): value for value in graph.initializers.values()}
    for name, value in tuple(other.initializers.items()):
        del other.initializers[name]
        if id(value.const_value) in held:
            value.replace_all_uses_with(held[id(value.const_value)])
        else:
            value.name = names.fresh(f"{_PREFIX}{name}")
            graph.register_initializer(value)
    inner = [value for part in other.subgraphs() for value in (*part.inputs, *part.initializers.values())]
    for value in (*inner, *(value for node in other.all_nodes() for value in node.outputs)):
        if value.name:
            value.name = names.fresh(f"{_PREFIX}{value.name}")
    for node in other.all_nodes():
        node.name = f"{_PREFIX}{node.name}" if node.name else None
    nodes = list(other)
    other.remove(nodes)
    graph.extend(nodes)
    return found


def _append(
    graph: ir.Graph, names: Names, op_type: str, inputs: Sequence[ir.Value], attributes: dict[str, object]
) -> ir.Value:
    name = names.fresh(f"hasten.{op_type.lower()}")
    value = new_value(name, ir.DataType.FLOAT)
    converted = ir.convenience.convert_attributes(attributes)
    graph.append(ir.Node("", op_type, inputs, converted, outputs=[value], name=name))
    return value


def _twins(model: ir.Model, copy: ir.Model) -> dict[ir.Value, ir.Value]:
    twins = dict(zip(model.graph.inputs, copy.graph.inputs, strict=True))
    for node, twin in zip(model.graph, copy.graph, strict=True):
        twins.update(zip(node.outputs, twin.outputs, strict=True))
    return twins
