"""Make a torch model attend as an export wants it, for the length of a block."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from functools import partial
from types import MethodType
from typing import Any

import torch

from .causal_attention import NAME, attend_in_place


@contextlib.contextmanager
def adapted(model: Any) -> Iterator[None]:
    """Within the block, a transformers model of any age attends by the `causal_attention.Attending` in charge.

    - Models on transformers' attention interface get the implementation `causal_attention.NAME`.
    - The older GPT-Neo, GPT-J and CodeGen compute attention in a method ``_attn`` of their own, which is replaced.
    - Rotary frequencies stay what they are up to the length a model was trained for. transformers changes those of
      ``dynamic`` and ``longrope`` with the length of the text, by control flow that cannot be traced;
      `compiler.processor.context_length` keeps texts shorter than that.
    """
    own = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        model.config._attn_implementation_internal = NAME  # older models ask the config for their masks only
    replaced: list[tuple[torch.nn.Module, str]] = []
    for module in model.modules():
        if _moves(module):
            _replace(module, "forward", MethodType(inspect.unwrap(type(module).forward), module), replaced)
        if callable(getattr(module, "_attn", None)):
            _replace(module, "_attn", partial(_older_attention, module, model.config), replaced)
    try:
        yield
    finally:
        for module, name in replaced:
            delattr(module, name)
        model.config._attn_implementation_internal = own
        model.set_attn_implementation(own)


def _replace(module: torch.nn.Module, name: str, method: Any, replaced: list[tuple[torch.nn.Module, str]]) -> None:
    setattr(module, name, method)
    replaced.append((module, name))


def _moves(module: torch.nn.Module) -> bool:
    kinds = getattr(module, "rope_type", "")
    names = kinds.values() if isinstance(kinds, Mapping) else (kinds,)
    return any("dynamic" in str(name) or name == "longrope" for name in names)


def _older_attention(
    module: Any,
    config: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, None]:
    """What ``_attn`` of GPT-Neo, GPT-J and CodeGen gives: ``[batch, heads, length, width]``."""
    options = {
        "scaling": 1.0 / float(getattr(module, "scale_attn", 1.0)),
        "window": int(config.window_size) if getattr(module, "attention_type", "") == "local" else 0,
    }
    return attend_in_place(module, (query, key, value), attention_mask, options).transpose(1, 2), None
