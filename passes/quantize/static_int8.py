"""int8 weights and activations for linear operators, with the range of the activations fixed by calibration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from artifacts.target import CPU_PROVIDER, OPENVINO_PROVIDER
from passes.base import Context, Effect, Observe, Outcome, Purpose, Refusal
from passes.sites import LinearSite, constant_of
from passes.splice import Names, add_constant, label, new_node, new_value
from passes.statistics import Activation
from passes.surgery import MICROSOFT, build, needed, opset, require_microsoft

from .arithmetic import Floats
from .linear import Ending, Int8Weights, Selection, choose_sites, ending, put_in, weight_of
from .range_options import RangeOptions
from .ranges import METHODS, OUTPUT, Range, clipping_range, is_constant, median_output_error, output_range

_FIRST_OPSET = 13
"""The opset in which DequantizeLinear got an axis."""


@dataclass(frozen=True)
class StaticInt8(RangeOptions):
    """Quantize linear operators to int8 weights per output channel and uint8 inputs of a range fixed by calibration.

    | target   | before           | after |
    |----------|------------------|-------|
    | CPU      | MatMul(x, W)     | MatMulIntegerToFloat(q, W_int8, s, W_scale, z), q = QuantizeLinear(x, s, z) |
    | CPU      | Add(MatMul, b)   | the same with b as its bias |
    | OpenVINO | MatMul(x, W)     | MatMul(DequantizeLinear(q, s, z), DequantizeLinear(W_int8, W_scale)), q as above |
    | OpenVINO | Add(MatMul, b)   | the same, then Add(b) |
    | both     | Gemm(x, W, b)    | the same on W (transposed once, here, for transB = 1) |
    | CPU *    | MatMul(x, W)     | DequantizeLinear(QLinearMatMul(q, s, z, W_int8, W_scale, 0, t, u), t, u) |
    | CPU *    | Add(MatMul, b)   | the same, then Add(b); * with integer_output |

    MatMulIntegerToFloat is the operator of com.microsoft that ONNX Runtime's CPU provider has a kernel for; OpenVINO
    turns the second form into integer kernels of its own. One QuantizeLinear serves all sites that read the same value.
    A bias that is no constant [N] stays an Add. Against DynamicInt8 this saves the search for the smallest and largest
    value of every input, and its range is one for all inputs, not one for each. QLinearMatMul writes a quarter of the
    bytes and rounds once more, to the range of the products of the sampled rows; the bias is an Add behind it.

    Refused: no calibration data; other targets; integer_output elsewhere than on the CPU; opset < 13; an input that is
    a constant, or that calibration saw only one number of; what DynamicInt8 refuses of weights, sites and patterns.

    Attributes:
        ranges: How the range of an input is chosen: absmax, percentile, mse or entropy from its distribution, or output
            (least error of the products that read it). See `passes.quantize.ranges`.
        percentile: Percent of the values that the percentile method keeps inside.
        correct_bias: Add the median error of each product on the calibration data to its bias. Not the mean: see
            `passes.quantize.ranges.median_output_error`.
        reduce_range: 7-bit weights, for CPUs without VNNI: their kernels saturate on 8 bits.
        integer_output: Let the product write uint8.
        skip: Module paths to leave alone; ``*`` and ``?`` are wildcards, and ``*`` also spans dots.
        only: Module paths to act on, as in ``skip``; empty for all.
    """

    name: ClassVar[str] = "static-int8"
    effect: ClassVar[Effect] = Effect.LOSSY
    purpose: ClassVar[Purpose] = Purpose.SIZE
    methods: ClassVar[tuple[str, ...]] = (*METHODS, OUTPUT)

    ranges: str = "output"
    correct_bias: bool = True
    reduce_range: bool = False
    integer_output: bool = False
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Rewrite the linear sites of ``model`` in place. Quantized sites are no sites any more: a rerun changes 0."""
        unfit = _unfit(model, context, integer_output=self.integer_output)
        if unfit is not None:
            return Outcome(0, (unfit,))
        sites, refused = choose_sites(model, Selection(self.skip, self.only))
        if sites and context.observe is None:
            return Outcome(0, (Refusal("", "calibration data is needed", "compile with data"),))
        if sites and context.observe is not None:
            sites, seen, more = _observed(model, sites, context.observe)
            refused += more
            self._rewrite(model, context, sites, seen)
        return Outcome(len(sites), tuple(refused))

    def _rewrite(
        self, model: ir.Model, context: Context, sites: list[LinearSite], seen: Mapping[str, Activation]
    ) -> None:
        names = Names(model.graph)
        weights = Int8Weights(model.graph, names, reduce_range=self.reduce_range)
        readers: dict[str, list[LinearSite]] = {}
        for site in sites:
            readers.setdefault(_source(site), []).append(site)
        clips = {name: self._range(seen[name], reading, weights) for name, reading in readers.items()}
        emission = self._emission(context)(model, names, weights)
        for site in sites:
            source = _source(site)
            end = ending(site)
            bias = end.bias
            if self.correct_bias:
                sample = seen[source].sample
                error = median_output_error(sample, weight_of(site), clips[source], weights.quantized(site))
                bias = np.asarray(error if bias is None else bias + error, dtype=np.float32)
            emission.rewrite(site, end, clips[source], bias, seen[source].sample)

    def _emission(self, context: Context) -> type[_Integer | _IntegerOutput | _FakeQuantized]:
        if context.target.provider != CPU_PROVIDER:
            return _FakeQuantized
        return _IntegerOutput if self.integer_output else _Integer

    def _range(self, activation: Activation, readers: list[LinearSite], weights: Int8Weights) -> Range:
        if self.ranges != OUTPUT:
            return clipping_range(activation, self.ranges, self.percentile)
        pairs = [(weight_of(site), weights.quantized(site)) for site in readers]
        return output_range(activation, pairs, self.percentile, correct_bias=self.correct_bias)


