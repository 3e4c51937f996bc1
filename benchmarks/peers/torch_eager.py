"""PyTorch as it comes: eager, float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from protocol import Peer, Server, Setting, serve
from torch_encoder import TorchSetting, sentence_encoder


class TorchEager(Peer):
    """See the module."""

    packages = ("torch", "transformers")

    def load(self, model: Path, texts: Sequence[str], work: Path) -> Mapping[str, Callable[[], Setting]]:
        """Both attention implementations."""
        return {
            "sdpa": lambda: TorchSetting(model, sentence_encoder(model, "sdpa")),
            "eager attention": lambda: TorchSetting(model, sentence_encoder(model, "eager")),
        }


if __name__ == "__main__":
    serve(Server(TorchEager()))
