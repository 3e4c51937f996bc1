"""kv-cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from artifacts.target import CPU_PROVIDER, CUDA_PROVIDER, Target
from passes.base import Context, Effect, Outcome, Purpose, Refusal
from passes.sites import constant_of
from passes.splice import Names, add_constant, label, new_node, new_value, take_place
from passes.surgery import MICROSOFT, initializer, is_operator, needed, only_user, producer, remove_dead

from .cache_scales import cache_scales
from .rounding import to_half

_PAST, _PRESENT = (3, 4), (1, 2)
"""Inputs and outputs of GroupQueryAttention that hold the cache."""
_SCALES = (12, 13)
_OPERANDS = (0, 1, 2, 7, 8, 10, 11)
"""Its other inputs that are floats: queries, keys, values, cosines, sines, a bias and sinks."""
_QUANTIZED = {"int8": (ir.DataType.INT8, 8), "int4": (ir.DataType.UINT8, 4)}
"""Element type and bits; two of 4 bits share a byte."""


@dataclass(frozen=True, eq=False)
class _Buffer:
    """One side of the cache of an attention: an input of the graph, and the output that is that input of the next run.

    Attributes:
        node: The attention.
        index: Which of its inputs.
        past: The input of the graph; a Cast may stand between it and the attention.
        present: What the attention gives; a Cast may stand between it and the output of the graph.
    """

    node: ir.Node
    index: int
    past: ir.Value
    present: ir.Value


@dataclass(frozen=True)
class KvCache:
    """Keep the keys and values of a decoder in fewer bytes.

    | dtype   | bytes of a number | an attention then                                                         |
    |---------|-------------------|---------------------------------------------------------------------------|
    | int8    | 1                 | rounds each key and value once, to ``scale * q``, and reads the rounded   |
    | int4    | 1/2               | the same, two numbers in a byte: uint8, and half the width                |
    | float16 | 2                 | computes in float16, as it does on CUDA at every dtype                    |

    Inputs and outputs of the graph that hold the cache change their type, and their width for int4. A Cast between
    them and the attention, as float16 leaves it, goes: it would copy the whole cache at each step. An attention that is
    to compute in another type gets casts of its queries, keys and values. Scales of int8 and int4 are constants, one
    for each channel of each head, from the largest magnitude on calibration data; what is larger later is clipped. Two
    channels that rotary embedding turns into each other share the scale of their radius: it holds at every position.
    That takes GroupQueryAttention or com.microsoft RotaryEmbedding to do the turning (run fuse-rotary before); else the
    keys of a head have one scale.

    Run it last. Refused: int8 and int4 without calibration data; targets whose provider has no GroupQueryAttention, and
    few bits beside an attention in float16 on CPU; caches that are no inputs of the graph. An attention whose cache is
    narrow already is left.

    Attributes:
        dtype: ``int8``, ``int4`` or ``float16``.
    """

    name: ClassVar[str] = "kv-cache"
    effect: ClassVar[Effect] = Effect.LOSSY
    purpose: ClassVar[Purpose] = Purpose.SIZE
    alters_cache: ClassVar[bool] = True

    dtype: str = "int8"

    def __post_init__(self) -> None:
        if self.dtype not in (*_QUANTIZED, "float16"):
            raise ValueError(f"dtype is {self.dtype!r}, not int8, int4 or float16")

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Narrow; counts the attentions. Their caches are no float32 any more: a rerun changes 0."""
        found, refused = self._found(model, context)
        if not found:
            return Outcome(0, tuple(refused))
        if self.dtype in _QUANTIZED:
            if context.observe is None:
                remedy = "Compile with data, or leave kv-cache out"
                return Outcome(0, (*refused, Refusal("", "calibration data is needed", remedy)))
            self._quantize(model, found, context)
        else:
            for buffer in (one for pair in found for one in pair):
                _retype(buffer, ir.DataType.FLOAT16)
        if self.dtype == "float16" or context.target.provider == CUDA_PROVIDER:
            names = Names(model.graph)
            for key, _ in found:
                if not _is_half(key.node):
                    _halve(model.graph, names, key.node)
        return Outcome(len(found), tuple(refused))

    def _found(self, model: ir.Model, context: Context) -> tuple[list[tuple[_Buffer, _Buffer]], list[Refusal]]:
        """Keys and values of the attentions to act on, and why not of the others."""
        found: list[tuple[_Buffer, _Buffer]] = []
        refused: list[Refusal] = []
        for node in [node for node in model.graph if is_operator(node, "GroupQueryAttention", domain=MICROSOFT)]:
            key, value = (_buffer(node, *place) for place in zip(_PAST, _PRESENT, strict=True))
            if isinstance(key, _Buffer) and isinstance(value, _Buffer):
                refusal = _without_kernel(node, self.dtype, context.target)
                if refusal is None:
                    found.append((key, value))
                else:
                    refused.append(refusal)
            elif isinstance(key, str) or isinstance(value, str):
                refused.append(Refusal(label(node), next(one for one in (key, value) if isinstance(one, str))))
        return found, refused

    def _quantize(self, model: ir.Model, found: Sequence[tuple[_Buffer, _Buffer]], context: Context) -> None:
        element, bits = _QUANTIZED[self.dtype]
        nodes = [key.node for key, _ in found]
        if context.observe is None:
            raise ValueError("there is no calibration data")
        scales = list(cache_scales(model, nodes, context.observe, (1 << bits - 1) - 1))
        names = Names(model.graph)
        for pair, pair_scales in zip(found, scales, strict=True):
            _scale(model.graph, names, pair[0].node, pair_scales, bits)
            for buffer in pair:
                _retype(buffer, element, packed=8 // bits)


def _buffer(node: ir.Node, index: int, output: int) -> _Buffer | str | None:
    """The buffer; why it is none that can be narrowed; or None where it is narrow already."""
    read = node.inputs[index] if index < len(node.inputs) else None
    made = node.outputs[output] if output < len(node.outputs) else None
    if read is None or made is None:
        return "it keeps no keys and values"
    narrowed, user = producer(read, "Cast"), only_user(made)
    past = read if narrowed is None else needed(narrowed.inputs[0])
    if past.is_graph_input() and past.dtype not in (None, ir.DataType.FLOAT):
        return None
    given = user.outputs[0] if user is not None and is_operator(user, "Cast") else made
    alone = len(past.uses()) == len(read.uses()) == 1 and not (given is made and made.uses())
    if not (past.is_graph_input() and given.is_graph_output() and alone):
        return "its keys and values are not an input and an output of the graph"
    width = past.shape[3] if past.shape is not None and len(past.shape) == 4 else None
    return _Buffer(node, index, past, made) if isinstance(width, int) else "how wide its heads are is not known"


def _without_kernel(node: ir.Node, dtype: str, target: Target) -> Refusal | None:
    """Why the provider of the target has no kernel for an attention over such a cache."""
    if target.provider not in (CPU_PROVIDER, CUDA_PROVIDER):
        return Refusal(label(node), f"{target.provider} has no GroupQueryAttention", "compile for cpu or cuda")
    if target.provider == CPU_PROVIDER and dtype in _QUANTIZED and _is_half(node):
        return Refusal(label(node), f"the CPU provider has no {dtype} cache beside float16", "leave float16 out")
    return None


def _is_half(node: ir.Node) -> bool:
    """Whether an attention computes in float16."""
    return ir.DataType.FLOAT16 in (needed(node.inputs[0]).dtype, node.outputs[0].dtype)


def _scale(graph: ir.Graph, names: Names, node: ir.Node, scales: Sequence[NDArray[np.float32]], bits: int) -> None:
    node.resize_inputs(max(len(node.inputs), _SCALES[1] + 1))
    for index, kind, array in zip(_SCALES, "kv", scales, strict=True):
        node.replace_input_with(index, add_constant(graph, names.fresh(f"{label(node)}.{kind}_scale"), array))
        node.attributes[f"{kind}_quant_type"] = ir.AttrString(f"{kind}_quant_type", "PER_CHANNEL")
    node.attributes["kv_cache_bit_width"] = ir.AttrInt64("kv_cache_bit_width", bits)


def _retype(buffer: _Buffer, element: ir.DataType, packed: int = 1) -> None:
    """Give both ends of a buffer that element type, ``packed`` numbers in each; the casts between go."""
    past, present, node = buffer.past, buffer.present, buffer.node
    read = needed(node.inputs[buffer.index])
    node.replace_input_with(buffer.index, past)
    remove_dead([read])
    widened = only_user(present)
    if widened is not None and node.graph is not None:
        given = widened.outputs[0]
        for index, output in enumerate(node.graph.outputs):
            if output is given:
                node.graph.outputs[index] = present
        node.graph.remove(widened, safe=True)
        present.name, given.name = given.name, None
    shape = list(past.shape or ())
    shape[-1] = -(-shape[-1] // packed)
    for value in (past, present):
        # A new type, not a new dtype: clones of a graph share their type objects.
        value.type, value.shape = ir.TensorType(element), ir.Shape(shape)


def _halve(graph: ir.Graph, names: Names, node: ir.Node) -> None:
    """Let an attention compute in float16; what it reads and gives stays as it is."""
    for index in _OPERANDS:
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None:
            continue
        tensor = constant_of(value)
        if tensor is None:
            narrow = new_value(names.fresh(f"{value.name}_fp16"), ir.DataType.FLOAT16, value.shape)
            cast = new_node("Cast", [value], [narrow], node, {"to": ir.DataType.FLOAT16})
            graph.insert_before(node, cast)
        else:
            narrow = initializer(graph, f"{value.name}_fp16", to_half(tensor.numpy()), ir.DataType.FLOAT16)
        node.replace_input_with(index, narrow)
        remove_dead([value])
    given = node.outputs[0]
    wide = new_value("", ir.DataType.FLOAT, given.shape)
    take_place(wide, given)
    given.name, given.type = names.fresh(f"{wide.name}_fp16"), ir.TensorType(ir.DataType.FLOAT16)
    graph.insert_after(node, new_node("Cast", [given], [wide], node, {"to": ir.DataType.FLOAT}))
