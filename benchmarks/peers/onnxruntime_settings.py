"""What the two plain ONNX Runtime peers share: Optimum's export, and the settings that are tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from protocol import Ids, Setting, Tokenized, Vectors, pool, unit


def export(model: Path, folder: Path) -> Path:
    """Optimum's export of the encoder with its pooling, made once."""
    path = folder / "model.onnx"
    if not path.is_file():
        from optimum.exporters.onnx import main_export

        main_export(str(model), folder, task="feature-extraction", library_name="sentence_transformers")
    return path


def settings(model: Path, path: Path) -> Mapping[str, Callable[[], Setting]]:
    """All graph optimizations; threads that spin between operators, and threads that sleep."""
    return {name: partial(Session, model, path, spin) for name, spin in (("spinning", "1"), ("no spinning", "0"))}


class Session(Tokenized):
    """An inference session on the CPU."""

    def __init__(self, model: Path, path: Path, spin: str) -> None:
        import onnxruntime

        super().__init__(model)
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.add_session_config_entry("session.intra_op.allow_spinning", spin)
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self._inputs = {node.name for node in self._session.get_inputs()}
        outputs = [node.name for node in self._session.get_outputs()]
        self._pooled = "sentence_embedding" in outputs
        self._output = "sentence_embedding" if self._pooled else outputs[0]

    def vectors(self, ids: Ids, mask: Ids) -> Vectors:
        """See `Setting.vectors`."""
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        (found,) = self._session.run([self._output], {name: feeds[name] for name in self._inputs})
        return unit(found) if self._pooled else pool(found, mask)
