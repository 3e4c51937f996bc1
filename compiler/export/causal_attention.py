"""Causal attention emitted as com.microsoft::GroupQueryAttention through transformers' attention interface.

Registered under the name `NAME`. What happens in place of attention is up to the `Attending` in charge: the survey
notes what each layer asks for, the emitter emits the operator. The masks of transformers are never built: the operator
makes its own from seqlens_k and local_window_size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "hasten_causal"
HEAD_MULTIPLE = 8
"""ONNX Runtime takes heads whose width is a multiple of this; others are padded with zeros, which changes nothing."""

MaskFunction = Callable[..., torch.Tensor]
States = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
Options = Mapping[str, Any]


@dataclass(frozen=True)
class Layer:
    """What one layer's attention asks for.

    Attributes:
        heads: Heads of the queries.
        kv_heads: Heads of keys and values.
        width: Of a head.
        scale: Factor of the scores.
        softcap: ``c`` of ``c tanh(score / c)``; 0: none.
        window: Keys that a query sees, its own among them; 0: all before it.
        sinks: Each head adds a learned score to the denominator of its softmax.
    """

    heads: int
    kv_heads: int
    width: int
    scale: float
    softcap: float
    window: int
    sinks: bool

    @property
    def cache_width(self) -> int:
        """Width of a head in the KV cache: a multiple of `HEAD_MULTIPLE`."""
        return -(-self.width // HEAD_MULTIPLE) * HEAD_MULTIPLE


class Attending(Protocol):
    """Stands in for attention and masks."""

    def mask(self, function: MaskFunction) -> torch.Tensor | None:
        """What the layers get as their attention mask, for a mask function of transformers."""

    def attend(
        self, module: torch.nn.Module, states: States, mask: torch.Tensor | None, options: Options
    ) -> torch.Tensor:
        """Output ``[batch, length, heads, width]`` for queries, keys, values ``[batch, heads, length, width]``."""


_in_charge: ContextVar[Attending] = ContextVar("hasten_attending")


@contextlib.contextmanager
def attending(one: Attending) -> Iterator[None]:
    """Within the block, models of the attention implementation `NAME` attend by ``one``."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _mask)
    token = _in_charge.set(one)
    try:
        yield
    finally:
        _in_charge.reset(token)


def attend_in_place(
    module: torch.nn.Module, states: States, mask: torch.Tensor | None, options: Options
) -> torch.Tensor:
    """`Attending.attend` of the one in charge."""
    return _in_charge.get().attend(module, states, mask, options)


def layer_index(module: Any) -> int | None:
    """Number of the layer that an attention module stands in; None if it does not know."""
    index = getattr(module, "layer_idx", getattr(module, "layer_id", None))
    return index if isinstance(index, int) else None


def _mask(*, mask_function: MaskFunction, **options: Any) -> torch.Tensor | None:
    return _in_charge.get().mask(mask_function)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    return attend_in_place(module, (query, key, value), attention_mask, options), None


class Emitter:
    """Emits the operator.

    Attributes:
        present: Key and value cache of each layer after its attention, in the order of ``past``.
    """

    def __init__(
        self, layers: Sequence[Layer], past: Sequence[torch.Tensor], seqlens_k: torch.Tensor, total: torch.Tensor
    ) -> None:
        """Past is key, value of layer 0, key, value of layer 1 …, each ``[batch, kv_heads, capacity, width]``."""
        self._layers = layers
        self._past = past
        self._lengths = (seqlens_k, total)
        self.present: list[torch.Tensor | None] = [None] * len(past)

    def mask(self, function: MaskFunction) -> torch.Tensor | None:
        """None: the operator makes its own."""
        return None

    def attend(
        self, module: torch.nn.Module, states: States, mask: torch.Tensor | None, options: Options
    ) -> torch.Tensor:
        """Emit GroupQueryAttention for the layer that ``module`` names."""
        index = layer_index(module) or 0
        layer = self._layers[index]
        batch, _, length, _ = states[0].shape
        past = self._past[2 * index : 2 * index + 2]
        inputs: list[torch.Tensor | None] = [*(_merge(state, layer) for state in states), *past, *self._lengths]
        if layer.sinks:
            inputs += [None, None, None, None, options["s_aux"].reshape(-1)]  # after the rotary caches, positions, bias
        attributes: dict[str, Any] = {
            "num_heads": layer.heads,
            "kv_num_heads": layer.kv_heads,
            "scale": layer.scale,
        }
        attributes |= {"softcap": layer.softcap} if layer.softcap else {}
        attributes |= {"local_window_size": layer.window} if layer.window else {}
        output, *present = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            inputs,
            attributes,
            dtypes=(states[0].dtype, past[0].dtype, past[1].dtype),
            shapes=((batch, length, layer.heads * layer.cache_width), past[0].shape, past[1].shape),
            version=1,
        )
        self.present[2 * index : 2 * index + 2] = present
        return output.reshape(batch, length, layer.heads, layer.cache_width)[..., : layer.width]


def _merge(state: torch.Tensor, layer: Layer) -> torch.Tensor:
    """``[batch, heads, length, width]`` as ``[batch, length, heads * cache_width]``."""
    batch, heads, length, width = state.shape
    state = state.transpose(1, 2)
    if layer.cache_width != width:
        state = torch.nn.functional.pad(state, (0, layer.cache_width - width))
    return state.reshape(batch, length, heads * layer.cache_width)
