"""Prompts in int8: products in few bits get a second form for calls of many tokens, and each call takes one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from artifacts.signature import STEP_INPUTS
from artifacts.target import CPU_PROVIDER
from passes.base import Context, Effect, Outcome, Purpose, Refusal
from passes.sites import constant_of, integer_attribute, module_path
from passes.splice import Names, add_constant, label
from passes.surgery import MICROSOFT, is_operator, opset

from .linear import MINIMUM_SIDE, Selection
from .prompt_branches import ORDER, SCALES, ZEROS, PromptBranches

_FIRST_OPSET = 21
"""The opset in which QuantizeLinear learnt to round in blocks, here of a row each."""
_LONGEST = (2**31 - 1) // (255 * 127)
"""Rows of a weight whose products with uint8 always fit in int32."""


@dataclass(frozen=True)
class PromptInt8:
    """Give the products of a decoder that ``weight-only`` made a second form, for calls that read several tokens.

    | before            | after |
    |-------------------|-------|
    | MatMulNBits(x, W) | If(Shape(input_ids)[1] > above, y, MatMulNBits(x, W)) |
    | with ``texts``    | If(Or(that, Shape(input_ids)[0] >= texts), y, MatMulNBits(x, W)) |

    y is Mul(MatMulIntegerToFloat(q, W_int8, 1, W_scale, 128), s), and q is QuantizeLinear(x, s, 128) in blocks of a
    row, with a scale for each: s = ReduceMax(Abs(x)) / 127. A bias is added behind.

    MatMulNBits is made for a few rows, and uses no matrix unit; the integer product has the fastest kernel for many.
    W_int8 is what the codes of W stand for, rounded once more with a scale for each column: both forms compute with the
    same weights, up to that. Each token has a scale of its own, so that what is computed of it does not depend on what
    else a call reads. It costs a byte for each weight, on disk and in memory, and some two microseconds a product and
    step.

    Products of what is read at ``logits_index`` have as many rows in a prompt as in a step: they are left, or ask for
    the number of texts alone. Run it after ``weight-only``.

    Refused: targets other than the CPU provider; opset < 21; weights with a side shorter than 16 or more than
    66,311 rows, or with rows in an order of their own; products that compute in another type than float32; those
    that ``skip`` names; patterns that fit no product.

    Attributes:
        above: Most tokens of a row that a call may have for the first form to be taken. 1: a step alone, so that the
            pieces that a prompt is read in change nothing; more where several tokens are verified at once.
        texts: Least texts of a call for the first form to be taken, whatever it reads of them; 0: never. A text that
            has as much company is rounded otherwise than one that has less.
        reduce_range: 7-bit weights, for CPUs without VNNI: their kernels saturate on 8 bits.
        skip: Module paths to leave alone; ``*`` and ``?`` are wildcards, and ``*`` also spans dots.
        only: Module paths to act on, as in ``skip``; empty for all.
    """

    name: ClassVar[str] = "prompt-int8"
    effect: ClassVar[Effect] = Effect.LOSSY
    purpose: ClassVar[Purpose] = Purpose.SPEED

    above: int = 1
    texts: int = 0
    reduce_range: bool = False
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.above < 1:
            raise ValueError(f"above is {self.above}; a step has 1 token")
        if self.texts < 0 or self.texts == 1:
            raise ValueError(f"texts is {self.texts}: 1 would leave nothing to the second form; 0 is never")

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Rewrite the products of ``model`` in place. They then lie in branches: a rerun changes 0."""
        inputs = {str(value.name): value for value in model.graph.inputs}
        ids, places = (inputs.get(name) for name, *_ in (STEP_INPUTS[0], STEP_INPUTS[-1]))
        if ids is None or places is None:
            return Outcome(0)
        selection, behind = Selection(self.skip, self.only), _behind(places)
        found = [node for node in model.graph if is_operator(node, "MatMulNBits", domain=MICROSOFT)]
        if not self.texts:
            found = [node for node in found if node not in behind]
        refused = selection.idle([module_path(node) for node in found], "product in few bits")
        sites = []
        for node in (node for node in found if selection.candidate(module_path(node))):
            refusal = selection.refusal(node, module_path(node)) or _unfit(node, model, context)
            if refusal is None:
                sites.append(node)
            else:
                refused.append(refusal)
        if sites:
            names = Names(model.graph)
            branches = PromptBranches(model.graph, names, reduce_range=self.reduce_range)
            least = [(self.texts, self.above + 1)] * any(node not in behind for node in sites)
            least += [(self.texts, 0)] * any(node in behind for node in sites)
            conditions = {bool(tokens): _condition(model.graph, names, ids, (texts, tokens)) for texts, tokens in least}
            for node in sites:
                branches.rewrite(node, conditions[node not in behind])
        return Outcome(len(sites), tuple(refused))


def _behind(value: ir.Value) -> set[ir.Node]:
    """The nodes that read the value, or what is computed from it."""
    found: set[ir.Node] = set()
    pending = [value]
    while pending:
        for use in pending.pop().uses():
            if use.node not in found:
                found.add(use.node)
                pending.extend(use.node.outputs)
    return found


def _condition(graph: ir.Graph, names: Names, ids: ir.Value, least: tuple[int, int]) -> ir.Value:
    """Whether a call has so many (texts, tokens of each), bool [1], made before all other nodes; 0 is no number."""
    made: list[ir.Node] = []

    def node(kind: str, inputs: list[ir.Value], dtype: ir.DataType, **attributes: int) -> ir.Value:
        made.append(ir.node(kind, inputs, attributes, name=names.fresh(f"prompt.{kind}")))
        output = made[-1].outputs[0]
        output.name, output.dtype, output.shape = names.fresh("prompt.read"), dtype, ir.Shape([1])
        return output

    conditions = []
    for axis, number in enumerate(least):
        if number:
            wanted = add_constant(graph, names.fresh("prompt.least"), np.array([number], np.int64))
            extent = node("Shape", [ids], ir.DataType.INT64, start=axis, end=axis + 1)
            conditions.append(node("GreaterOrEqual", [extent, wanted], ir.DataType.BOOL))
    condition = conditions[0] if len(conditions) == 1 else node("Or", conditions, ir.DataType.BOOL)
    graph.insert_before(graph[0], made)
    return condition


def _unfit(node: ir.Node, model: ir.Model, context: Context) -> Refusal | None:
    provider = context.target.provider
    rows, columns = integer_attribute(node, "K", 0), integer_attribute(node, "N", 0)
    constants = {index: constant_of(value) for index, value in enumerate(node.inputs) if index and value is not None}
    types = {index: None if tensor is None else tensor.dtype for index, tensor in constants.items()}
    plain = types.get(SCALES) == ir.DataType.FLOAT and types.get(ZEROS, ir.DataType.UINT8) == ir.DataType.UINT8
    reasons = (
        (provider != CPU_PROVIDER, f"no kernel for it is known of {provider}", "compile for cpu"),
        (opset(model) < _FIRST_OPSET, f"opset {opset(model)} does not quantize in blocks", "run raise-opset before"),
        (None in constants.values(), "a weight is no constant", "fold-constants where it could be"),
        (ORDER in constants, "its rows are in an order of their own", ""),
        (not plain, "it does not compute in float32, or its zero points are no codes", ""),
        (min(rows, columns) < MINIMUM_SIDE, f"a weight of {rows} x {columns} is too small to gain", ""),
        (rows > _LONGEST, f"sums over {rows} products do not fit in 32 bits", ""),
    )
    found = next(((reason, remedy) for applies, reason, remedy in reasons if applies), None)
    return None if found is None else Refusal(label(node), *found)
