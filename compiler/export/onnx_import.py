"""An .onnx file as a source: loaded lazily, converted to a supported opset, held against what ONNX Runtime can run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveInitializersFromInputsPass

from artifacts.errors import SourceError, UnsupportedError
from artifacts.manifest import TensorSpec, TextProcessor
from runtimes.environment import ORT_ERRORS, short_reason
from runtimes.environment import onnxruntime as ort

from ..checkpoint import NEWEST_OPSET
from ..processor import read_processor
from ..quiet import quiet
from ..source import ModelSource
from ..tasks import TENSORS
from .exported import Exported, tensor_specs

OLDEST_OPSET = 18
IR_VERSION = 10
_TEXT_INPUTS = {"input_ids", "attention_mask", "token_type_ids"}
_OUTPUTS = {
    "feature-extraction": (("sentence_embedding",), ("last_hidden_state",)),
    "text-classification": (("logits",),),
    "token-classification": (("logits",),),
    "question-answering": (("start_logits", "end_logits"),),
    "fill-mask": (("logits",),),
}


def import_onnx(source: ModelSource) -> Exported:
    """The graph of an .onnx file, opset 18 to 24, with its weights left on disk.

    Raises:
        SourceError: It cannot be read, or does not have the inputs and outputs of its task.
        UnsupportedError: ONNX Runtime does not know an operator, or the opset cannot be converted.
    """
    model = _load(source.path)
    _check_operators(model, source.path)
    model = _convert(model, source.path)
    RemoveInitializersFromInputsPass()(model)  # IR 3 lists weights among the inputs
    _check_runs(source.path)
    inputs, outputs = tuple(model.graph.inputs), tuple(model.graph.outputs)
    for value in (*inputs, *outputs):
        if value.shape is None:
            raise UnsupportedError(
                f"{source.path} states no shape for {value.name}", "Export it with shapes; a dimension may be symbolic"
            )
        if value.dtype is None or value.dtype == ir.DataType.STRING:
            raise UnsupportedError(
                f"{source.path} has {value.name} of type {value.type or 'unknown'}",
                "Only tensors of numbers are compiled",
            )
    processor, files = _processor(source, tensor_specs(inputs), tensor_specs(outputs))
    return Exported(
        model=model,
        inputs=tensor_specs(inputs),
        outputs=tensor_specs(outputs),
        reference=None,
        processor=processor,
        files=files,
        attentions_emitted=sum(node.op_type == "MultiHeadAttention" for node in model.graph),
    )


def random_feeds(
    inputs: tuple[TensorSpec, ...],
    sizes: Mapping[str, int],
    seed: int,
    *,
    limits: Mapping[str, int] | None = None,
    default: int = 2,
) -> dict[str, NDArray[np.generic]]:
    """Inputs for a plain tensor model.

    Args:
        inputs: What the graph takes.
        sizes: Extents of symbolic dimensions by name; others get ``default``.
        seed: Of the generator.
        limits: Ids of an integer input lie below this: rows of the table it indexes (`index_limits`).
        default: Extent of symbolic dimensions that ``sizes`` does not name.

    Returns:
        Floats from N(0, 1); integers from 0 up to their limit (2 where none is known, so that masks are 0 or 1); masks
        (an input named ``*mask*``) all 1; booleans at random.
    """
    generator = np.random.default_rng(seed)
    feeds: dict[str, NDArray[np.generic]] = {}
    for spec in inputs:
        shape = tuple(dim if isinstance(dim, int) else sizes.get(dim, default) for dim in spec.shape)
        dtype = np.dtype(np.float32 if spec.dtype == "bfloat16" else spec.dtype)
        if dtype.kind == "f":
            feeds[spec.name] = generator.standard_normal(shape).astype(dtype)
        elif "mask" in spec.name:
            feeds[spec.name] = np.ones(shape, dtype)
        else:
            high = 2 if dtype.kind == "b" else (limits or {}).get(spec.name, 2)
            high = min(high, np.iinfo(dtype).max) if dtype.kind in "iu" else high
            feeds[spec.name] = generator.integers(0, max(high, 1), shape).astype(dtype)
    return feeds


def index_limits(model: ir.Model) -> dict[str, int]:
    """Rows of the constant table that each integer input indexes with Gather, through casts only."""
    limits: dict[str, int] = {}
    for value in model.graph.inputs:
        rows = list(_tables(value))
        if rows and value.name:
            limits[value.name] = min(rows)
    return limits


def _tables(value: ir.Value) -> Iterator[int]:
    for node, index in value.uses():
        if node.op_type == "Gather" and index == 1 and node.inputs[0] is not None:
            table = node.inputs[0].const_value
            axis = node.attributes.get_int("axis", 0)
            extent = table.shape[axis] if table is not None and len(table.shape) > axis else None
            if isinstance(extent, int):
                yield extent
        elif node.op_type in ("Cast", "Identity", "Reshape", "Flatten", "Unsqueeze", "Squeeze") and index == 0:
            yield from _tables(node.outputs[0])


def _load(path: Path) -> ir.Model:
    try:
        with quiet():
            return ir.load(path)
    except (ValueError, TypeError, KeyError, OSError, RuntimeError) as error:
        raise SourceError(f"{path} is corrupt: {_cause(error)}"[:400], "Export the model again") from error


def _cause(error: BaseException) -> BaseException:
    """What went wrong first: onnx_ir wraps it once for each level of the file."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _check_operators(model: ir.Model, path: Path) -> None:
    """Name the first node that ONNX Runtime has no schema for, local functions aside."""
    from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

    known = {(schema.domain, schema.name) for schema in get_all_operator_schema()}
    known |= {("" if domain == "ai.onnx" else domain, name) for domain, name in known}
    local = {(function.domain, function.name) for function in model.functions.values()}
    bodies = (model.graph, *(function.graph for function in model.functions.values()))
    for node in (node for body in bodies for node in body.all_nodes()):
        operator = ("" if node.domain == "ai.onnx" else node.domain, node.op_type)
        if operator not in known and operator not in local:
            name = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            raise UnsupportedError(
                f"ONNX Runtime knows no operator {name}, which the node {node.name or '(no name)'} of {path.name} uses",
                "Replace it with standard operators, or export the model without it",
            )


