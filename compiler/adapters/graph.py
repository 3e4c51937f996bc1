"""A finished decoder graph that takes adapters: beside each product that they change, what they add to it.

``y = x W`` becomes ``y = x W + ((x A) * rows) B``. A and B are inputs, and hold those of all adapters in use side by
side; ``rows`` is 1 where a row of the batch has the adapter of a column of A, else 0. So each text of a batch may have
another adapter, or none, and A and B are read once, however many texts share them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

import onnx_ir as ir

from artifacts.adapters import Part, Product, adapter_inputs
from passes.affine import put_behind
from passes.origins import Origin, origins_of
from passes.sites import LinearSite, integer_attribute, linear_sites
from passes.splice import Names, label, new_node, new_value
from passes.surgery import MICROSOFT, is_operator, needed

_BATCH = "batch"
_FLOAT = ir.DataType.FLOAT


def adapt(model: ir.Model, modules: Collection[str]) -> tuple[Product, ...]:
    """Let the products of the modules take adapters, in place.

    Args:
        model: As it is shipped; values of another type than float32 are left alone.
        modules: Paths in the original model.

    Returns:
        The products, in the order of their inputs. A module of which there is nothing is in none.
    """
    names = Names(model.graph)
    products: list[Product] = []
    for node, source, rows, origins in _products(model):
        if not any(origin.module in modules for origin in origins):
            continue
        parts = tuple(Part(one.module, one.start, one.columns, one.factor) for one in origins)
        product = Product(rows, parts)
        _branch(model.graph, names, node, source, product, len(products))
        products.append(product)
    return tuple(products)


def modules_of(model: ir.Model) -> dict[str, tuple[int, int]]:
    """(rows, columns) of each module all of whose columns are in products that may take adapters."""
    rows: dict[str, int] = {}
    spans: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
    for _, _, length, origins in _products(model):
        for one in origins:
            rows[one.module] = length
            spans[one.module].append((one.start, one.columns))
    found = {}
    for module, parts in spans.items():
        end = 0
        for start, columns in sorted(parts):
            end = end + columns if start == end else -1 << 40
        if end > 0:
            found[module] = (rows[module], end)
    return found


def _products(model: ir.Model) -> list[tuple[ir.Node, ir.Value, int, tuple[Origin, ...]]]:
    """(node, what goes in, its length, where its columns come from) of each product of ``[batch, sequence, *]``."""
    sites: dict[ir.Node, LinearSite] = {site.node: site for site in linear_sites(model)}
    found = []
    for node in model.graph:
        inner = _inner(node)
        if node in sites and node.op_type == "MatMul":
            rows, columns = sites[node].shape
        elif is_operator(inner, "MatMulNBits", domain=MICROSOFT):
            rows, columns = integer_attribute(inner, "K", 0), integer_attribute(inner, "N", 0)
        else:
            continue
        source, output = needed(inner.inputs[0]), node.outputs[0]
        flat = any(value.shape is not None and len(value.shape) != 3 for value in (source, output))
        typed = all(value.dtype in (None, _FLOAT) for value in (source, output))
        if typed and not flat and (origins := origins_of(node, columns)):
            found.append((node, source, rows, origins))
    return found


def _inner(node: ir.Node) -> ir.Node:
    """The product in the branch for steps where prompt-int8 made two forms of one; else the node itself."""
    branch = node.attributes.get("else_branch") if node.op_type == "If" else None
    nodes = [] if branch is None else list(branch.as_graph())
    return nodes[0] if len(nodes) == 1 and len(node.outputs) == 1 else node


def _branch(graph: ir.Graph, names: Names, node: ir.Node, source: ir.Value, product: Product, number: int) -> None:
    ranks = f"adapters.{number}.ranks"
    shapes: tuple[tuple[int | str, ...], ...] = ((product.rows, ranks), (ranks, product.columns), (_BATCH, 1, ranks))
    a, b, rows = (
        new_value(names.fresh(name), _FLOAT, ir.Shape(shape))
        for name, shape in zip(adapter_inputs(number), shapes, strict=True)
    )
    graph.inputs.extend((a, b, rows))
    base, whole = label(node), node.outputs[0]
    narrow, chosen, added, total = (
        new_value(names.fresh(f"{base}.{suffix}"), _FLOAT) for suffix in ("lora_a", "lora_rows", "lora_b", "adapted")
    )
    nodes = [
        new_node("MatMul", [source, a], [narrow], node),
        new_node("Mul", [narrow, rows], [chosen], node),
        new_node("MatMul", [chosen, b], [added], node),
        new_node("Add", [whole, added], [total], node),
    ]
    put_behind(whole, nodes, names.fresh(f"{whole.name}.base"))
