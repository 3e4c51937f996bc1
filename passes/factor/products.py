"""What `Factor` sees of a graph: weights with all that read them, what is factored already, and how one becomes two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from passes.affine import Floats, affine_of, matrix_of, read_only_by, revise
from passes.base import Refusal
from passes.quantize.linear import Selection, choose_sites
from passes.sites import LinearSite, constant_of, linear_sites
from passes.splice import Names, add_constant, label
from passes.surgery import build, remove_dead

from .lowrank import Doubles


@dataclass(frozen=True, eq=False)
class Product:
    """One weight ``W [K, N]`` with all sites that read it.

    Attributes:
        sites: At least one, in graph order.
    """

    sites: tuple[LinearSite, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """``(K, N)``."""
        return self.sites[0].shape

    @property
    def size(self) -> int:
        """Parameters."""
        rows, columns = self.shape
        return rows * columns

    @property
    def inputs(self) -> tuple[ir.Value, ...]:
        """What the sites read, in their order."""
        return tuple(site.input for site in self.sites)

    @property
    def biased(self) -> bool:
        """Whether each site adds a constant ``[N]``."""
        found = [affine_of(site) for site in self.sites]
        return all(one is not None and one.bias is not None for one in found)

    def matrix(self) -> Floats:
        """``W``, float32 ``[K, N]``."""
        return matrix_of(self.sites[0])


Family = tuple[Product, ...]
"""Products of the same inputs: query, key and value, or gate and up."""


@dataclass(frozen=True)
class Survey:
    """The products of a graph.

    Attributes:
        families: Those that may be factored, in graph order.
        whole: Parameters of those that are factors already, had they been left whole.
        present: Parameters that these have.
    """

    families: tuple[Family, ...]
    whole: int
    present: int

    @property
    def size(self) -> int:
        """Parameters of the families."""
        return sum(product.size for family in self.families for product in family)


def survey(model: ir.Model, selection: Selection) -> tuple[Survey, list[Refusal]]:
    """The products that the selection leaves in, and why not the others: those of `choose_sites`, and tied weights."""
    chosen, refused = choose_sites(model, selection)
    done, whole, present = _factored(linear_sites(model), selection)
    by_weight: dict[tuple[ir.Value, bool], list[LinearSite]] = {}
    for site in chosen:
        if site.node not in done:
            by_weight.setdefault((site.weight, site.transposed), []).append(site)
    families: dict[tuple[ir.Value, ...], list[Product]] = {}
    for (weight, _), sites in by_weight.items():
        if read_only_by(weight, [(site.node, 1) for site in sites]):
            product = Product(tuple(sites))
            families.setdefault(product.inputs, []).append(product)
        else:
            reason = f"{weight.name} is read elsewhere too: it would stay, and the factors would be added"
            refused.append(Refusal(label(sites[0].node), reason))
    return Survey(tuple(tuple(family) for family in families.values()), whole, present), refused


def put_factors(
    graph: ir.Graph, names: Names, products: Sequence[Product], first: Floats, seconds: Sequence[Floats]
) -> None:
    """Put ``(x @ first) @ second`` in the place of ``x @ W``, for products of the same inputs.

    The sites' own nodes make the second product, so that names, module paths and biases stay.

    Args:
        graph: That the sites are in.
        names: Of that graph.
        products: Of one family; the first factor is theirs together.
        first: float32 [K, r].
        seconds: float32 [r, N] of each.
    """
    lead = products[0].sites[0]
    order = {node: place for place, node in enumerate(graph)}
    held = add_constant(graph, names.fresh(f"{lead.weight.name or lead.path}.first"), first)
    for number, site in enumerate(products[0].sites):
        source, shape = site.input, site.output.shape
        name = names.fresh(f"{site.output.name}.first")
        node = build("MatMul", [source, held], like=site.node, name=name, dtype=ir.DataType.FLOAT)
        node.outputs[0].shape = None if shape is None else ir.Shape([*list(shape)[:-1], first.shape[1]])
        earliest = min((product.sites[number].node for product in products), key=order.__getitem__)
        graph.insert_before(earliest, node)
        for product in products:
            product.sites[number].node.replace_input_with(0, node.outputs[0])
    for product, second in zip(products, seconds, strict=True):
        old, transposed = product.sites[0].weight, product.sites[0].transposed
        array = np.ascontiguousarray(second.T if transposed else second)
        new = add_constant(graph, names.fresh(f"{old.name or product.sites[0].path}.second"), array)
        for site in product.sites:
            site.node.replace_input_with(1, new)
        remove_dead([old])


def shift_bias(graph: ir.Graph, names: Names, site: LinearSite, shift: Doubles) -> None:
    """Add ``shift [N]`` to the constant bias of a site.

    Raises:
        ValueError: It has none.
    """
    affine = affine_of(site)
    tensor = None if affine is None else constant_of(affine.bias)
    if affine is None or affine.bias_use is None or tensor is None:
        raise ValueError(f"{site.path} has no constant bias")
    revise(graph, names, affine.bias_use, (tensor.numpy() + shift).astype(np.float32))


def _factored(sites: Sequence[LinearSite], selection: Selection) -> tuple[set[ir.Node], int, int]:
    """Nodes that make a product of two thin factors, the parameters it would have whole, and those it has.

    That is a MatMul whose result is read by products with constants only, where both together are smaller than one.
    """
    by_node = {site.node: site for site in sites}
    done: set[ir.Node] = set()
    whole = present = 0
    counted: set[ir.Value] = set()
    for first in sites:
        uses = tuple(first.output.uses())
        if first.bias is not None or first.output.is_graph_output() or not uses:
            continue
        if any(use.idx != 0 or use.node not in by_node for use in uses):
            continue
        seconds = {by_node[use.node].weight: by_node[use.node] for use in uses}
        rows, rank = first.shape
        columns = sum(second.shape[1] for second in seconds.values())
        if rank * (rows + columns) >= rows * columns:
            continue
        done.update((first.node, *(use.node for use in uses)))
        named = selection.candidate(first.path) and selection.refusal(first.node, first.path) is None
        if named and first.weight not in counted:
            counted.add(first.weight)
            whole, present = whole + rows * columns, present + rank * (rows + columns)
    return done, whole, present
