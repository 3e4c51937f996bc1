"""A bundle of ours, by `hasten.load`, speaking the protocol of the peers: what is compared is started alike."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from protocol import Ids, Peer, Server, Setting, Vectors, serve

VARIANT = "HASTEN_BENCHMARK_VARIANT"


class Bundle(Peer):
    """The variant that the environment names, else the one that `hasten.load` chooses."""

    packages = ("onnxruntime-gpu",)

    def load(self, model: Path, texts: Sequence[str], work: Path) -> Mapping[str, Callable[[], Setting]]:
        """One setting: what a user gets."""
        variant = os.environ.get(VARIANT) or None
        return {variant or "chosen by load": lambda: Loaded(model, variant)}

    def vocabulary(self, model: Path) -> int:
        """See `Peer.vocabulary`."""
        from tokenizers import Tokenizer

        import hasten

        processor = hasten.open_bundle(model).manifest.processor
        if processor is None:
            raise ValueError(f"{model} has no tokenizer")
        return Tokenizer.from_file(str(model / processor.tokenizer)).get_vocab_size()


class Loaded(Setting):
    """A loaded bundle."""

    batches = (0,)

    def __init__(self, bundle: Path, variant: str | None) -> None:
        import hasten

        self._model = hasten.load(bundle, variant=variant)
        self._inputs = {spec.name for spec in self._model.bundle.manifest.inputs}

    def vectors(self, ids: Ids, mask: Ids) -> Vectors:
        """See `Setting.vectors`."""
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        found: Vectors = self._model.run({name: feeds[name] for name in self._inputs})["sentence_embedding"]
        return found

    def embed(self, texts: Sequence[str], batch: int) -> Vectors:
        """See `Setting.embed`."""
        return self._model.embed(texts)


if __name__ == "__main__":
    serve(Server(Bundle()))
