"""A few nodes of a graph run on numbers of the caller's choice, to read off what they do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from passes.shapes import Dim, Dims, contents_of
from passes.sites import constant_of


class Excerpt:
    """Nodes of standard operators of some opset, in the order of their graph, with the constants that they read."""

    def __init__(
        self, nodes: Sequence[ir.Node], inputs: Iterable[ir.Value], outputs: Iterable[ir.Value], opset: int
    ) -> None:
        constants: dict[str, onnx.TensorProto] = {}
        for value in (value for node in nodes for value in node.inputs):
            tensor = constant_of(value)
            if value is not None and tensor is not None and value.name:
                constants[value.name] = onnx.numpy_helper.from_array(tensor.numpy(), value.name)
        ends = [[_signature(value) for value in values] for values in (inputs, outputs)]
        protos = [ir.serde.serialize_node(node) for node in nodes]
        graph = onnx.helper.make_graph(protos, "excerpt", *ends, [*constants.values()])
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
        self._evaluator = ReferenceEvaluator(model)

    def __call__(self, feeds: Mapping[ir.Value, NDArray[np.generic]]) -> list[NDArray[np.generic]]:
        """The outputs.

        Raises:
            ValueError: The nodes have no result for these numbers.
        """
        named = {str(value.name): array for value, array in feeds.items()}
        try:
            return [np.asarray(array) for array in self._evaluator.run(None, named)]
        except (IndexError, TypeError, RuntimeError) as error:  # what numpy and the evaluator raise beside ValueError
            raise ValueError(str(error)) from error


def is_told(value: ir.Value, lengths: Dims) -> bool:
    """Whether a value of a shape computation holds numbers and these lengths only."""
    contents = contents_of(value)
    return contents is not None and all(isinstance(dim, int) or dim in lengths for dim in contents)


def told(value: ir.Value, lengths: Mapping[Dim, int]) -> NDArray[np.int64]:
    """The numbers that it then holds."""
    return np.array([lengths.get(dim, dim) for dim in contents_of(value) or ()], np.int64)


def _signature(value: ir.Value) -> onnx.ValueInfoProto:
    return onnx.helper.make_tensor_value_info(str(value.name), int(value.dtype or ir.DataType.FLOAT), None)
