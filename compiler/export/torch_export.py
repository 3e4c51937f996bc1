"""Hugging Face folder -> torch model -> onnx_ir graph, held against torch before anyone uses it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import transformers
from numpy.typing import NDArray

from artifacts.errors import SourceError, UnsupportedError

from ..processor import maximum_length, read_processor, takes_pairs
from ..quiet import quiet
from ..source import ModelSource
from . import attention
from .check import check
from .exported import Arrays, Exported, tensor_specs
from .failures import FAILURES, LOADING_FAILURES, collector_paused, first_line
from .heads import PREFIX, Head, wrap
from .naming import tidy

OPSET = 21
IR_VERSION = 10
_MODEL_CLASSES = {
    "feature-extraction": transformers.AutoModel,
    "text-classification": transformers.AutoModelForSequenceClassification,
    "token-classification": transformers.AutoModelForTokenClassification,
    "question-answering": transformers.AutoModelForQuestionAnswering,
    "fill-mask": transformers.AutoModelForMaskedLM,
}


@dataclass(frozen=True)
class _Loaded:
    """A torch model and its wrapper.

    Attributes:
        model: A transformers.PreTrainedModel.
        head: The wrapper around it.
        names: Inputs of the graph.
        missing: Parameters that the weights do not have: they are random.
        implementation: The model's own attention.
    """

    model: Any
    head: Head
    names: tuple[str, ...]
    missing: frozenset[str]
    implementation: str


def export_torch(source: ModelSource, *, seed: int) -> Exported:
    """Export the model and hold the graph against torch.

    Attention is emitted as com.microsoft::MultiHeadAttention where the architecture uses transformers' attention
    interface; where that cannot be, or does not give torch's numbers, the architecture's plain (eager) attention is.

    Args:
        source: A Hugging Face folder.
        seed: Of the texts of the self-check.

    Raises:
        SourceError: The weights cannot be read, or some that the task needs are missing.
        UnsupportedError: The architecture cannot be exported, or the graph does not give torch's numbers.
    """
    with quiet(), collector_paused():
        loaded = _load(source)
        config = loaded.model.config.to_dict()
        processor, files = read_processor(source, config)
        reference = _Reference(loaded.head)
        model, error, refusal = _first_correct(loaded, source, reference, seed)
    emitted = sum(node.op_type == "MultiHeadAttention" for node in model.graph)
    if not emitted and not refusal:
        refusal = f"{source.architecture} does not use transformers' attention interface"
    return Exported(
        model=model,
        inputs=tensor_specs(tuple(model.graph.inputs)),
        outputs=tensor_specs(tuple(model.graph.outputs)),
        reference=reference,
        processor=processor,
        files=files,
        attentions_expected=int(getattr(loaded.model.config, "num_hidden_layers", 0) or 0),
        attentions_emitted=emitted,
        attention_refusal="" if emitted else refusal,
        error=error,
    )


def _first_correct(
    loaded: _Loaded, source: ModelSource, reference: _Reference, seed: int
) -> tuple[ir.Model, float, str]:
    """The graph of the first attention implementation that gives torch's numbers, its error, why no better one."""
    config = loaded.model.config.to_dict()

    def attempt(implementation: str) -> tuple[ir.Model, float]:
        model = _export(loaded, source, implementation, maximum_length(config))
        return model, check(model, reference, config, seed)

    *better, last = _implementations(loaded)
    refusal = ""
    for implementation in better:
        try:
            return *attempt(implementation), ""
        except UnsupportedError as error:
            refusal = error.what
    return *attempt(last), refusal


class _Reference:
    """The original torch model, with its own attention."""

    def __init__(self, head: Head) -> None:
        self._head = head

    def __call__(self, feeds: Mapping[str, NDArray[np.generic]]) -> Arrays:
        """Outputs in float32 for the feeds of the graph."""
        tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in feeds.items()}
        with torch.inference_mode(), quiet():
            outputs = self._head(**tensors)
        return {name: tensor.float().numpy() for name, tensor in zip(self._head.output_names, outputs, strict=True)}


def _load(source: ModelSource) -> _Loaded:
    attention.register()
    try:
        model, report = _MODEL_CLASSES[source.task].from_pretrained(
            source.path,
            dtype=torch.float32,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=False,
            weights_only=True,
        )
    except LOADING_FAILURES as error:
        what = f"{source.architecture} in {source.path} cannot be loaded: {first_line(error)}"
        raise SourceError(what, "Its config.json and weights must be of one model; download it again") from error
    model.eval().requires_grad_(False)
    head = wrap(model, source.task, source.pooling).eval()
    pairs = takes_pairs(source.task, model.config.to_dict())
    names = ("input_ids", "attention_mask", *(("token_type_ids",) if pairs else ()))
    return _Loaded(model, head, names, frozenset(report["missing_keys"]), model.config._attn_implementation)


def _implementations(loaded: _Loaded) -> tuple[str, ...]:
    """Attention implementations to export with, best first."""
    if getattr(loaded.model, "_supports_attention_backend", False):
        return (attention.NAME, "eager")
    return ("eager",)  # not sdpa: there a row whose keys are all masked is not a number


def _export(loaded: _Loaded, source: ModelSource, implementation: str, length: int) -> ir.Model:
    head = loaded.head
    example = tuple(torch.ones((2, min(9, length)), dtype=torch.int64) for _ in loaded.names)
    example[0].random_(0, int(loaded.model.config.vocab_size), generator=torch.Generator().manual_seed(0))
    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence", max=length)}
    loaded.model.set_attn_implementation(implementation)
    try:
        with torch.no_grad():
            program = torch.onnx.export(
                head,
                example,
                dynamo=True,
                optimize=True,
                opset_version=OPSET,
                input_names=list(loaded.names),
                dynamic_shapes=tuple(dims for _ in loaded.names),
                verbose=False,
            )
    except FAILURES as error:
        raise _unsupported(source.architecture, error) from error
    finally:
        loaded.model.set_attn_implementation(loaded.implementation)
    if program is None:
        raise UnsupportedError(f"{source.architecture} gave no graph")
    model: ir.Model = program.model
    model.ir_version = IR_VERSION
    parameters = {name: tensor.detach().numpy() for name, tensor in loaded.model.state_dict(keep_vars=True).items()}
    used = tidy(model, PREFIX, head.output_names, parameters)
    untrained = sorted(loaded.missing.intersection(used))
    if untrained:
        raise SourceError(
            f"the weights of {source.path} lack {untrained[0]} and {len(untrained) - 1} more that {source.task} needs",
            "Pass a model that was trained for the task",
        )
    return model


def _unsupported(architecture: str, error: BaseException) -> UnsupportedError:
    cause: BaseException | None = error
    texts = []
    while cause is not None:
        texts.append(str(cause))
        if isinstance(cause, attention.AttentionRefusedError):
            return UnsupportedError(f"attention of {architecture} does not fit MultiHeadAttention: {cause}")
        cause = cause.__cause__ or cause.__context__
    operator = re.search(r"\b(?:aten|prims|torchvision)(?:\.|::)\w+(?:\.\w+)?", "\n".join(texts))
    where = f" (operator {operator.group()})" if operator else ""
    return UnsupportedError(
        f"{architecture} cannot be exported{where}: {first_line(error)}",
        "Export it to ONNX by other means and pass the .onnx file",
    )