class _Quantizers:
    """The quantized inputs of one graph: each value once, however many sites read it."""

    def __init__(self, graph: ir.Graph, names: Names) -> None:
        self._graph = graph
        self._names = names
        self._made: dict[ir.Value, tuple[ir.Value, ir.Value, ir.Value]] = {}

    def of(self, site: LinearSite, clip: Range) -> tuple[ir.Value, ir.Value, ir.Value]:
        """The input of a site as uint8, its scale and its zero point."""
        # Not site.input: where that was the output of a site already rewritten, another value has taken its place.
        source = needed(site.node.inputs[0])
        if source not in self._made:
            base = source.name or "x"
            scale = add_constant(self._graph, self._names.fresh(f"{base}_scale"), np.asarray(clip.scale))
            zero = add_constant(self._graph, self._names.fresh(f"{base}_zero_point"), np.asarray(clip.zero_point))
            integers = new_value(self._names.fresh(f"{base}_uint8"), ir.DataType.UINT8, source.shape)
            # Sites come in graph order, so the first one stands before all others that read this value.
            node = new_node("QuantizeLinear", [source, scale, zero], [integers], site.node)
            self._graph.insert_before(site.node, node)
            self._made[source] = integers, scale, zero
        return self._made[source]


class _Integer:
    """Emits the integer product of com.microsoft."""

    def __init__(self, model: ir.Model, names: Names, weights: Int8Weights) -> None:
        require_microsoft(model)
        self._graph = model.graph
        self._names = names
        self._weights = weights
        self._quantizers = _Quantizers(model.graph, names)

    def rewrite(self, site: LinearSite, end: Ending, clip: Range, bias: Floats | None, _: Floats) -> None:
        """Put the product in the place of the site and of the Add that ends it."""
        integers, scale, zero = self._quantizers.of(site, clip)
        weight, weight_scale = self._weights.initializers(site)
        base = end.last.outputs[0].name or label(site.node)
        addend = None if bias is None else add_constant(self._graph, self._names.fresh(f"{base}_bias"), bias)
        product = build(
            "MatMulIntegerToFloat",
            [integers, weight, scale, weight_scale, zero, None, addend],
            like=site.node,
            name=self._names.fresh(f"{base}_int8"),
            domain=MICROSOFT,
            dtype=ir.DataType.FLOAT,
        )
        nodes = [product, *_rest(site, end, product.outputs[0], self._names)]
        put_in(site, end, nodes)


class _IntegerOutput:
    """Emits the product of integers that makes integers."""

    def __init__(self, model: ir.Model, names: Names, weights: Int8Weights) -> None:
        self._graph = model.graph
        self._names = names
        self._weights = weights
        self._quantizers = _Quantizers(model.graph, names)

    def rewrite(self, site: LinearSite, end: Ending, clip: Range, bias: Floats | None, sample: Floats) -> None:
        """Put the product in the place of the site and of the Add that ends it; the range is that of the sample's."""
        base = end.last.outputs[0].name or label(site.node)
        weight, weight_scale = self._weights.initializers(site)
        reached = _reached(clip.round_trip(sample) @ self._weights.quantized(site).dequantize())
        columns = np.zeros(site.shape[1], np.int8)
        zeros = add_constant(self._graph, self._names.fresh(f"{weight.name}_zero_point"), columns)
        scale = add_constant(self._graph, self._names.fresh(f"{base}_scale"), np.asarray(reached.scale))
        zero = add_constant(self._graph, self._names.fresh(f"{base}_zero_point"), np.asarray(reached.zero_point))
        integers = new_value(self._names.fresh(f"{base}_uint8"), ir.DataType.UINT8, site.output.shape)
        product = new_value(self._names.fresh(f"{base}_product"), ir.DataType.FLOAT, site.output.shape)
        operands = [*self._quantizers.of(site, clip), weight, weight_scale, zeros, scale, zero]
        nodes = [
            new_node("QLinearMatMul", operands, [integers], site.node),
            new_node("DequantizeLinear", [integers, scale, zero], [product], site.node),
        ]
        nodes += _biased(self._graph, self._names, site, product, bias, base)
        nodes += _rest(site, end, nodes[-1].outputs[0], self._names)
        put_in(site, end, nodes)


