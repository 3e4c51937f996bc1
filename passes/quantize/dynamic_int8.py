"""int8 weights and activations for linear operators, with the range of the activations found while the model runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from passes.base import Context, Effect, Outcome, Purpose, Refusal
from passes.sites import LinearSite
from passes.splice import Names, label, new_node, new_value, take_place
from passes.surgery import needed, opset, remove_dead

from .linear import Int8Weights, Selection, choose_sites

_FIRST_OPSET = 11
"""The opset in which DynamicQuantizeLinear appeared."""


@dataclass(frozen=True)
class DynamicInt8:
    """Quantize the weights of linear operators to int8 per output channel, and their inputs to uint8 at run time.

    | before            | after |
    |-------------------|-------|
    | MatMul(x, W)      | q, s, z = DynamicQuantizeLinear(x); Mul(Cast(MatMulInteger(q, W_int8, z)), Mul(s, W_scale)) |
    | Gemm(x, W, b)     | the same on W (transposed once, here, for transB = 1), then Add(b) |

    One DynamicQuantizeLinear serves all sites that read the same value (query, key and value). A weight that several
    sites share is quantized once; a weight that other nodes read too is kept beside its int8 form. The operators are
    standard ones; ONNX Runtime fuses them into MatMulIntegerToFloat or DynamicQuantizeMatMul when it loads the graph.

    Refused: targets without integer kernels for it; opset < 11; a MatMul or Gemm without a constant right operand, or
    with alpha, beta or transA; a weight that is not float32, not finite, or has a side shorter than 16; sites that
    ``skip`` names; a pattern in ``skip`` or ``only`` that fits no site.

    Attributes:
        reduce_range: 7-bit weights, for CPUs without VNNI: their kernels saturate on 8 bits.
        skip: Module paths to leave alone; ``*`` and ``?`` are wildcards, and ``*`` also spans dots.
        only: Module paths to act on, as in ``skip``; empty for all.
    """

    name: ClassVar[str] = "dynamic-int8"
    effect: ClassVar[Effect] = Effect.LOSSY
    purpose: ClassVar[Purpose] = Purpose.SIZE

    reduce_range: bool = False
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Rewrite the linear sites of ``model`` in place. Quantized sites are no sites any more: a rerun changes 0."""
        unfit = _unfit(model, context)
        if unfit is not None:
            return Outcome(0, (unfit,))
        sites, refused = choose_sites(model, Selection(self.skip, self.only))
        rewriting = _Rewriting(model.graph, self.reduce_range)
        for site in sites:
            rewriting.rewrite(site)
        remove_dead(dict.fromkeys(rewriting.replaced))
        return Outcome(len(rewriting.replaced), tuple(refused))


class _Rewriting:
    """One run over one graph: what is shared between sites."""

    def __init__(self, graph: ir.Graph, reduce_range: bool) -> None:
        self._graph = graph
        self._names = Names(graph)
        self._inputs: dict[ir.Value, ir.Node] = {}
        self._weights = Int8Weights(graph, self._names, reduce_range=reduce_range)
        self.replaced: list[ir.Value] = []

    def rewrite(self, site: LinearSite) -> None:
        """Put the integer chain in the place of the site's node."""
        quantized, step, zero_point = self._quantized_input(site).outputs
        weight, scale = self._weights.initializers(site)
        base = site.output.name or label(site.node)
        shape = site.output.shape
        product = new_value(self._names.fresh(f"{base}_int32"), ir.DataType.INT32, shape)
        unscaled = new_value(self._names.fresh(f"{base}_unscaled"), ir.DataType.FLOAT, shape)
        scales = new_value(self._names.fresh(f"{base}_scales"), ir.DataType.FLOAT, scale.shape)
        last = new_value(self._names.fresh(f"{base}_scaled"), ir.DataType.FLOAT, shape)
        nodes = [
            new_node("MatMulInteger", [quantized, weight, zero_point], [product], site.node),
            new_node("Cast", [product], [unscaled], site.node, {"to": ir.DataType.FLOAT}),
            new_node("Mul", [step, scale], [scales], site.node),
            new_node("Mul", [unscaled, scales], [last], site.node),
        ]
        if site.bias is not None:
            unbiased, last = last, new_value(self._names.fresh(f"{base}_biased"), ir.DataType.FLOAT, shape)
            nodes.append(new_node("Add", [unbiased, needed(site.node.inputs[2])], [last], site.node))
        self._graph.insert_before(site.node, nodes)
        take_place(last, site.output)
        self._graph.remove(site.node, safe=True)
        self.replaced.append(site.weight)

    def _quantized_input(self, site: LinearSite) -> ir.Node:
        # Not site.input: where that was the output of a site already rewritten, another value has taken its place.
        source = needed(site.node.inputs[0])
        node = self._inputs.get(source)
        if node is None:
            base = source.name or "x"
            outputs = [
                new_value(self._names.fresh(f"{base}_uint8"), ir.DataType.UINT8, source.shape),
                new_value(self._names.fresh(f"{base}_scale"), ir.DataType.FLOAT, ir.Shape(())),
                new_value(self._names.fresh(f"{base}_zero_point"), ir.DataType.UINT8, ir.Shape(())),
            ]
            node = new_node("DynamicQuantizeLinear", [source], outputs, site.node)
            # Sites come in graph order, so the first one stands before all others that read this value.
            self._graph.insert_before(site.node, node)
            self._inputs[source] = node
        return node


def _unfit(model: ir.Model, context: Context) -> Refusal | None:
    if context.target.device != "cpu":
        provider = context.target.provider
        return Refusal("", f"{provider} has no kernel for DynamicQuantizeLinear", "compile for cpu or openvino")
    if opset(model) < _FIRST_OPSET:
        return Refusal(
            "", f"opset {opset(model)} has no DynamicQuantizeLinear", "convert the model to opset 17 or later"
        )
    return None
