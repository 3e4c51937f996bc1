"""How far two correct computations of one graph may lie apart, from number format, depth and contraction length."""

from __future__ import annotations

import math

import onnx_ir as ir

UNIT_ROUNDOFF = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8}
"""Relative rounding error of one operation: 2^-p for p significant bits (IEEE 754; bfloat16: p = 8)."""

_CONFIDENCE = 8.0
_CONTRACTIONS = {
    *("MatMul", "Gemm", "Conv", "MatMulInteger", "FusedMatMul", "Einsum"),
    *("MultiHeadAttention", "Attention", "GroupQueryAttention"),
}


def rounding_tolerance(model: ir.Model, precision: str = "fp32") -> float:
    """Relative L2 distance within which two evaluation orders of ``model`` agree.

    A sum of n rounded products errs by at most λ √n u relative to its magnitude, except with probability 2n exp(-λ²/2)
    (Higham & Mary, "A new approach to probabilistic rounding error analysis", SIAM J. Sci. Comput. 41, 2019). The
    errors of L contractions one after the other are independent, so they add in square: λ u √(n L). λ = 8. Where
    products are accumulated in float32 and only stored in a narrower type, n counts one rounding a contraction.

    Args:
        model: The graph; needs no shapes beyond those of its initializers.
        precision: ``fp32``, ``fp16`` or ``bf16``: the type results are stored in.

    Returns:
        The tolerance, a ratio.
    """
    terms = _longest_contraction(model) if precision == "fp32" else 1
    return _CONFIDENCE * UNIT_ROUNDOFF[precision] * math.sqrt(terms * max(_depth(model), 1))


def _longest_contraction(model: ir.Model) -> int:
    lengths = [
        value.const_value.shape.numpy()[0]
        for node in model.graph
        if node.op_type in _CONTRACTIONS
        for value in node.inputs
        if value is not None and value.const_value is not None and len(value.const_value.shape) == 2
    ]
    return max(lengths, default=64)


def _depth(model: ir.Model) -> int:
    """Contractions on the longest path from an input to an output."""
    depth: dict[ir.Value, int] = {}
    deepest = 0
    for node in model.graph:
        below = max((depth.get(value, 0) for value in node.inputs if value is not None), default=0)
        here = below + (node.op_type in _CONTRACTIONS)
        depth.update((output, here) for output in node.outputs)
        deepest = max(deepest, here)
    return deepest