class _FakeQuantized:
    """Emits float products of operands that are quantized and back, for a compiler that makes integer kernels of it."""

    def __init__(self, model: ir.Model, names: Names, weights: Int8Weights) -> None:
        self._graph = model.graph
        self._names = names
        self._weights = weights
        self._quantizers = _Quantizers(model.graph, names)
        self._operands: dict[tuple[ir.Value, ...], ir.Value] = {}

    def rewrite(self, site: LinearSite, end: Ending, clip: Range, bias: Floats | None, _: Floats) -> None:
        """Put the product in the place of the site and of the Add that ends it."""
        shape = site.output.shape
        operands = [
            self._dequantized(site, self._quantizers.of(site, clip), needed(site.node.inputs[0]).shape, {}),
            self._dequantized(site, self._weights.initializers(site), ir.Shape(site.shape), {"axis": 1}),
        ]
        base = end.last.outputs[0].name or label(site.node)
        product = new_value(self._names.fresh(f"{base}_product"), ir.DataType.FLOAT, shape)
        nodes = [new_node("MatMul", operands, [product], site.node)]
        nodes += _biased(self._graph, self._names, site, product, bias, base)
        nodes += _rest(site, end, nodes[-1].outputs[0], self._names)
        put_in(site, end, nodes)

    def _dequantized(
        self, site: LinearSite, quantized: tuple[ir.Value, ...], shape: ir.Shape | None, axis: dict[str, int]
    ) -> ir.Value:
        if quantized not in self._operands:
            output = new_value(self._names.fresh(f"{quantized[0].name}_float"), ir.DataType.FLOAT, shape)
            node = new_node("DequantizeLinear", quantized, [output], site.node, axis)
            self._graph.insert_before(site.node, node)
            self._operands[quantized] = output
        return self._operands[quantized]


def _reached(products: Floats) -> Range:
    """From the smallest to the largest of some products, widened to contain 0; of zeros only, up to 1."""
    low, high = min(float(products.min()), 0.0), max(float(products.max()), 0.0)
    return Range(low, high if low < high else 1.0)


def _biased(
    graph: ir.Graph, names: Names, site: LinearSite, product: ir.Value, bias: Floats | None, base: str
) -> list[ir.Node]:
    """The Add of a constant vector to a product."""
    if bias is None:
        return []
    output = new_value(names.fresh(f"{base}_biased"), ir.DataType.FLOAT, product.shape)
    return [new_node("Add", [product, add_constant(graph, names.fresh(f"{base}_bias"), bias)], [output], site.node)]


def _rest(site: LinearSite, end: Ending, product: ir.Value, names: Names) -> list[ir.Node]:
    """The Add of a bias that is no constant vector."""
    if end.rest is None:
        return []
    output = new_value(names.fresh(f"{product.name}_biased"), ir.DataType.FLOAT, site.output.shape)
    return [new_node("Add", [product, end.rest], [output], site.node)]


def _observed(
    model: ir.Model, sites: list[LinearSite], observe: Observe
) -> tuple[list[LinearSite], Mapping[str, Activation], list[Refusal]]:
    """The sites whose input was seen to vary, what was seen, and why not the others. One observation serves all."""
    constant = [site for site in sites if constant_of(site.input) is not None]
    wanted = dict.fromkeys(site.input for site in sites if site not in constant)
    seen = observe(model, tuple(wanted)) if wanted else {}
    fit: list[LinearSite] = []
    refused: list[Refusal] = []
    for site in sites:
        if site in constant:
            refused.append(Refusal(label(site.node), "its input is a constant", "run fold-constants"))
        elif _source(site) not in seen or is_constant(seen[_source(site)]):
            reason = f"calibration saw no two different numbers in {_source(site)}"
            refused.append(Refusal(label(site.node), reason, "give more representative data"))
        else:
            fit.append(site)
    return fit, seen, refused


def _source(site: LinearSite) -> str:
    """Name of the input of a site; whatever takes the value's place keeps it."""
    return needed(site.node.inputs[0]).name or ""


def _unfit(model: ir.Model, context: Context, *, integer_output: bool) -> Refusal | None:
    provider = context.target.provider
    if provider not in (CPU_PROVIDER, OPENVINO_PROVIDER):
        return Refusal("", f"no integer kernels for this are known of {provider}", "compile for cpu or openvino")
    if integer_output and provider != CPU_PROVIDER:
        return Refusal("", f"{provider} decides by itself what a product writes", "leave integer_output out")
    if opset(model) < _FIRST_OPSET:
        return Refusal(
            "", f"opset {opset(model)} has no DequantizeLinear per channel", "convert the model to opset 17 or later"
        )
    return None
