"""One wrapper module for a language model: a graph for prefill and decode, and the same model as torch runs it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from artifacts.errors import UnsupportedError
from artifacts.signature import STEP_INPUTS, cache_names

from ..quiet import quiet
from .causal_attention import Emitter, Layer, attending
from .exported import Arrays

Select = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
INPUTS = tuple(name for name, _, _ in STEP_INPUTS)


def past_names(layers: int) -> tuple[str, ...]:
    """Inputs of the KV cache, in order."""
    return tuple(past for layer in range(layers) for past, _ in cache_names(layer))


def present_names(layers: int) -> tuple[str, ...]:
    """Outputs of the KV cache, in order."""
    return tuple(present for layer in range(layers) for _, present in cache_names(layer))


class DecoderHead(torch.nn.Module):
    """Calls the original model, of the attention implementation `causal_attention.NAME`.

    Attributes:
        output_names: Names of what forward returns, in order.
    """

    def __init__(self, model: Any, layers: Sequence[Layer]) -> None:
        super().__init__()
        self.model = model
        self.layers = tuple(layers)
        self.output_names = ("logits", *present_names(len(layers)))

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        seqlens_k: torch.Tensor,
        total_sequence_length: torch.Tensor,
        logits_index: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """Logits ``[batch, positions, vocabulary]`` and the KV cache after the call.

        Args:
            input_ids: ``[batch, sequence] int64``, padded on the right.
            position_ids: ``[batch, sequence] int64``.
            seqlens_k: ``[batch] int32``: tokens of a row, those of this call included, minus 1.
            total_sequence_length: ``[] int32``: most tokens of a row; ``sequence`` for a prompt.
            logits_index: ``[batch, positions] int64``: which of ``sequence`` get logits.
            past: Key and value of each layer in turn, ``[batch, kv_heads, capacity, width] float32``.
        """
        emitter = Emitter(self.layers, past, seqlens_k, total_sequence_length)
        with attending(emitter), selected(self.model, logits_index, _gather_nd):
            logits = self.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).logits
        present = [tensor for tensor in emitter.present if tensor is not None]
        return (logits, *present)


class TorchDecoder:
    """The original torch model with the attention of its own source file, in float32."""

    def __init__(self, model: Any) -> None:
        """A transformers.PreTrainedModel that has a linear head over its vocabulary."""
        self._model = model

    def __call__(self, feeds: Mapping[str, NDArray[np.generic]]) -> Arrays:
        """``{"logits": [batch, positions, vocabulary] float32}`` for the feeds of a prefill.

        Args:
            feeds: Those of the graph; the KV cache is not read: rows begin at their first token. Rows are padded on
                the right and as long as seqlens_k says.
        """
        tensors = {name: torch.from_numpy(np.ascontiguousarray(feeds[name])) for name in INPUTS}
        ids, lengths = tensors["input_ids"], tensors["seqlens_k"].to(torch.int64) + 1
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).to(torch.int64)
        with torch.inference_mode(), quiet(), selected(self._model, tensors["logits_index"], _take):
            logits = self._model(
                input_ids=ids, attention_mask=mask, position_ids=tensors["position_ids"], use_cache=False
            ).logits
        return {"logits": logits.float().numpy()}


@contextlib.contextmanager
def selected(model: Any, index: torch.Tensor, select: Select) -> Iterator[None]:
    """Within the block, the head over the vocabulary sees the positions in ``index`` only.

    Raises:
        UnsupportedError: The model does not call its head exactly once.
    """
    calls = 0

    def before(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        nonlocal calls
        calls += 1
        return (select(args[0], index), *args[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()
    if calls != 1:
        raise UnsupportedError(f"{type(model).__name__} calls its head over the vocabulary {calls} times")


def _take(hidden: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows ``index [batch, positions]`` of hidden states ``[batch, sequence, width]``."""
    return hidden[torch.arange(hidden.shape[0])[:, None], index]


def _gather_nd(hidden: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The same as an operator of its own."""
    return torch.onnx.ops.symbolic(
        "GatherND",
        (hidden, index.unsqueeze(-1)),
        {"batch_dims": 1},
        dtype=hidden.dtype,
        shape=(hidden.shape[0], index.shape[1], hidden.shape[2]),
    )
