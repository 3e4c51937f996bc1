"""How many products that were quantized really run in integer kernels: asked of the profiler, not of the graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from artifacts.errors import ProviderError
from artifacts.target import CPU_PROVIDER, OPENVINO_PROVIDER
from passes.surgery import is_operator, producer
from runtimes.client import Feeds, Worker
from runtimes.kernels import INTEGER_OPERATORS

_RUNS = 2
"""The fewest of which one is not the first, that pays for kernels of a new shape."""


@dataclass(frozen=True)
class IntegerKernels:
    """What became of the quantized products of a graph.

    Attributes:
        products: How many the graph has.
        ran: How many kernels multiplied integers.
    """

    products: int
    ran: int

    def __str__(self) -> str:
        return f"{min(self.ran, self.products)} of {self.products} quantized products ran in integer kernels"


def quantized_products(model: ir.Model) -> int:
    """Products of integers in a graph: operators that are such, and MatMul or Gemm of two dequantized operands.

    Of the two forms that the pass prompt-int8 gives a product, one runs: it counts once.
    """
    return sum(_is_quantized(node) for node in _running(model.graph))


def _running(graph: ir.Graph) -> Iterator[ir.Node]:
    """The nodes of a graph, and of one branch of each If."""
    for node in graph:
        yield node
        if "then_branch" in node.attributes:
            yield from _running(node.attributes["then_branch"].as_graph())


def count_integer_kernels(model: ir.Model, worker: Worker, feeds: Feeds) -> IntegerKernels:
    """Run the model under the profiler, in a session of its own, and count.

    Args:
        model: The graph that the worker has loaded, as it was saved.
        worker: Holds it.
        feeds: Inputs of one run.

    Raises:
        ProviderError: It does not run, or the profile cannot be read.
    """
    kernels = worker.profile(feeds, runs=_RUNS)
    return IntegerKernels(quantized_products(model), sum(kernel.integer for kernel in kernels))


def integer_kernel_note(model: ir.Model, worker: Worker, feeds: Feeds) -> str:
    """The same in a line for the proof; empty where nothing is quantized, or the provider's profile tells no types."""
    if worker.provider not in (CPU_PROVIDER, OPENVINO_PROVIDER) or not quantized_products(model):
        return ""
    try:
        return str(count_integer_kernels(model, worker, feeds))
    except ProviderError as error:
        return f"integer kernels could not be counted: {error.what}"


def _is_quantized(node: ir.Node) -> bool:
    if node.op_type in INTEGER_OPERATORS:
        return True
    operands = [producer(value, "DequantizeLinear") for value in node.inputs[:2]]
    return is_operator(node, "MatMul", "Gemm") and None not in operands
