"""A pass of your own: turn ``x * 1`` into ``x``, and run it in a verified pipeline. See docs/writing_a_pass.md."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from artifacts.target import CPU
from passes.base import Context, Effect, Outcome, Purpose, Refusal
from passes.observers import Timing, Verifying
from passes.pipeline import parse
from passes.registry import REGISTRY
from passes.shapes import dims_of, same_dims
from passes.surgery import bypass, is_operator, needed, scalar


@dataclass(frozen=True)
class RemoveOnes:
    """Remove multiplications by a constant 1.

    Refused: products whose shape is not provably that of the other operand, products that make a graph output.

    Attributes:
        tolerance: How far from 1 the constant may be.
    """

    name: ClassVar[str] = "remove-ones"
    effect: ClassVar[Effect] = Effect.EXACT
    purpose: ClassVar[Purpose] = Purpose.FORM

    tolerance: float = 0.0

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Remove them; counts the products removed."""
        changed = 0
        refused: list[Refusal] = []
        for node in [node for node in model.graph if is_operator(node, "Mul")]:
            source, one = needed(node.inputs[0]), scalar(node.inputs[1])
            if one is None or abs(one - 1.0) > self.tolerance:
                continue
            same = same_dims(dims_of(source), dims_of(node.outputs[0]))
            if same and bypass(node, source):
                changed += 1
            else:
                refused.append(Refusal(str(node.name), "it makes an output, or another shape"))
        return Outcome(changed, tuple(refused))


def example_model() -> ir.Model:
    """``y = -(x * 1)`` over ``[batch, 4]``."""
    one = ir.Value(name="one", const_value=ir.tensor(np.float32(1.0)), type=ir.TensorType(ir.DataType.FLOAT))
    one.shape = ir.Shape(())
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(("batch", 4)))
    product = ir.Node("", "Mul", [x, one], name="product")
    negative = ir.Node("", "Neg", [product.outputs[0]], name="negative")
    for node, name in ((product, "xx"), (negative, "y")):
        node.outputs[0].name = name
        node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        node.outputs[0].shape = ir.Shape(("batch", 4))
    nodes, outputs = [product, negative], [negative.outputs[0]]
    graph = ir.Graph([x], outputs, nodes=nodes, initializers=[one], opset_imports={"": 21}, name="example")
    return ir.Model(graph, ir_version=10)


def main() -> None:
    """Run the pass, and the clean-up's last step, on a small graph."""
    context = Context(CPU)
    timing = Timing()
    model = example_model()
    pipeline = parse("remove-ones(tolerance=1e-06); remove-unused", (*REGISTRY, RemoveOnes))
    for item, outcome in pipeline.run(model, context, (Verifying(context), timing)):
        print(f"{item.name}: {outcome.changed} changed, {len(outcome.refused)} refused")
    print([node.op_type for node in model.graph])


if __name__ == "__main__":
    main()
