"""Optimum's ORTModel: its export, its optimization levels, and its dynamic int8 for CPUs with VNNI."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from protocol import Ids, Peer, Server, Setting, Tokenized, Vectors, serve

LEVELS = ("O1", "O2", "O3")


class Model(Tokenized):
    """An ORTModel, pooled in torch as its documentation shows."""

    def __init__(self, model: Path, loaded: Any) -> None:
        super().__init__(model)
        self._loaded = loaded

    def vectors(self, ids: Ids, mask: Ids) -> Vectors:
        """See `Setting.vectors`."""
        feeds = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        with torch.inference_mode():
            if "token_type_ids" in self._loaded.input_names:
                feeds["token_type_ids"] = torch.zeros_like(feeds["input_ids"])
            hidden = self._loaded(**feeds).last_hidden_state
            weights = feeds["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
            found: Vectors = torch.nn.functional.normalize(pooled, dim=-1).numpy()
        return found


class Optimum(Peer):
    """See the module."""

    packages = ("optimum", "optimum-onnx", "onnxruntime", "transformers", "torch")

    def load(self, model: Path, texts: Sequence[str], work: Path) -> Mapping[str, Callable[[], Setting]]:
        """The export as it is, each level, and int8 of the export; it cannot quantize an optimized graph."""
        names = ("export", *LEVELS, "avx512_vnni")
        return {name: partial(self._make, model, work, name) for name in names}

    def _make(self, model: Path, work: Path, name: str) -> Setting:
        from optimum.onnxruntime import ORTModelForFeatureExtraction, ORTOptimizer, ORTQuantizer
        from optimum.onnxruntime.configuration import AutoOptimizationConfig, AutoQuantizationConfig

        plain, folder = work / "export", work / name
        if not plain.is_dir():
            ORTModelForFeatureExtraction.from_pretrained(str(model), export=True).save_pretrained(plain)
        if not folder.is_dir() and name in LEVELS:
            exported = ORTModelForFeatureExtraction.from_pretrained(plain)
            config = getattr(AutoOptimizationConfig, name)()
            ORTOptimizer.from_pretrained(exported).optimize(save_dir=folder, optimization_config=config)
        elif not folder.is_dir():
            quantizer = ORTQuantizer.from_pretrained(plain, file_name="model.onnx")
            quantizer.quantize(AutoQuantizationConfig.avx512_vnni(is_static=False, per_channel=True), save_dir=folder)
        (path,) = folder.glob("*.onnx")
        return Model(model, ORTModelForFeatureExtraction.from_pretrained(folder, file_name=path.name))


if __name__ == "__main__":
    serve(Server(Optimum()))
