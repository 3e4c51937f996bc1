"""What the attention of a language model asks for, found by running it without weights."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers

from artifacts.errors import SourceError, UnsupportedError

from ..decoders import named_refusal
from ..quiet import quiet
from .adapting import adapted
from .causal_attention import Layer, MaskFunction, Options, States, attending, layer_index
from .failures import LOADING_FAILURES, first_line

REMEDY = "Export it to ONNX by other means and pass the .onnx file"
_LENGTH = 5  # tokens of the survey's run
_KNOWN_TENSORS = ("position_ids", "cache_position", "position_embeddings", "s_aux")
_LONGEST = 1 << 20  # tokens: masks are asked no further


class SurveyRefusedError(ValueError):
    """A model asks for attention that GroupQueryAttention does not express."""


def decoder_refusal(config: Mapping[str, object], architecture: str) -> str:
    """Why a language model cannot be compiled, told from its config alone: weights are never read.

    Args:
        config: Content of config.json.
        architecture: Name of its class in transformers.

    Returns:
        One line; empty where nothing speaks against it.
    """
    if reason := named_refusal(config):
        return f"{architecture} {reason}"
    with quiet():
        try:
            options = {key: value for key, value in config.items() if key != "model_type"}
            complete = transformers.AutoConfig.for_model(str(config.get("model_type")), **options)
        except LOADING_FAILURES as error:
            return f"config.json makes no {architecture}: {first_line(error)}"
    try:
        survey(complete, architecture)
    except SourceError as error:
        return error.what
    return ""


def survey(config: Any, architecture: str) -> tuple[Layer, ...]:
    """What the attention of each layer asks for, noted while the architecture runs on torch's meta device.

    Args:
        config: A transformers.PreTrainedConfig.
        architecture: Name of the class.

    Raises:
        UnsupportedError: GroupQueryAttention does not express it, or the architecture is no causal decoder.
        SourceError: The config is of another architecture.
    """
    if reason := named_refusal(config.to_dict()):
        raise UnsupportedError(f"{architecture} {reason}", REMEDY)
    notes = _Notes(min(int(getattr(config, "max_position_embeddings", 0) or _LENGTH), _LONGEST))
    try:
        with attending(notes):
            _run(config, architecture, adapted)
    except SurveyRefusedError as error:
        raise UnsupportedError(f"{architecture} {error}", REMEDY) from error
    except LOADING_FAILURES as error:
        raise _failure(config, architecture, error) from error
    count = int(config.num_hidden_layers)
    if sorted(notes.layers) != list(range(count)):
        what = f"uses transformers' attention interface in {len(notes.layers)} of {count} layers"
        raise UnsupportedError(f"{architecture} {what}", REMEDY)
    return tuple(notes.layers[index] for index in range(count))


def _run(config: Any, architecture: str, changed: Callable[[Any], contextlib.AbstractContextManager[None]]) -> None:
    """Run the architecture, with no weights, changed for the while."""
    with quiet(), torch.device("meta"), torch.no_grad():
        model = _without_weights(config, architecture)
        ids = torch.zeros((2, _LENGTH), dtype=torch.int64)
        with changed(model):
            model(input_ids=ids, attention_mask=ids + 1, position_ids=ids, use_cache=False)


def _failure(config: Any, architecture: str, error: BaseException) -> SourceError:
    """Whose fault an error of the survey is: the attention's, where the architecture runs with its own."""
    try:
        _run(config, architecture, lambda _: contextlib.nullcontext())
    except LOADING_FAILURES:
        stated, own = str(config.model_type), _model_type(architecture)
        if own not in ("", stated):
            what = f"architectures and model_type of config.json do not belong together: {architecture} is of {own}"
            return SourceError(f"{what}, not of {stated}", "Put the config.json of the weights beside them")
        return UnsupportedError(f"{architecture} does not run by its config: {first_line(error)}", REMEDY)
    return UnsupportedError(f"{architecture} does not use transformers' attention interface", REMEDY)


