"""Products as bags of factors, so that a rule need not list the orders in which an exporter may multiply."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from passes.surgery import needed, only_user, producer, scalar

_CLOSE = 1e-3
"""Relative difference within which a constant is taken for the one meant: float16 rounds by up to 5e-4."""


@dataclass(frozen=True, eq=False)
class Product:
    """``coefficient * factors[0] * factors[1] * …``; integer powers are written out."""

    coefficient: float
    factors: tuple[ir.Value, ...]

    def is_of(self, coefficient: float, *factors: ir.Value | None) -> bool:
        """Whether these are its coefficient and factors, in any order."""
        mine, theirs = sorted(map(id, self.factors)), sorted(map(id, factors))
        return close(self.coefficient, coefficient) and mine == theirs


def close(number: float | None, wanted: float) -> bool:
    """Whether a constant of the graph is the mathematical one meant, rounded."""
    return number is not None and math.isclose(number, wanted, rel_tol=_CLOSE)


def product_of(value: ir.Value, *, inner: bool = False) -> Product:
    """The factors of a value made by Mul, Div by a constant and Pow to 2 or 3.

    A factor that others read too is taken as a whole. ``inner`` says that ``value`` itself is such a factor.
    """
    number = scalar(value)
    if number is not None:
        return Product(number, ())
    node = producer(value, "Mul", "Div", "Pow")
    if node is None or (inner and only_user(value) is None):
        return Product(1.0, (value,))
    left = product_of(needed(node.inputs[0]), inner=True)
    if node.op_type == "Mul":
        right = product_of(needed(node.inputs[1]), inner=True)
        return Product(left.coefficient * right.coefficient, left.factors + right.factors)
    exponent = scalar(node.inputs[1])
    if node.op_type == "Div" and exponent:
        return Product(left.coefficient / exponent, left.factors)
    if node.op_type == "Pow" and exponent in (2.0, 3.0):
        return Product(left.coefficient**exponent, left.factors * int(exponent))
    return Product(1.0, (value,))


def plus_constant(value: ir.Value | None, number: float) -> ir.Value | None:
    """``x`` where the value is ``x + number``, in either order."""
    node = producer(value, "Add")
    if node is None:
        return None
    left, right = node.inputs
    if close(scalar(right), number):
        return left
    return right if close(scalar(left), number) else None


def products_above(value: ir.Value) -> list[ir.Node]:
    """The Mul and constant Div nodes that the value goes up through, each the only reader of the one before."""
    nodes: list[ir.Node] = []
    node = only_user(value)
    while node is not None and node.op_type in ("Mul", "Div") and producer(node.outputs[0], "Mul", "Div") is node:
        if node.op_type == "Div" and scalar(node.inputs[1]) is None:
            break
        nodes.append(node)
        node = only_user(node.outputs[0])
    return nodes
