"""sentence-transformers on its torch backend, float32 and bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from protocol import Peer, Server, Setting, serve
from sentence_encoder import Encoder


class SentenceTransformersTorch(Peer):
    """See the module."""

    packages = ("sentence-transformers", "torch", "transformers")

    def load(self, model: Path, texts: Sequence[str], work: Path) -> Mapping[str, Callable[[], Setting]]:
        """Its default, and bfloat16 as its documentation of efficiency advises."""
        return {name: partial(build, model, name) for name in ("float32", "bfloat16")}


def build(model: Path, precision: str) -> Setting:
    """The model in that precision."""
    import torch
    from sentence_transformers import SentenceTransformer

    kind = getattr(torch, precision)
    return Encoder(SentenceTransformer(str(model), device="cpu", model_kwargs={"torch_dtype": kind}))


if __name__ == "__main__":
    serve(Server(SentenceTransformersTorch()))
