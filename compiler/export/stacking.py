"""Trace a few layers of a deep model and repeat them: what a tracer does takes seconds for each layer.

Layers are alike where their modules, settings and attention are; all but the first of a kind then give the same nodes,
with other weights. The graph that comes out is held against torch like every other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray

from .causal_attention import Layer
from .decoder_head import past_names, present_names
from .naming import NAME_SCOPES, weights_around

_WORTH = 0.6
"""Share of the layers that is traced at most; else all are."""
_NUMBERS = ("layer_idx", "layer_id")

Parameters = Mapping[str, NDArray[Any]]
Twin = Callable[[ir.TensorProtocol, str, str], ir.TensorProtocol | None]
"""``twin(tensor, path, other)``: the tensor that is of the parameter ``other`` what ``tensor`` is of ``path``; None
where that is a copy, so that nobody knows what was done to it."""


class NotStackableError(ValueError):
    """The graph's layers are not told apart; the message says why."""


@dataclass(frozen=True)
class Stack:
    """The layers of a model, and which of them stand for which.

    Attributes:
        path: Module path of their list.
        templates: For each layer the one whose nodes it repeats: itself for those that are traced, which come first.
        traced: How many are traced.
    """

    path: str
    templates: tuple[int, ...]
    traced: int

    def shortest(self) -> Stack:
        """The first layers only: as many as it takes to have a copy of each template."""
        last = max(self.templates.index(template, self.traced) for template in set(self.templates[self.traced :]))
        return Stack(self.path, self.templates[: last + 1], self.traced)


