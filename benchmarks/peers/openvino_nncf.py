"""OpenVINO with NNCF's int8: SmoothQuant and bias correction for transformers, 300 sentences for calibration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from openvino_settings import convert, settings
from protocol import CALIBRATION_SENTENCES, Peer, Server, Setting, read_tokenizer, serve


class OpenVINOQuantized(Peer):
    """See the module."""

    packages = ("openvino", "nncf", "torch", "transformers")

    def load(self, model: Path, texts: Sequence[str], work: Path) -> Mapping[str, Callable[[], Setting]]:
        """Latency and throughput hints; what is not int8 in bfloat16 and float32."""
        path = work / "int8.xml"
        if not path.is_file():
            quantize(model, texts, work)
        return settings(model, path)


def quantize(model: Path, texts: Sequence[str], work: Path) -> None:
    """Write ``int8.xml`` into ``work``."""
    import nncf
    import openvino

    if not texts:
        raise ValueError("NNCF needs calibration texts")
    convert(model, work / "fp32.xml")
    graph = openvino.Core().read_model(work / "fp32.xml")
    tokenizer = read_tokenizer(model)

    def feeds(text: str) -> dict[str, Any]:
        ids = np.array([tokenizer.encode(text).ids], np.int64)
        return {"input_ids": ids, "attention_mask": np.ones_like(ids)}

    quantized = nncf.quantize(
        graph,
        nncf.Dataset(list(texts), feeds),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=min(CALIBRATION_SENTENCES, len(texts)),
    )
    openvino.save_model(quantized, work / "int8.xml")


if __name__ == "__main__":
    serve(Server(OpenVINOQuantized()))
