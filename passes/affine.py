"""Linear sites with the bias behind them, and how passes that move numbers between constants rewrite those in place."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from .sites import LinearSite, constant_of
from .splice import Names, add_constant, take_place
from .surgery import is_operator, is_vector, needed, only_user, remove_dead

Floats = NDArray[np.float32]
Use = tuple[ir.Node, int]
"""A node and the index of one of its inputs."""


@dataclass(frozen=True, eq=False)
class Affine:
    """``output = input @ W + bias``: a linear site and the constant vector that is added to its product alone.

    Attributes:
        site: The product.
        add: The Add right behind it, its only reader; None where a Gemm adds the bias or there is none.
        bias: ``[N]``; None where there is none.
    """

    site: LinearSite
    add: ir.Node | None
    bias: ir.Value | None

    @property
    def output(self) -> ir.Value:
        """``[..., N]``, bias included."""
        return self.site.output if self.add is None else self.add.outputs[0]

    @property
    def bias_use(self) -> Use | None:
        """Where the bias is read; None where there is none."""
        if self.add is not None:
            return self.add, 0 if self.add.inputs[0] is self.bias else 1
        return None if self.bias is None else (self.site.node, 2)


def affine_of(site: LinearSite) -> Affine | None:
    """The site with its bias; None for a Gemm whose third operand is no constant ``[N]``."""
    if site.bias is not None:
        return Affine(site, None, site.bias) if _is_constant_vector(site.bias, site.shape[1]) else None
    add = only_user(site.output)
    if add is None or not is_operator(add, "Add") or add.graph is not site.node.graph:
        return Affine(site, None, None)
    bias = add.inputs[1] if add.inputs[0] is site.output else add.inputs[0]
    return Affine(site, add, bias) if _is_constant_vector(bias, site.shape[1]) else Affine(site, None, None)


def matrix_of(site: LinearSite) -> Floats:
    """``W [K, N]``, whichever way it is stored."""
    tensor = constant_of(site.weight)
    if tensor is None:
        raise ValueError(f"{site.weight.name} is no constant any more")
    array: Floats = tensor.numpy()
    return array.T if site.transposed else array


def put_matrix(site: LinearSite, matrix: Floats) -> None:
    """Let the weight hold ``W [K, N]``, for all that read it."""
    refill(site.weight, matrix.T if site.transposed else matrix)


def constant_floats(value: ir.Value | None, length: int) -> Floats | None:
    """The numbers of a constant float32 vector ``[length]``; None for everything else."""
    tensor = constant_of(value)
    if tensor is None or tensor.dtype != ir.DataType.FLOAT or not _is_constant_vector(value, length):
        return None
    return tensor.numpy()


def is_float32(value: ir.Value) -> bool:
    """Whether the value is a float32 constant."""
    tensor = constant_of(value)
    return tensor is not None and tensor.dtype == ir.DataType.FLOAT


def read_only_by(value: ir.Value, uses: Collection[Use]) -> bool:
    """Whether nothing else reads the value, the caller of the graph included."""
    return not value.is_graph_output() and all((use.node, use.idx) in uses for use in value.uses())


def keeps_precision(before: Floats, after: Floats) -> bool:
    """Whether ``after`` is finite and as much of it as of ``before`` is of full precision, neither 0 nor subnormal."""
    smallest = np.finfo(np.float32).tiny
    lost = np.count_nonzero(np.abs(before) >= smallest) > np.count_nonzero(np.abs(after) >= smallest)
    return bool(np.isfinite(after).all()) and not lost


def refill(value: ir.Value, array: Floats) -> None:
    """Let a constant hold other numbers of the same shape, for all that read it."""
    tensor = ir.Tensor(np.ascontiguousarray(array, dtype=np.float32), name=value.name)
    node = value.producer()
    if node is None:
        value.const_value = tensor
    else:
        node.attributes.clear()
        node.attributes.add(ir.AttrTensor("value", tensor))


def revise(graph: ir.Graph, names: Names, use: Use, array: Floats) -> None:
    """Let an input of a node hold other numbers of the same shape; a constant that others read too is copied."""
    node, index = use
    old = needed(node.inputs[index])
    if read_only_by(old, [use]):
        refill(old, array)
        return
    name = names.fresh(f"{old.name}.{node.outputs[0].name}")
    node.replace_input_with(index, add_constant(graph, name, np.ascontiguousarray(array, dtype=np.float32)))
    remove_dead([old])


def put_behind(value: ir.Value, nodes: Sequence[ir.Node], name: str, stay: Collection[Use] = ()) -> None:
    """Put new nodes, the first of which reads ``value``, between the value and all its readers but those in ``stay``.

    The last one's output takes over the name, type, shape and place among the graph's outputs; ``value`` is called
    ``name`` from then on. The nodes are not yet in a graph; ``value`` is made by a node of one.
    """
    maker, result = value.producer(), nodes[-1].outputs[0]
    if maker is None or maker.graph is None:
        raise ValueError(f"{value.name} is made by no node of a graph")
    stay = [*stay, *((node, index) for node in nodes for index, item in enumerate(node.inputs) if item is value)]
    maker.graph.insert_after(maker, nodes)
    result.type, shape = value.type, value.shape
    take_place(result, value)
    for node, index in stay:
        node.replace_input_with(index, value)
    value.name, value.shape = name, shape


def _is_constant_vector(value: ir.Value | None, length: int) -> bool:
    tensor = constant_of(value)
    return tensor is not None and is_vector(value) and tensor.size == length
