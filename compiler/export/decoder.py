"""Language model of a Hugging Face folder -> one onnx_ir graph for prefill and decode, held against torch."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
import transformers

from artifacts.errors import SourceError, UnsupportedError
from passes.fusion.fuse_rotary import CONTEXT_LENGTH

from ..generation_defaults import read_generation
from ..processor import TOKENIZER, read_processor
from ..quiet import quiet
from ..source import ModelSource
from .adapting import adapted
from .causal_attention import Layer
from .decoder_check import check_decoder
from .decoder_head import INPUTS, DecoderHead, TorchDecoder, past_names
from .decoder_survey import REMEDY, survey
from .exported import Exported, Reference, tensor_specs
from .failures import FAILURES, LOADING_FAILURES, collector_paused, first_line
from .heads import PREFIX
from .naming import tidy
from .stacking import NotStackableError, Parameters, plan_stack, repeat_layers, shortened
from .streaming import stream_model

OPSET = 21
IR_VERSION = 10
Check = Callable[..., float]
"""`check_decoder`, but for the graph, ``reference`` and ``layers``."""
Made = tuple[ir.Model, float, Reference]
"""A graph, its error, and what it was compared with."""
_BATCH, _SEQUENCE, _POSITIONS, _CAPACITY = 2, 5, 3, 16
"""Extents of the example; all different, so that no two are taken for one."""


def export_decoder(source: ModelSource, *, seed: int) -> Exported:
    """Export a language model and hold the graph against torch.

    Args:
        source: A Hugging Face folder.
        seed: Of the texts of the self-check.

    Raises:
        SourceError: The weights cannot be read, or are not those that config.json calls for.
        UnsupportedError: The architecture cannot be expressed, which is told before the weights are read; or the graph
            does not give torch's numbers.
    """
    with quiet(), collector_paused():
        config = _config(source)
        layers = survey(config, source.architecture)
        content = config.to_dict()
        processor, files = read_processor(source, content)
        generation, more = read_generation(source, content, files[TOKENIZER])
        limits = (int(config.vocab_size), processor.max_length)
        check = partial(check_decoder, limits=limits, seed=seed, name=source.architecture)
        model, error, reference = _streamed(source, config, layers, check) or _loaded(source, layers, check)
        model.metadata_props[CONTEXT_LENGTH] = str(processor.max_length)
    return Exported(
        model=model,
        inputs=tensor_specs(tuple(model.graph.inputs)),
        outputs=tensor_specs(tuple(model.graph.outputs)),
        reference=reference,
        processor=processor,
        generation=generation,
        files={**files, **more},
        attentions_expected=len(layers),
        attentions_emitted=sum(node.op_type == "GroupQueryAttention" for node in model.graph),
        error=error,
    )


def _config(source: ModelSource) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(source.path, local_files_only=True, trust_remote_code=False)
    except LOADING_FAILURES as error:
        what = f"{source.path / 'config.json'} makes no {source.architecture}: {first_line(error)}"
        raise SourceError(what, "Download the model again") from error


def load_original(source: ModelSource) -> Any:
    """The model in float32, with the attention of its own source file.

    Raises:
        SourceError: It cannot be loaded; or tensors are missing, unknown, or of another shape than config.json says.
    """
    remedy = "Its config.json and weights must be of one model; download it again"
    try:
        model, report = getattr(transformers, source.architecture).from_pretrained(
            source.path,
            dtype=torch.float32,
            attn_implementation="eager",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the report names them, the exception does not
            local_files_only=True,
            trust_remote_code=False,
            weights_only=True,
        )
    except LOADING_FAILURES as error:
        what = f"{source.architecture} in {source.path} cannot be loaded: {first_line(error)}"
        raise SourceError(what, remedy) from error
    mismatched = sorted(report["mismatched_keys"])
    if mismatched:
        name, found, wanted = mismatched[0]
        what = f"{name} is {list(found)} where config.json makes it {list(wanted)}"
        raise SourceError(f"the weights of {source.path} do not fit: {what}{_more(mismatched)}", remedy)
    for kind, verb in (("missing_keys", "lack"), ("unexpected_keys", "hold the unknown tensor")):
        names = sorted(report[kind])
        if names:
            raise SourceError(f"the weights of {source.path} {verb} {names[0]}{_more(names)}", remedy)
    return model.eval().requires_grad_(False)


def _more(names: list[Any]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _streamed(source: ModelSource, config: Any, layers: tuple[Layer, ...], check: Check) -> Made | None:
    """The graph of a large checkpoint, whose weights stay in their files; None where that cannot be done.

    The first layers are held against torch, copies of all that are traced among them: the others are copies too.
    """
    streamed = stream_model(source, config)
    stack = None if streamed is None else plan_stack(streamed.model, layers)
    if streamed is None or stack is None:
        return None
    try:
        with shortened(streamed.model, stack), streamed.resident() as parameters:
            model = _export(streamed.model, layers[: stack.traced], source.architecture, parameters)
            streamed.defer(model, parameters)
        short = stack.shortest()
        trial, count = model.clone(), len(short.templates)
        repeat_layers(trial, short, streamed, streamed.twin)
        gc.collect()  # the collector is paused, and what the tracer leaves holds on to the weights
        with shortened(streamed.model, stack, count):
            error = check(trial, reference=streamed.reference, layers=layers[:count])
        repeat_layers(model, stack, streamed, streamed.twin)
    except (*FAILURES, UnsupportedError):
        return None
    return model, error, streamed.reference


def _loaded(source: ModelSource, layers: tuple[Layer, ...], check: Check) -> Made:
    """The graph of a model that is loaded: of a few layers repeated, or where that is not torch's model, of all."""
    torch_model = load_original(source)
    reference = TorchDecoder(torch_model)
    parameters = {name: tensor.detach().numpy() for name, tensor in torch_model.state_dict(keep_vars=True).items()}
    stack = plan_stack(torch_model, layers)
    if stack is not None:
        try:
            with shortened(torch_model, stack):
                model = _export(torch_model, layers[: stack.traced], source.architecture, parameters)
            repeat_layers(model, stack, parameters)
            return model, check(model, reference=reference, layers=layers), reference
        except (NotStackableError, UnsupportedError):
            pass
    model = _export(torch_model, layers, source.architecture, parameters)
    return model, check(model, reference=reference, layers=layers), reference


