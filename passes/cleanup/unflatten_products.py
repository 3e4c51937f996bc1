"""unflatten-products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from passes.affine import matrix_of
from passes.base import Context, Effect, Outcome, Purpose
from passes.shapes import dims_of, last_dim
from passes.sites import LinearSite, linear_sites
from passes.splice import Names, add_constant
from passes.surgery import build, needed, only_user, producer, replace


@dataclass(frozen=True)
class UnflattenProducts:
    """Let a Gemm that flattens its input and restores the shape behind it be a product of the input as it is.

    ``Reshape([..., N]) <- Gemm(Reshape([-1, K]) <- x [..., K], W, b)`` -> ``Add(MatMul(x, W), b)``, which is what other
    passes find biases, residual sums and packed products by; exporters leave such pairs around the layers of GPT-2.
    Left alone: Gemms of other forms, and those whose flat result others read.
    """

    name: ClassVar[str] = "unflatten-products"
    effect: ClassVar[Effect] = Effect.EXACT
    purpose: ClassVar[Purpose] = Purpose.FORM

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Rewrite them; counts the products."""
        names = Names(model.graph)
        return Outcome(sum(_unflatten(model.graph, names, site) for site in linear_sites(model)))


def _unflatten(graph: ir.Graph, names: Names, site: LinearSite) -> int:
    flat, restored = producer(site.input, "Reshape"), only_user(site.output)
    if site.node.op_type != "Gemm" or flat is None or restored is None or restored.op_type != "Reshape":
        return 0
    source, result = needed(flat.inputs[0]), restored.outputs[0]
    before, after = dims_of(source), dims_of(result)
    if before is None or after is None or (*before[:-1], site.shape[1]) != after or last_dim(source) != site.shape[0]:
        return 0
    name, dtype = str(result.name), site.output.dtype or ir.DataType.FLOAT
    product = names.fresh(f"{name}.product") if site.bias is not None else name
    nodes = [build("MatMul", [source, _weight(graph, names, site)], like=site.node, name=product, dtype=dtype)]
    nodes[0].outputs[0].shape = result.shape
    if site.bias is not None:
        operands = [nodes[0].outputs[0], site.bias]
        nodes.append(build("Add", operands, like=site.node, name=name, dtype=dtype, shape=result.shape))
    replace(restored, nodes, nodes[-1].outputs[0])
    return 1


def _weight(graph: ir.Graph, names: Names, site: LinearSite) -> ir.Value:
    """``W [K, N]``: a copy where it is stored the other way round."""
    if not site.transposed:
        return site.weight
    name = names.fresh(f"{site.weight.name}.transposed")
    return add_constant(graph, name, np.ascontiguousarray(matrix_of(site)))
