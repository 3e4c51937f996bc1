"""LoRA adapters: what training left in a PEFT folder, made part of a bundle without compiling its base again."""

from __future__ import annotations

from .bundled import Added, add_adapter, remove_adapter

__all__ = ["Added", "add_adapter", "remove_adapter"]
