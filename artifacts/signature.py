"""Inputs and outputs of a decoder's graph: one graph for prefill and decode, past and present in one buffer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .constraints import shown

if TYPE_CHECKING:
    from .manifest import TensorSpec

STEP_INPUTS = (
    ("input_ids", "int64", ("batch", "sequence")),
    ("position_ids", "int64", ("batch", "sequence")),
    ("seqlens_k", "int32", ("batch",)),
    ("total_sequence_length", "int32", ()),
    ("logits_index", "int64", ("batch", "positions")),
)
"""Name, dtype and shape of the inputs before the KV cache; what each means stands in docs/format.md."""
_ROWS = ("batch", "positions")
KV_DTYPES = ("float32", "float16", "int8", "uint8")
"""What a KV cache may be kept in."""
CACHE_PREFIXES = ("past_key_values.", "present.")
"""How the names of its inputs and outputs begin."""


def cache_names(layer: int) -> tuple[tuple[str, str], tuple[str, str]]:
    """(input, output) names of the keys and of the values of one layer, counted from 0."""
    return (
        (f"past_key_values.{layer}.key", f"present.{layer}.key"),
        (f"past_key_values.{layer}.value", f"present.{layer}.value"),
    )


def decoder_problem(inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> tuple[str, str] | None:
    """The key (``inputs`` or ``outputs``) and what keeps it from being a decoder's; None if nothing does."""
    past = inputs[len(STEP_INPUTS) :]
    for key, problem in (
        ("inputs", _step_problem(inputs)),
        ("inputs", cache_problem(past)),
        ("outputs", _logits_problem(outputs)),
        ("outputs", "" if len(outputs) == len(past) + 1 else f"{len(past) + 1} belong here, not {len(outputs)}"),
    ):
        if problem:
            return key, problem
    names = [pair for layer in range(len(past) // 2) for pair in cache_names(layer)]
    for before, after, (old, new) in zip(past, outputs[1:], names, strict=True):
        if (after.name, after.dtype, after.shape) != (new, before.dtype, before.shape):
            return "outputs", f"{shown(after.name)} stands where {new}, the same tensor as {old}, belongs"
    return None


def cache_problem(past: Sequence[TensorSpec]) -> str:
    """What keeps tensors from being the KV cache that a graph takes; empty if nothing does."""
    if not past or len(past) % 2:
        return "a decoder takes a pair of key and value for each layer"
    names = [old for layer in range(len(past) // 2) for old, _ in cache_names(layer)]
    problems = (_tensor_problem(spec, name) for spec, name in zip(past, names, strict=True))
    return next((problem for problem in problems if problem), "")


def _step_problem(inputs: Sequence[TensorSpec]) -> str:
    for spec, (name, dtype, shape) in zip(inputs, STEP_INPUTS, strict=False):
        if (spec.name, spec.dtype, spec.shape) != (name, dtype, shape):
            return f"{shown(spec.name)} stands where {name}, {dtype}{list(shape)} belongs"
    return ""


def _logits_problem(outputs: Sequence[TensorSpec]) -> str:
    if not outputs or (outputs[0].name, outputs[0].dtype, outputs[0].shape[:2]) != ("logits", "float32", _ROWS):
        return "the first is logits, float32[batch, positions, vocabulary]"
    if len(outputs[0].shape) != 3 or not _extent(outputs[0].shape[2]):
        return "the last extent of logits is the size of the vocabulary"
    return ""


def _tensor_problem(spec: TensorSpec, name: str) -> str:
    if spec.name != name:
        return f"{shown(spec.name)} stands where {name} belongs"
    if spec.dtype not in KV_DTYPES:
        return f"{name} is {spec.dtype}; a cache is {', '.join(KV_DTYPES)}"
    if len(spec.shape) != 4 or (spec.shape[0], spec.shape[2]) != ("batch", "capacity"):
        return f"{name} is not [batch, heads, capacity, head size]"
    if not (_extent(spec.shape[1]) and _extent(spec.shape[3])):
        return f"the heads of {name} and their size are numbers"
    return ""


def _extent(size: int | str) -> bool:
    return isinstance(size, int) and size > 0
