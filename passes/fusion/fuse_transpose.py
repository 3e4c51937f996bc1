"""fuse-transpose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from artifacts.target import CPU_PROVIDER, OPENVINO_PROVIDER
from passes.base import Context, Effect, Outcome, Purpose, Refusal
from passes.shapes import dims_of
from passes.sites import constant_of
from passes.splice import label
from passes.surgery import (
    MICROSOFT,
    build,
    is_operator,
    needed,
    only_user,
    producer,
    remove_dead,
    replace,
    require_microsoft,
)

_PROVIDERS = (CPU_PROVIDER, OPENVINO_PROVIDER)
_FLAGS = ("transA", "transB")


@dataclass(frozen=True)
class FuseTranspose:
    """Let a product read an operand whose last two axes are swapped as it was: com.microsoft FusedMatMul.

    ``MatMul(a, Transpose(b, perm))`` -> ``FusedMatMul(a, Transpose(b, perm'), transB=1)`` where perm' is perm with its
    last two entries swapped and leaves the last axis of b in its place: what remains to be moved are whole rows. Where
    nothing remains, b itself is read. Likewise the left operand with transA. The key of an attention, transposed by
    (0, 2, 3, 1), keeps a Transpose by (0, 2, 1, 3). Constants are left, as are linear sites. Refused: a Transpose that
    others read too, operands not of float32 or of unknown rank, targets other than cpu and openvino.
    """

    name: ClassVar[str] = "fuse-transpose"
    effect: ClassVar[Effect] = Effect.EXACT
    purpose: ClassVar[Purpose] = Purpose.SPEED

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Fuse; counts the operands."""
        changed = 0
        refused: list[Refusal] = []
        for product in [node for node in model.graph if is_operator(node, "MatMul")]:
            if any(constant_of(operand) is not None for operand in product.inputs):
                continue
            flags: dict[str, int] = {}
            for flag, operand in zip(_FLAGS, product.inputs, strict=True):
                transpose = producer(operand, "Transpose")
                if transpose is None or constant_of(transpose.inputs[0]) is not None or not _swaps(transpose):
                    continue
                reason = _reason_against(product, transpose, context)
                if reason:
                    refused.append(Refusal(label(product), reason))
                else:
                    flags[flag] = 1
            if flags:
                _fuse(product, flags)
                changed += len(flags)
        if changed:
            require_microsoft(model)
        return Outcome(changed, tuple(refused))


def _permutation(transpose: ir.Node) -> tuple[int, ...]:
    """Its axes in order; reversed where it states none, empty where not even their number is known."""
    if "perm" in transpose.attributes:
        return tuple(transpose.attributes["perm"].as_ints())
    rank = len(dims_of(transpose.inputs[0]) or ())
    return tuple(reversed(range(rank)))


def _swaps(transpose: ir.Node) -> bool:
    """Whether what was the last axis is now the one before."""
    order = _permutation(transpose)
    return len(order) > 1 and order[-2] == len(order) - 1


def _rank(value: ir.Value | None) -> int:
    """Number of axes, as its shape or the Transpose that makes it says; 0 where neither does."""
    transpose = producer(value, "Transpose")
    return len(dims_of(value) or ()) or (len(_permutation(transpose)) if transpose is not None else 0)


def _reason_against(product: ir.Node, transpose: ir.Node, context: Context) -> str:
    target = context.target
    narrow = any(_rank(operand) < 2 for operand in product.inputs)
    floats = all(operand is not None and operand.dtype == ir.DataType.FLOAT for operand in product.inputs)
    suited = target.provider in _PROVIDERS and MICROSOFT in target.domains
    reasons = (
        (not suited, f"target {target.name} has no FusedMatMul that gains"),
        (only_user(transpose.outputs[0]) is None, "the transposed operand is used elsewhere too"),
        (not floats, "the operands are not known to be of float32"),
        (narrow, "the operands are not known to be matrices"),
    )
    return next((reason for applies, reason in reasons if applies), "")


def _fuse(product: ir.Node, flags: dict[str, int]) -> None:
    operands = [needed(operand) for operand in product.inputs]
    name = str(product.outputs[0].name)
    inputs = [_unswapped(operand) if flag in flags else operand for flag, operand in zip(_FLAGS, operands, strict=True)]
    fused = build("FusedMatMul", inputs, like=product, name=name, domain=MICROSOFT, attributes=flags)
    replace(product, [fused], fused.outputs[0])
    remove_dead(operands)


def _unswapped(operand: ir.Value) -> ir.Value:
    """The operand of a Transpose with its last two axes swapped back: the Transpose is changed, or passed by."""
    transpose = producer(operand, "Transpose")
    if transpose is None:
        raise ValueError(f"{operand.name} is made by no Transpose")
    order = _permutation(transpose)
    order = (*order[:-2], order[-1], order[-2])
    if order == tuple(range(len(order))):
        return needed(transpose.inputs[0])
    transpose.attributes["perm"] = ir.AttrInt64s("perm", order)
    if operand.shape is not None:
        dims = list(operand.shape)
        operand.shape = ir.Shape([*dims[:-2], dims[-1], dims[-2]])
    return operand