def plan_stack(model: torch.nn.Module, layers: Sequence[Layer]) -> Stack | None:
    """How to trace ``model`` in part; None where too little would be saved.

    A layer is a template if neither it nor the one before it is the first of its kind: what all layers share is traced
    with the first that needs it.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == len(layers)
    ]
    if len(found) != 1:
        return None
    path, modules = found[0]
    kinds = [_kind(module, layer) for module, layer in zip(modules, layers, strict=True)]
    first = {kind: kinds.index(kind) for kind in kinds}
    usable = [index for index in range(1, len(kinds)) if not {index, index - 1} & set(first.values())]
    template = {kinds[index]: index for index in reversed(usable)}
    if set(kinds) - set(template):
        return None
    traced = max(template.values()) + 1
    if traced > _WORTH * len(kinds):
        return None
    templates = tuple(index if index < traced else template[kind] for index, kind in enumerate(kinds))
    return Stack(path, templates, traced)


def _kind(module: torch.nn.Module, layer: Layer) -> tuple[object, ...]:
    """Equal for layers that give the same nodes."""
    return (layer, *((name, type(part), _settings(part)) for name, part in module.named_modules()))


def _settings(module: torch.nn.Module) -> tuple[object, ...]:
    plain = (int, float, str, bool, tuple, type(None))
    settings = [(key, value) for key, value in vars(module).items() if isinstance(value, plain) and key not in _NUMBERS]
    shapes = [(key, tuple(tensor.shape)) for key, tensor in module.named_parameters(recurse=False)]
    return (repr(sorted(settings, key=lambda item: item[0])), repr(shapes))


@contextlib.contextmanager
def shortened(model: Any, stack: Stack, count: int | None = None) -> Iterator[None]:
    """Within the block, the model has only its first ``count`` layers; those that are traced by default."""
    parent, _, name = stack.path.rpartition(".")
    owner, depth = model.get_submodule(parent), model.config.num_hidden_layers
    whole = getattr(owner, name)
    kept = stack.traced if count is None else count
    setattr(owner, name, whole[:kept])
    model.config.num_hidden_layers = kept
    try:
        yield
    finally:
        setattr(owner, name, whole)
        model.config.num_hidden_layers = depth


def repeat_layers(model: ir.Model, stack: Stack, parameters: Parameters, twin: Twin | None = None) -> None:
    """Give a graph of the traced layers all of them, in place.

    Args:
        model: The graph, its weights named by module path.
        stack: Which layers stand for which.
        parameters: All parameters of the torch model.
        twin: How a weight of the graph becomes that of another layer. None: they share the memory of the parameters.

    Raises:
        NotStackableError: A layer hands on more than its hidden states, or a weight went into a constant.
    """
    twin = partial(_in_memory, parameters) if twin is None else twin
    blocks = [_nodes_of(model, f"{stack.path}.{index}") for index in range(stack.traced)]
    outputs = [_handed_on(model, blocks, index) for index in range(stack.traced)]
    hidden, end = outputs[-1], blocks[-1][-1]
    rest = [(node, place) for node, place in hidden.uses() if node not in blocks[-1]]
    for index in range(stack.traced, len(stack.templates)):
        template = stack.templates[index]
        mapping = {outputs[template - 1]: hidden, **_cache(model, template, index)}
        paths = f"{stack.path}.{template}", f"{stack.path}.{index}"
        copies = _Copies(model, paths, parameters, twin, mapping)
        nodes = [copies.node(node) for node in blocks[template]]
        copies.check_complete()
        model.graph.insert_after(end, nodes)
        hidden = mapping[outputs[template]]
        end = nodes[-1]
        _give_present(model, template, index, mapping)
    for node, place in rest:
        node.replace_input_with(place, hidden)
    model.graph.sort()


def _nodes_of(model: ir.Model, path: str) -> list[ir.Node]:
    marks = (f"'{path}'", f"'{path}.")
    return [node for node in model.graph if any(mark in node.metadata_props.get(NAME_SCOPES, "") for mark in marks)]


def _handed_on(model: ir.Model, blocks: list[list[ir.Node]], index: int) -> ir.Value:
    """The hidden states that a layer gives to the next, or the last one to what follows."""
    block = set(blocks[index])
    following = set(blocks[index + 1]) if index + 1 < len(blocks) else set()
    found = {
        value
        for node in blocks[index]
        for value in node.outputs
        for user in value.consumers()
        if user not in block and (user in following or not following)
    }
    if index == 0 and len(found) != 1:
        return next(iter(found))  # shared values too: the first layer is never the one before a template
    if len(found) != 1:
        raise NotStackableError(f"layer {index} hands on {len(found)} values")
    return found.pop()


def _cache(model: ir.Model, template: int, index: int) -> dict[ir.Value, ir.Value]:
    """New graph inputs for the KV cache of a layer, by those of its template."""
    inputs = {value.name: value for value in model.graph.inputs}
    names = past_names(index + 1)
    new = {}
    for old, name in zip(names[2 * template : 2 * template + 2], names[-2:], strict=True):
        value = ir.Value(name=name, shape=inputs[old].shape, type=inputs[old].type)
        model.graph.inputs.append(value)
        new[inputs[old]] = value
    return new


def _give_present(model: ir.Model, template: int, index: int, mapping: Mapping[ir.Value, ir.Value]) -> None:
    outputs = {value.name: value for value in model.graph.outputs}
    names = present_names(index + 1)
    for old, name in zip(names[2 * template : 2 * template + 2], names[-2:], strict=True):
        value = mapping[outputs[old]]
        value.name = name
        model.graph.outputs.append(value)


class _Copies:
    """Copies of a template's nodes with the weights of another layer."""

    def __init__(
        self,
        model: ir.Model,
        paths: tuple[str, str],
        parameters: Parameters,
        twin: Twin,
        mapping: dict[ir.Value, ir.Value],
    ) -> None:
        self._model = model
        self._old, self._new = paths
        self._parameters = parameters
        self._twin = twin
        self._mapping = mapping
        self._needed = {name for name in parameters if name.startswith(f"{self._old}.")}

    def node(self, node: ir.Node) -> ir.Node:
        copy = ir.Node(
            node.domain,
            node.op_type,
            [self._value(value, node) for value in node.inputs],
            list(node.attributes.values()),
            overload=node.overload,
            num_outputs=len(node.outputs),
            version=node.version,
            name=f"{node.name}_{self._new}",
        )
        scopes = node.metadata_props.get(NAME_SCOPES, "")
        copy.metadata_props[NAME_SCOPES] = scopes.replace(f"'{self._old}'", f"'{self._new}'").replace(
            f"'{self._old}.", f"'{self._new}."
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            new.name, new.shape, new.type = f"{old.name}_{self._new}", old.shape, old.type
            self._mapping[old] = new
        return copy

    def check_complete(self) -> None:
        """Raises NotStackableError where a parameter of the template is read under no name of its own."""
        if self._needed:
            raise NotStackableError(f"{min(self._needed)} went into a constant")

    def _value(self, value: ir.Value | None, node: ir.Node) -> ir.Value | None:
        if value is None or value in self._mapping:
            return None if value is None else self._mapping[value]
        name = str(value.name)
        if not value.is_initializer():
            return value
        if not name.startswith(f"{self._old}."):
            return self._raised(value, node)
        self._needed.discard(name)
        path = self._new + name.removeprefix(self._old)
        new = self._model.graph.initializers.get(path) or self._weight(value, path)
        self._mapping[value] = new
        return new

    def _raised(self, value: ir.Value, node: ir.Node) -> ir.Value:
        """A constant, which may be a scale that is stored less 1, as Gemma's norms store it."""
        if value.const_value is None or len(value.const_value.shape) != 1:
            return value
        for name in weights_around(node, self._parameters):
            path = self._new + name.removeprefix(self._old)
            if name in self._needed and np.array_equal(value.const_value.numpy(), 1.0 + self._parameters[name]):
                self._needed.discard(name)
                array = 1.0 + self._parameters[path]
                new = ir.val(f"{value.name}_{self._new}", const_value=ir.Tensor(array.astype(np.float32)))
                self._model.graph.register_initializer(new)
                self._mapping[value] = new
                return new
        return value

    def _weight(self, value: ir.Value, path: str) -> ir.Value:
        name = str(value.name)
        if value.const_value is None or name not in self._parameters or path not in self._parameters:
            raise NotStackableError(f"{name} is no parameter")
        tensor = self._twin(value.const_value, name, path)
        if tensor is None:
            raise NotStackableError(f"{name} is a copy")
        new = ir.val(path, const_value=tensor)
        self._model.graph.register_initializer(new)
        return new


def _in_memory(parameters: Parameters, tensor: ir.TensorProtocol, path: str, other: str) -> ir.TensorProtocol | None:
    stored, own, array = tensor.numpy(), parameters[path], parameters[other]
    if not np.shares_memory(stored, own):
        return None
    transposed = stored.strides != own.strides or stored.shape != own.shape
    return ir.Tensor(array.T if transposed else array, name=other)