def _export(torch_model: Any, layers: tuple[Layer, ...], architecture: str, parameters: Parameters) -> ir.Model:
    """Trace the layers that the model has now, and give the graph the names of ``parameters``."""
    head = DecoderHead(torch_model, layers).eval()
    model = _trace(head, architecture)
    tidy(model, PREFIX, head.output_names, parameters)
    _read_extents_of_ids(model)
    return model


def _trace(head: DecoderHead, architecture: str) -> ir.Model:
    try:
        with torch.no_grad(), adapted(head.model):
            program = torch.onnx.export(
                head,
                _example(head.layers),
                dynamo=True,
                optimize=True,
                opset_version=OPSET,
                input_names=[*INPUTS, *past_names(len(head.layers))],
                dynamic_shapes=_dynamic_shapes(len(head.layers)),
                verbose=False,
            )
    except FAILURES as error:
        raise UnsupportedError(f"{architecture} cannot be exported: {first_line(error)}", REMEDY) from error
    if program is None:
        raise UnsupportedError(f"{architecture} gave no graph", REMEDY)
    model: ir.Model = program.model
    model.ir_version = IR_VERSION
    return model


def _read_extents_of_ids(model: ir.Model) -> None:
    """Take the number of rows from input_ids where the exporter takes it from a KV buffer."""
    ids, buffers = model.graph.inputs[0], set(model.graph.inputs[len(INPUTS) :])
    for node in model.graph:
        if node.op_type == "Shape" and node.inputs[0] in buffers and node.attributes.get_int("end", -1) == 1:
            node.replace_input_with(0, ids)


def _example(layers: tuple[Layer, ...]) -> tuple[Any, ...]:
    shapes = [(_BATCH, layer.kv_heads, _CAPACITY, layer.cache_width) for layer in layers for _ in ("key", "value")]
    return (
        torch.zeros((_BATCH, _SEQUENCE), dtype=torch.int64),
        torch.arange(_SEQUENCE).repeat(_BATCH, 1),
        torch.full((_BATCH,), _SEQUENCE - 1, dtype=torch.int32),
        torch.tensor(_SEQUENCE, dtype=torch.int32),
        torch.zeros((_BATCH, _POSITIONS), dtype=torch.int64),
        [torch.zeros(shape) for shape in shapes],
    )


def _dynamic_shapes(layers: int) -> tuple[Any, ...]:
    batch, sequence, positions, capacity = map(torch.export.Dim, ("batch", "sequence", "positions", "capacity"))
    tokens = {0: batch, 1: sequence}
    return (tokens, tokens, {0: batch}, None, {0: batch, 1: positions}, [{0: batch, 2: capacity}] * (2 * layers))
