"""transformers in torch, float32 and bfloat16, with its static or dynamic cache as `generate` uses them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from decoder_protocol import DecoderPeer, DecoderServer, DecoderSetting
from protocol import Ids, cores, serve


class Transformers(DecoderPeer):
    """See the module."""

    packages = ("transformers", "torch")

    def load(self, model: Path, texts: Sequence[str], work: Path) -> Mapping[str, Callable[[], DecoderSetting]]:
        """Both precisions."""
        return {dtype: partial(Loaded, model, dtype) for dtype in ("float32", "bfloat16")}

    def vocabulary(self, model: Path) -> int:
        """See `DecoderPeer.vocabulary`."""
        return int(json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"])


class Loaded(DecoderSetting):
    """A model in torch."""

    batches = (1, 8)

    def __init__(self, folder: Path, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(cores())
        self._torch = torch
        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self._cache: Any = None
        self._next: Any = None

    def prefill(self, ids: Ids) -> None:
        """See `DecoderSetting.prefill`."""
        self._cache = None
        self._forward(self._torch.from_numpy(ids))

    def step(self) -> None:
        """See `DecoderSetting.step`."""
        self._forward(self._next)

    def _forward(self, ids: Any) -> None:
        with self._torch.inference_mode():
            done = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = done.past_key_values
        self._next = done.logits[:, -1].argmax(-1, keepdim=True)


if __name__ == "__main__":
    serve(DecoderServer(Transformers()))