def _model_type(architecture: str) -> str:
    """The model_type that an architecture is made for; empty where its class does not say."""
    return str(getattr(getattr(transformers, architecture).config_class, "model_type", ""))


def _without_weights(config: Any, architecture: str) -> Any:
    kind = getattr(transformers, architecture)
    if "position_ids" not in inspect.signature(kind.forward).parameters:
        raise SurveyRefusedError("takes no position_ids")
    if getattr(kind, "_is_stateful", False):
        raise SurveyRefusedError("carries a state beside the KV cache")
    model = kind._from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    experts = next((type(module).__name__ for module in model.modules() if "Experts" in type(module).__name__), "")
    if experts:
        raise SurveyRefusedError(f"is a mixture of experts ({experts})")
    if not isinstance(model.get_output_embeddings(), torch.nn.Linear):
        raise SurveyRefusedError("has no linear head over its vocabulary")
    return model


class _Notes:
    """Attends to nothing and notes what was asked."""

    def __init__(self, longest: int) -> None:
        self._longest = longest
        self.layers: dict[int, Layer] = {}

    def mask(self, function: MaskFunction) -> torch.Tensor:
        """An empty tensor whose first extent tells the window: ``[window + 1, 1, 1, 0]``."""
        return torch.empty(_window(function, self._longest) + 1, 1, 1, 0)

    def attend(
        self, module: torch.nn.Module, states: States, mask: torch.Tensor | None, options: Options
    ) -> torch.Tensor:
        """Note the layer; an output of the right shape."""
        query, key, value = states
        index = layer_index(module)
        if index is None:
            raise SurveyRefusedError("does not number its attention layers")
        if index in self.layers:
            raise SurveyRefusedError(f"attends more than once in layer {index}")
        _check_options(options)
        if mask is None or tuple(mask.shape[1:]) != (1, 1, 0):
            raise SurveyRefusedError("makes attention masks of its own")
        if value.shape != key.shape or key.shape[3] != query.shape[3]:
            raise SurveyRefusedError("has keys, values and queries of different widths")
        if query.shape[1] % key.shape[1] or key.shape[2] != query.shape[2]:
            raise SurveyRefusedError("has keys that are not those of its own tokens")
        width = query.shape[3]
        scaling = options.get("scaling")
        self.layers[index] = Layer(
            heads=query.shape[1],
            kv_heads=key.shape[1],
            width=width,
            scale=float(width**-0.5 if scaling is None else scaling),
            softcap=float(options.get("softcap") or 0.0),
            window=options.get("window") or mask.shape[0] - 1,
            sinks=options.get("s_aux") is not None,
        )
        return query.transpose(1, 2)


def _check_options(options: Options) -> None:
    if options.get("is_causal") is False:
        raise SurveyRefusedError("has attention that is not causal")
    for name, option in options.items():
        tensors = option if isinstance(option, tuple) else (option,)
        if name not in _KNOWN_TENSORS and any(isinstance(tensor, torch.Tensor) for tensor in tensors):
            raise SurveyRefusedError(f"gives attention a {name}")


def _window(function: MaskFunction, longest: int) -> int:
    """Keys that a query sees, its own among them; 0: all before it."""
    with torch.device("cpu"):
        keys = torch.arange(longest)
        zero = torch.zeros((), dtype=torch.int64)
        queries = sorted({0, 1, longest // 3, longest // 2, longest // 2 + 1, longest - 1} & set(range(longest)))
        rows = [function(zero, zero, torch.tensor(query), keys).expand(longest) for query in queries]
    size = int(rows[-1].sum())
    for query, row in zip(queries, rows, strict=True):
        if not torch.equal(row, (keys <= query) & (keys > query - size)):
            raise SurveyRefusedError("has an attention mask that is neither causal nor a sliding window")
    return 0 if size == longest else size
