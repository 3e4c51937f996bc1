"""A torch model whose weights stay in their files: each module reads its own when it runs, and lets go of them.

What is compared with torch needs torch's answers, and not all of its weights at once: the largest module, its numbers
and its inputs are enough.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import transformers
from numpy.typing import NDArray
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers.conversion_mapping import get_model_conversion_mapping

from ..source import ModelSource
from ..stored_weights import Floats, StoredWeights, WeightTensor, open_weights
from .decoder_head import TorchDecoder
from .exported import Arrays

LARGE = 1 << 28
"""Parameters from which on a model is streamed: 1 GiB in float32. Below, loading it is quicker."""


class StreamedModel(Mapping[str, Floats]):
    """The model; and its parameters by module path, each read when asked for.

    Attributes:
        model: A transformers.PreTrainedModel in float32: its buffers are there, its parameters are not (device meta).
    """

    def __init__(self, model: Any, weights: StoredWeights, places: Mapping[str, str]) -> None:
        """``places``: name in the checkpoint of each parameter; tied ones share theirs."""
        self.model = model
        self._weights = weights
        self._places = dict(places)

    def __getitem__(self, path: str) -> Floats:
        return self._weights.floats(self._places[path])

    def __contains__(self, path: object) -> bool:
        return path in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def reference(self, feeds: Mapping[str, NDArray[np.generic]]) -> Arrays:
        """What `TorchDecoder` gives, with the weights of one module in memory at a time."""
        with self._streaming():
            return TorchDecoder(self.model)(feeds)

    @contextlib.contextmanager
    def resident(self) -> Iterator[Mapping[str, Floats]]:
        """Within the block, the parameters of all modules that the model has now are in memory: by path, shared."""
        held: dict[str, torch.nn.Parameter] = {}
        found: dict[str, Floats] = {}
        taken: list[tuple[torch.nn.Module, str, torch.nn.Parameter]] = []
        for path, module, slot, parameter in self._slots():
            place = self._places[path]
            if place not in held:
                held[place] = self._parameter(place)
            taken.append((module, slot, parameter))
            module._parameters[slot] = held[place]
            found[path] = held[place].detach().numpy()
        try:
            yield found
        finally:
            for module, slot, parameter in taken:
                module._parameters[slot] = parameter
            found.clear()
            for parameter in held.values():
                parameter.data = torch.empty(0)  # torch's tracer keeps the parameters that it has seen

    def defer(self, graph: ir.Model, resident: Mapping[str, Floats]) -> None:
        """Let initializers that share the memory of resident parameters be read from the checkpoint instead."""
        for value in graph.graph.initializers.values():
            path, tensor = str(value.name), value.const_value
            if tensor is None or path not in resident:
                continue
            array, own = tensor.numpy(), resident[path]
            if array.dtype != own.dtype or not np.shares_memory(array, own):
                continue
            transposed = array.strides != own.strides or array.shape != own.shape
            if np.array_equal(array.shape, own.shape[:: -1 if transposed else 1]):
                value.const_value = self._weights.tensor(self._places[path], path, transposed=transposed)

    def twin(self, tensor: ir.TensorProtocol, path: str, other: str) -> ir.TensorProtocol | None:
        """The tensor of the parameter ``other``, laid out as ``tensor`` is of the parameter ``path``.

        None where it is a copy: what was done to it is not known.
        """
        if isinstance(tensor, WeightTensor):
            return self._weights.tensor(self._places[other], other, transposed=tensor.transposed)
        array, own = tensor.numpy(), self[path]
        for transposed in (False, True):
            if np.array_equal(array, own.T if transposed else own):
                return self._weights.tensor(self._places[other], other, transposed=transposed)
        return None

    @contextlib.contextmanager
    def _streaming(self) -> Iterator[None]:
        """Within the block, each module takes its own parameters before it runs, and gives them back."""
        slots: defaultdict[torch.nn.Module, list[tuple[str, str, torch.nn.Parameter]]] = defaultdict(list)
        for path, module, slot, parameter in self._slots():
            slots[module].append((self._places[path], slot, parameter))
        handles = []
        for module, own in slots.items():
            handles.append(module.register_forward_pre_hook(partial(self._take, own)))
            handles.append(module.register_forward_hook(partial(_give_back, own), always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _slots(self) -> Iterator[tuple[str, torch.nn.Module, str, torch.nn.Parameter]]:
        """(path, module, name in it, parameter) of all parameters that are not there."""
        for prefix, module in self.model.named_modules():
            for slot, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta:
                    yield f"{prefix}.{slot}".removeprefix("."), module, slot, parameter

    def _take(self, own: list[tuple[str, str, torch.nn.Parameter]], module: torch.nn.Module, args: object) -> None:
        for place, slot, _ in own:
            module._parameters[slot] = self._parameter(place)

    def _parameter(self, place: str) -> torch.nn.Parameter:
        return torch.nn.Parameter(torch.from_numpy(self._weights.floats(place)), requires_grad=False)


def stream_model(source: ModelSource, config: Any) -> StreamedModel | None:
    """The model of a large checkpoint.

    Args:
        source: The Hugging Face folder.
        config: Its config.

    Returns:
        None for a small model; and where the checkpoint is not the model's parameters one for one, by their names, in
        safetensors: transformers knows what to do then, and what to say of tensors that are missing, unknown or of
        another shape.

    Raises:
        SourceError: A file of the checkpoint is missing or not whole.
    """
    weights = open_weights(source.path)
    if weights is None or weights.size < LARGE:
        return None
    with _parameters_left_out():
        kind = getattr(transformers, source.architecture)
        model = kind._from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    places = _places(model, weights)
    return None if places is None else StreamedModel(model, weights, places)


def _places(model: Any, weights: StoredWeights) -> dict[str, str] | None:
    """Name in the checkpoint of each parameter; None where they are not one for one."""
    groups: defaultdict[int, list[str]] = defaultdict(list)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for path, parameter in parameters.items():
        groups[id(parameter)].append(path)
    if set(model.state_dict()) - set(parameters) or set(weights) - set(parameters):
        return None
    conversions = get_model_conversion_mapping(model, add_legacy=False)
    if any(conversion.compiled_sources.search(name) for conversion in conversions for name in weights):
        return None
    places: dict[str, str] = {}
    for paths in groups.values():
        present = [path for path in paths if path in weights]
        if len(present) != 1 or weights[present[0]].shape != tuple(parameters[present[0]].shape):
            return None
        places |= dict.fromkeys(paths, present[0])
    return places


@contextlib.contextmanager
def _parameters_left_out() -> Iterator[None]:
    """Within the block, modules that are made have their parameters on the device meta, and their buffers as ever."""

    def left_out(_: torch.nn.Module, name: str, parameter: torch.nn.Parameter) -> torch.nn.Parameter:
        return parameter if parameter.is_meta else torch.nn.Parameter(parameter.to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(left_out)  # type: ignore[arg-type]  # what it gives counts
    try:
        yield
    finally:
        handle.remove()


def _give_back(
    own: list[tuple[str, str, torch.nn.Parameter]], module: torch.nn.Module, args: object, output: object
) -> None:
    for _, slot, parameter in own:
        module._parameters[slot] = parameter
