"""Attention emitted as com.microsoft::MultiHeadAttention through transformers' attention interface.

Fusion then follows the module structure and does not depend on matching node chains. Registered under the name `NAME`:

- the mask function hands a plain padding mask through as ``[batch, keys] int32`` (the operator's key_padding_mask) and
  turns every other mask (sliding windows, causal) into ``[batch, 1, queries, keys] float32`` (its attention_bias);
- the attention function emits the operator, which takes ``[batch, length, heads * width]``.

Masked keys get -10000 in both forms, which ONNX Runtime uses for key_padding_mask: exp(-10000) is 0 in every float
type, and a row whose keys are all masked stays finite.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, bidirectional_mask_function, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAME = "hasten"
MASKED = -10000.0


class AttentionRefusedError(ValueError):
    """The attention of this model has a form that the operator cannot express."""


def register() -> None:
    """Make `NAME` an attention implementation of transformers. Again is fine."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, _attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, _mask)


def _mask(
    *,
    mask_function: Callable[..., object],
    attention_mask: torch.Tensor | None = None,
    q_length: int,
    kv_length: int,
    **options: Any,
) -> torch.Tensor | None:
    if mask_function is bidirectional_mask_function:
        return None if attention_mask is None else attention_mask.to(torch.int32)
    options |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    allowed = sdpa_mask(
        mask_function=mask_function,
        attention_mask=attention_mask,
        q_length=q_length,
        kv_length=kv_length,
        **options,
    )
    return torch.where(allowed, torch.zeros((), dtype=torch.float32), MASKED)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: object,
) -> tuple[torch.Tensor, None]:
    """Query, key and value are ``[batch, heads, length, width]``; the result is ``[batch, length, heads, width]``."""
    for name in ("position_bias", "s_aux", "softcap"):
        if options.get(name) is not None:
            raise AttentionRefusedError(f"it has {name}")
    batch, heads, length, width = query.shape
    if key.shape[1] != heads or value.shape[3] != width:
        raise AttentionRefusedError("its keys have other heads or widths than its queries")
    plain = attention_mask is None or attention_mask.ndim == 2
    inputs: list[torch.Tensor | None] = [_merge(query), _merge(key), _merge(value), None]
    inputs += [attention_mask] if plain else [None, attention_mask]
    while inputs[-1] is None:
        inputs.pop()
    output = torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        inputs,
        {"num_heads": heads, "scale": float(width**-0.5 if scaling is None else scaling)},
        dtype=query.dtype,
        shape=(batch, length, heads * width),
        version=1,
    )
    return output.reshape(batch, length, heads, width), None


def _merge(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.transpose(1, 2).reshape(tensor.shape[0], tensor.shape[2], -1)
