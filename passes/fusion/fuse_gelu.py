"""fuse-gelu."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from passes.base import Context, Effect, Outcome, Purpose, Refusal
from passes.surgery import build, is_operator, needed, only_user, opset, producer, replace

from .products import Product, close, plus_constant, product_of, products_above

_OPSET = 20
_CUBIC = 0.044715
_TANH_SCALE = math.sqrt(2.0 / math.pi)


@dataclass(frozen=True)
class FuseGelu:
    """Turn the chains that spell GELU into Gelu of opset 20, whatever the order of their products.

    ``0.5 x (1 + erf(x / sqrt(2)))`` -> ``Gelu(x)``;
    ``0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))`` -> ``Gelu(x, approximate="tanh")``, the cubic in either of its
    factorings. Refused: every chain in a graph of an older opset. Other uses of Erf and Tanh are no chains.
    """

    name: ClassVar[str] = "fuse-gelu"
    effect: ClassVar[Effect] = Effect.EXACT
    purpose: ClassVar[Purpose] = Purpose.SPEED

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Fuse; counts the chains."""
        changed = 0
        refused: list[Refusal] = []
        for node in [node for node in model.graph if is_operator(node, "Erf", "Tanh")]:
            match = _match(node)
            if match is None:
                continue
            if opset(model) < _OPSET:
                reason = f"Gelu needs opset {_OPSET}, the graph has {opset(model)}"
                refused.append(Refusal(str(node.name), reason, "Run raise-opset before"))
                continue
            source, last = match
            form = "none" if node.op_type == "Erf" else "tanh"
            name = str(last.outputs[0].name)
            gelu = build("Gelu", [source], like=last, name=name, attributes={"approximate": form})
            replace(last, [gelu], gelu.outputs[0])
            changed += 1
        return Outcome(changed, tuple(refused))


def _match(node: ir.Node) -> tuple[ir.Value, ir.Node] | None:
    """``(x, last node)`` of the chain around an Erf or Tanh."""
    source = _erf_argument(node) if node.op_type == "Erf" else _tanh_argument(node)
    plus_one = only_user(node.outputs[0])
    if source is None or plus_one is None or plus_constant(plus_one.outputs[0], 1.0) is not node.outputs[0]:
        return None
    total = plus_one.outputs[0]
    for last in products_above(total):
        if product_of(last.outputs[0]).is_of(0.5, source, total):
            return source, last
    return None


def _erf_argument(node: ir.Node) -> ir.Value | None:
    product = product_of(needed(node.inputs[0]))
    matches = close(product.coefficient, 1.0 / math.sqrt(2.0)) and len(product.factors) == 1
    return product.factors[0] if matches else None


def _tanh_argument(node: ir.Node) -> ir.Value | None:
    """``x`` of ``s (x + c x^3)`` or ``s x (1 + c x^2)``."""
    product = product_of(needed(node.inputs[0]))
    if not close(product.coefficient, _TANH_SCALE):
        return None
    if len(product.factors) == 1:
        return _of_sum(product.factors[0])
    if len(product.factors) == 2:
        for source, rest in (product.factors, product.factors[::-1]):
            square = plus_constant(rest, 1.0)
            if square is not None and product_of(square).is_of(_CUBIC, source, source):
                return source
    return None


def _of_sum(total: ir.Value) -> ir.Value | None:
    node = producer(total, "Add")
    if node is None:
        return None
    left, right = needed(node.inputs[0]), needed(node.inputs[1])
    for source, cubic in ((left, right), (right, left)):
        product: Product = product_of(cubic)
        if product.is_of(_CUBIC, source, source, source):
            return source
    return None
