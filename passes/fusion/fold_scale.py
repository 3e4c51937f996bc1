"""fold-scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from passes.affine import (
    Affine,
    Floats,
    affine_of,
    is_float32,
    keeps_precision,
    matrix_of,
    put_matrix,
    read_only_by,
    refill,
)
from passes.base import Context, Effect, Outcome, Purpose, Refusal
from passes.origins import scale_origins
from passes.shapes import dims_of
from passes.sites import constant_of, linear_sites
from passes.splice import label, take_place
from passes.surgery import bypass, is_operator, needed, only_user, producer, remove_dead


@dataclass(frozen=True, eq=False)
class _Match:
    """``(x @ W + bias) * scale`` or ``/ scale``; ``path`` are the values from the scaled one up to the site's sum."""

    node: ir.Node
    scale: ir.Value
    path: tuple[ir.Value, ...]
    affine: Affine


@dataclass(frozen=True)
class FoldScale:
    """Fold a constant factor behind a linear site into its weight and bias: ``(xW + b) s`` -> ``x(Ws) + bs``.

    The factor is a Mul or Div by one number, found through any Reshape and Transpose (as where a query is scaled before
    or after its heads are split), or by a vector with a number for each column of W, right behind the site. Refused:
    products that others read too, weights and biases that others read too, graphs not of float32, a factor that is 0 or
    not finite, that would change the rank, or would take numbers out of the range of the type.
    """

    name: ClassVar[str] = "fold-scale"
    effect: ClassVar[Effect] = Effect.EXACT
    purpose: ClassVar[Purpose] = Purpose.FORM

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Fold; counts the factors."""
        changed = 0
        refused: list[Refusal] = []
        outputs = _outputs(model)
        for node in [node for node in model.graph if is_operator(node, "Mul", "Div")]:
            match = _match(node, outputs)
            if match is None:
                continue
            reason = _reason_against(match) or _fold(match)
            if reason:
                refused.append(Refusal(label(node), reason))
            else:
                changed += 1
                outputs = _outputs(model)
        return Outcome(changed, tuple(refused))


def _outputs(model: ir.Model) -> dict[ir.Value, Affine]:
    """The linear sites with their biases, by what they make."""
    found = (affine_of(site) for site in linear_sites(model))
    return {affine.output: affine for affine in found if affine is not None}


def _match(node: ir.Node, outputs: dict[ir.Value, Affine]) -> _Match | None:
    left, right = needed(node.inputs[0]), needed(node.inputs[1])
    for value, scale in ((left, right), (right, left))[: 2 if node.op_type == "Mul" else 1]:
        tensor = constant_of(scale)
        if tensor is None or (tensor.size != 1 and len(tensor.shape) != 1):
            continue
        path = [value]
        step = producer(value, "Reshape", "Transpose") if tensor.size == 1 else None
        while step is not None:
            path.append(needed(step.inputs[0]))
            step = producer(path[-1], "Reshape", "Transpose")
        if path[-1] in outputs:
            return _Match(node, scale, tuple(path), outputs[path[-1]])
    return None


def _reason_against(match: _Match) -> str:
    site, bias = match.affine.site, match.affine.bias
    tensor = constant_of(match.scale)
    numbers = np.zeros(0) if tensor is None else tensor.numpy()
    rank = len(dims_of(match.path[0]) or ()) or (1 if len(match.path) == 1 else 0)
    bias_use = match.affine.bias_use
    reasons = (
        (any(only_user(value) is None for value in match.path), "what it scales is used elsewhere too"),
        (not all(is_float32(item) for item in (site.weight, bias, match.scale) if item), "it is not of float32"),
        (not read_only_by(site.weight, [(site.node, 1)]), "the weight is used elsewhere too"),
        (bias is not None and not read_only_by(bias, [bias_use] if bias_use else []), "the bias is used elsewhere too"),
        (not (np.isfinite(numbers).all() and np.all(numbers != 0)), "the factor is 0 or not finite"),
        (numbers.size not in (1, site.shape[1]), f"the factor is not as long as the {site.shape[1]} columns"),
        (numbers.ndim > rank, "the factor changes the rank"),
    )
    return next((reason for applies, reason in reasons if applies), "")


def _fold(match: _Match) -> str:
    """Fold, or tell why the numbers do not allow it."""
    site, bias = match.affine.site, match.affine.bias
    weight = _scaled(match, matrix_of(site))
    tensor = constant_of(bias)
    shift = None if tensor is None else _scaled(match, tensor.numpy())
    if weight is None or (tensor is not None and shift is None):
        return "the scaled numbers leave the range of float32"
    put_matrix(site, weight)
    scale_origins(site.node, site.shape[1], _factor(match))
    if bias is not None and shift is not None:
        refill(bias, shift)
    node, value = match.node, match.path[0]
    if not bypass(node, value):
        take_place(value, node.outputs[0])
        if node.graph is not None:
            node.graph.remove(node, safe=True)
        remove_dead([match.scale])
    return ""


def _scaled(match: _Match, array: Floats) -> Floats | None:
    """The array ``[..., N]`` with the factor in it; None if that loses precision."""
    tensor = constant_of(match.scale)
    if tensor is None:
        return None
    factor: Floats = tensor.numpy().reshape(-1)
    with np.errstate(over="ignore", under="ignore"):
        scaled = array * factor if match.node.op_type == "Mul" else array / factor
    return scaled if keeps_precision(array, scaled) else None


def _factor(match: _Match) -> NDArray[np.float64]:
    """What the columns are multiplied by, in float64."""
    factor = np.asarray([] if (tensor := constant_of(match.scale)) is None else tensor.numpy(), np.float64)
    return factor if match.node.op_type == "Mul" else 1.0 / factor
