"""torch.compile with Inductor: float32 and bfloat16, weights frozen; one kernel set a shape, or one for all lengths."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from protocol import Peer, Server, Setting, serve
from torch_encoder import TorchSetting, sentence_encoder


class Static(TorchSetting):
    """Compiled anew for each shape: for fixed shapes only."""

    texts = False


class Dynamic(TorchSetting):
    """Compiled once for any batch and length."""


class TorchCompile(Peer):
    """See the module."""

    packages = ("torch", "transformers")

    def load(self, model: Path, texts: Sequence[str], work: Path) -> Mapping[str, Callable[[], Setting]]:
        """Static and dynamic shapes, plain and frozen, in both precisions."""
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(work / "inductor")
        return {
            f"{kind.__name__.lower()} shapes, {name}{', frozen' if frozen else ''}": partial(
                build, model, kind, dtype, frozen
            )
            for kind in (Static, Dynamic)
            for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16))
            for frozen in (False, True)
        }


def build(model: Path, kind: type[TorchSetting], dtype: torch.dtype, frozen: bool) -> Setting:
    """A module that compiles itself when it is first called."""
    module = sentence_encoder(model, "sdpa", dtype)
    return kind(model, torch.compile(module, dynamic=kind is Dynamic, options={"freezing": frozen}))


if __name__ == "__main__":
    serve(Server(TorchCompile()))
