"""The sentence encoder as a torch module, for the peers that start from one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from protocol import Ids, Tokenized, Vectors


class SentenceEncoder(torch.nn.Module):
    """Ids and mask, int64 [n, length], to mean-pooled vectors of length 1, float32 [n, d]."""

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """The vectors."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9), dim=-1)


def sentence_encoder(model: Path, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> SentenceEncoder:
    """The model of a sentence-transformers folder, ready for inference."""
    from transformers import AutoModel

    encoder = AutoModel.from_pretrained(model, attn_implementation=attention, dtype=dtype)
    return SentenceEncoder(encoder).eval()


class TorchSetting(Tokenized):
    """A module, called without gradients."""

    def __init__(self, model: Path, module: Any) -> None:
        super().__init__(model)
        self._module = module

    def vectors(self, ids: Ids, mask: Ids) -> Vectors:
        """See `Setting.vectors`."""
        with torch.inference_mode():
            found: Vectors = self._module(torch.from_numpy(ids), torch.from_numpy(mask)).numpy()
        return found
