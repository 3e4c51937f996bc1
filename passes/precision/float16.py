"""float16 weights and activations, for devices that compute in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from passes.base import Context, Effect, Outcome, Purpose, Refusal
from passes.sites import constant_of
from passes.splice import Names, add_constant, label, new_node, new_value
from passes.surgery import remove_dead

from .policy import AGNOSTIC, LIMITS, Policy, divide
from .rounding import to_half, to_half_limit
from .types import Signatures


@dataclass(frozen=True)
class Float16:
    """Compute in float16 wherever that is safe; inputs and outputs of the graph keep their types.

    | before                          | after |
    |---------------------------------|-------|
    | a float32 constant              | its float16 rounding, within ±65504; mask minima (<= -1e6) -32752 |
    | a float32 input of the graph    | Cast to float16 where it is read |
    | a float32 output of the graph   | Cast to float32 in front of it |
    | Cast(to=float) of an integer    | Cast(to=float16) |
    | ConstantOfShape                 | its value in float16 |
    | a value read in both types      | one Cast, shared by its readers |

    What stays float32, each refused with its reason: operators that sum, square or are steep (ReduceSum, ReduceMean,
    ReduceL2, Pow, Sqrt, Exp, Sin, Cos, ... see `policy.SENSITIVE`); any operator with a constant that float16 cannot
    hold (the 1e-9 of a pooling's Clip, the 1e-12 of a normalization, a factor of 1e5); operators without a float16
    form (Range, DynamicQuantizeLinear, ...); nodes with subgraphs, of unknown domains, or with values of unknown type.
    Without a refusal of their own, so do: cheap operators that read nothing but float32, casts between floating types,
    casts to integers, and what computes the angles of a rotary embedding from integer positions.
    LayerNormalization, Softmax and attention become float16: their kernels accumulate in float32.

    Refused as a whole: targets that do not compute in float16.
    """

    name: ClassVar[str] = "float16"
    effect: ClassVar[Effect] = Effect.LOSSY
    purpose: ClassVar[Purpose] = Purpose.SIZE

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Convert ``model`` in place. What was converted no longer touches float32: a rerun changes 0."""
        if context.target.float_type != "float16":
            target = context.target
            return Outcome(0, (Refusal("", f"{target.name} computes in {target.float_type}", "compile for cuda"),))
        signatures = Signatures(model)
        signatures.infer(model.graph)
        policy = divide(model.graph, signatures)
        refused = tuple(Refusal(label(node), reason) for node, reason in policy.reasons.items())
        if policy.half:
            _Conversion(model.graph, policy, signatures).run()
        return Outcome(len(policy.half), refused)


class _Conversion:
    """One conversion of one graph: what is shared between nodes."""

    def __init__(self, graph: ir.Graph, policy: Policy, signatures: Signatures) -> None:
        self._graph = graph
        self._policy = policy
        self._signatures = signatures
        self._names = Names(graph)
        self._constants: dict[tuple[ir.Value, bool], ir.Value] = {}
        self._narrowed: dict[ir.Value, ir.Value] = {}

    def run(self) -> None:
        """Types first, then the readers of each value, then the outputs of the graph."""
        half_values = [
            value
            for node in self._graph
            if node in self._policy.half
            for index, value in enumerate(node.outputs)
            if value.dtype == ir.DataType.FLOAT and self._signatures.output_may_be_half(node, index)
        ]
        for value in half_values:
            # A new type, not a new dtype: clones of a graph share their type objects.
            value.type = ir.TensorType(ir.DataType.FLOAT16)
        for node in list(self._graph):
            if node in self._policy.half:
                self._narrow_inputs(node)
                _narrow_attributes(node)
        for value in half_values:
            self._widen(value)
        remove_dead(dict.fromkeys(constant for constant, _ in self._constants))

    def _narrow_inputs(self, node: ir.Node) -> None:
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype != ir.DataType.FLOAT or not self._wants_half(node, index):
                continue
            tensor = constant_of(value)
            narrow = self._cast_down(value) if tensor is None else self._constant(value, tensor, node)
            node.replace_input_with(index, narrow)

    def _wants_half(self, node: ir.Node, index: int) -> bool:
        if node.op_type in AGNOSTIC:
            return True
        if node not in self._policy.half:
            return False
        return node.op_type == "Cast" or self._signatures.input_may_be_half(node, index)

    def _constant(self, value: ir.Value, tensor: ir.TensorProtocol, node: ir.Node) -> ir.Value:
        limit = node.op_type in LIMITS
        key = (value, limit)
        if key not in self._constants:
            floats = tensor.numpy()
            half = to_half_limit(floats) if limit else to_half(floats)
            self._constants[key] = add_constant(self._graph, self._names.fresh(f"{value.name}_fp16"), half)
        return self._constants[key]

    def _cast_down(self, value: ir.Value) -> ir.Value:
        if value not in self._narrowed:
            narrow = new_value(self._names.fresh(f"{value.name}_fp16"), ir.DataType.FLOAT16, value.shape)
            self._insert_cast(value, narrow)
            self._narrowed[value] = narrow
        return self._narrowed[value]

    def _widen(self, value: ir.Value) -> None:
        """Give the readers of a float16 value that need float32, graph outputs among them, one Cast back."""
        readers = [(node, index) for node, index in value.uses() if not self._wants_half(node, index)]
        if not readers and not value.is_graph_output():
            return
        wide = new_value(self._names.fresh(f"{value.name}_fp32"), ir.DataType.FLOAT, value.shape)
        self._insert_cast(value, wide)
        for node, index in readers:
            node.replace_input_with(index, wide)
        if value.is_graph_output():
            for index, output in enumerate(self._graph.outputs):
                if output is value:
                    self._graph.outputs[index] = wide
            wide.name, value.name = value.name, self._names.fresh(f"{value.name}_fp16")

    def _insert_cast(self, source: ir.Value, target: ir.Value) -> None:
        maker = source.producer()
        cast = new_node("Cast", [source], [target], maker, {"to": target.dtype or ir.DataType.FLOAT})
        if maker is not None:
            self._graph.insert_after(maker, cast)
        else:
            self._graph.insert_before(self._graph[0], cast)


def _narrow_attributes(node: ir.Node) -> None:
    if node.op_type == "Cast":
        node.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT16)
    elif node.op_type == "ConstantOfShape":
        value = node.attributes.get("value")
        floats = np.zeros(1, np.float32) if value is None else value.as_tensor().numpy()
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(to_half(floats)))
