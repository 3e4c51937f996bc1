"""One wrapper module for each task: named tensors in, the tensors the runtime reads out."""

from __future__ import annotations

import torch

from ..source import Pooling

PREFIX = "model"
"""Attribute of a wrapper that holds the original model; dropped from module paths after the export."""


class Head(torch.nn.Module):
    """Base: calls the original model.

    Attributes:
        output_names: Names of what forward returns, in order.
    """

    output_names: tuple[str, ...] = ("logits",)

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, token_type_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Outputs for ids and masks ``[batch, sequence] int64``."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            inputs["token_type_ids"] = token_type_ids
        output = self.model(**inputs, return_dict=True)
        return self.select(output, attention_mask)

    def select(self, output: dict[str, torch.Tensor], attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tensors named by ``output_names``."""
        return (output["logits"],)


class SpanHead(Head):
    """Question answering: start_logits and end_logits ``[batch, sequence]``."""

    output_names = ("start_logits", "end_logits")

    def select(self, output: dict[str, torch.Tensor], attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The logits of first and last token of the answer."""
        return output["start_logits"], output["end_logits"]


class TokenVectors(Head):
    """Feature extraction without pooling: last_hidden_state ``[batch, sequence, width]``."""

    output_names = ("last_hidden_state",)

    def select(self, output: dict[str, torch.Tensor], attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The token vectors."""
        return (output["last_hidden_state"],)


class TextVector(Head):
    """Feature extraction with pooling: sentence_embedding ``[batch, width]``."""

    output_names = ("sentence_embedding",)

    def __init__(self, model: torch.nn.Module, pooling: Pooling) -> None:
        super().__init__(model)
        self.pooling = pooling

    def select(self, output: dict[str, torch.Tensor], attention_mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The pooled vector, of length 1 where the model normalizes; a text without any token gives finite numbers."""
        hidden = output["last_hidden_state"]
        mask = attention_mask.unsqueeze(-1)
        if self.pooling.mode == "cls":
            vector = hidden[:, 0]
        elif self.pooling.mode == "max":
            vector = hidden.masked_fill(mask == 0, -1e9).amax(1)
        else:
            weight = mask.to(hidden.dtype)
            vector = (hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9)
        return (torch.nn.functional.normalize(vector, dim=-1) if self.pooling.normalize else vector,)


def wrap(model: torch.nn.Module, task: str, pooling: Pooling | None) -> Head:
    """The wrapper for the task."""
    if task == "feature-extraction":
        pooling = pooling or Pooling()
        return TokenVectors(model) if pooling.mode == "none" else TextVector(model, pooling)
    return SpanHead(model) if task == "question-answering" else Head(model)
