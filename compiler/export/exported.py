"""What an export hands to the compile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from artifacts.manifest import Generation, TensorSpec, TextProcessor

Arrays = dict[str, NDArray[np.generic]]
Reference = Callable[[Mapping[str, NDArray[np.generic]]], Arrays]


@dataclass(frozen=True)
class Exported:
    """A model as a graph, with what is needed to judge and to use it.

    Attributes:
        model: The graph, opset 21 to 24 for exports; unchanged but for its names.
        inputs: Its inputs, in order.
        outputs: Its outputs, in order.
        reference: Runs the original torch model in float32: ``reference(feeds) -> outputs``. None for an .onnx source:
            the file itself is the reference. That of a language model takes the feeds of a prefill, whose KV buffers
            it does not read, and gives ``logits`` only.
        processor: How texts become ids; None for plain tensors.
        files: Files that the processor needs: path in the bundle -> content.
        attentions_expected: Attention layers the architecture has; 0 for an .onnx source.
        attentions_emitted: How many were emitted as com.microsoft::MultiHeadAttention, in a language model as
            com.microsoft::GroupQueryAttention.
        attention_refusal: Why they were not; empty if they were.
        error: Largest relative L2 distance to torch found by the self-check; 0 for an .onnx source.
        generation: How a language model begins, ends and samples a text; None for every other task.
    """

    model: ir.Model
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    reference: Reference | None
    processor: TextProcessor | None
    files: Mapping[str, bytes] = field(default_factory=dict)
    attentions_expected: int = 0
    attentions_emitted: int = 0
    attention_refusal: str = ""
    error: float = 0.0
    generation: Generation | None = None


def tensor_specs(values: tuple[ir.Value, ...]) -> tuple[TensorSpec, ...]:
    """Names, numpy dtypes and shapes of graph inputs or outputs; symbolic dimensions keep their names."""
    return tuple(_spec(value) for value in values)


def _spec(value: ir.Value) -> TensorSpec:
    dims = value.shape if value.shape is not None else ()
    shape = tuple(dim if isinstance(dim, int) else str(dim.value or f"{value.name}_{i}") for i, dim in enumerate(dims))
    dtype = value.dtype.numpy().name if value.dtype is not None else "float32"
    return TensorSpec(value.name or "", dtype, shape)