def _convert(model: ir.Model, path: Path) -> ir.Model:
    opset = model.opset_imports.get("", model.opset_imports.get("ai.onnx"))
    if opset is None or OLDEST_OPSET <= opset <= NEWEST_OPSET:
        model.ir_version = IR_VERSION
        return model
    from onnx import version_converter

    try:
        converted = version_converter.convert_version(onnx.load(path), OLDEST_OPSET)
    except (RuntimeError, ValueError, onnx.checker.ValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedError(
            f"{path} uses opset {opset}, which cannot be converted to {OLDEST_OPSET}: {reason}",
            f"Export it with opset {OLDEST_OPSET} to {NEWEST_OPSET}",
        ) from error
    result: ir.Model = ir.from_proto(converted)
    result.ir_version = IR_VERSION
    return result


def _check_runs(path: Path) -> None:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except ORT_ERRORS as error:
        raise UnsupportedError(f"ONNX Runtime does not run {path}: {short_reason(error)}", "Export it again") from error


def _processor(
    source: ModelSource, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> tuple[TextProcessor | None, dict[str, bytes]]:
    if source.task == TENSORS:
        return None, {}
    names, found = {spec.name for spec in inputs}, {spec.name for spec in outputs}
    if "input_ids" not in names or names - _TEXT_INPUTS:
        raise SourceError(
            f"{source.path} takes {', '.join(sorted(names))}; {source.task} needs input_ids and attention_mask",
            "Leave --task out to compile it as plain tensors",
        )
    if not any(set(wanted) <= found for wanted in _OUTPUTS[source.task]):
        wanted = " or ".join(", ".join(group) for group in _OUTPUTS[source.task])
        raise SourceError(
            f"{source.path} gives {', '.join(sorted(found))}; {source.task} needs {wanted}",
            "Leave --task out to compile it as plain tensors",
        )
    return read_processor(source, source.config, pairs="token_type_ids" in names)
