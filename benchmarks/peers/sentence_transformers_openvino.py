"""sentence-transformers on its OpenVINO backend: as exported, and statically quantized to int8 by its own function."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from protocol import CALIBRATION_SENTENCES, Peer, Server, Setting, serve
from sentence_encoder import Encoder

EXPORTED, QUANTIZED = "openvino_model.xml", "openvino_model_qint8_quantized.xml"
HINTS = {"latency": {"PERFORMANCE_HINT": "LATENCY"}, "throughput": {"PERFORMANCE_HINT": "THROUGHPUT"}}


class SentenceTransformersOpenVINO(Peer):
    """See the module."""

    packages = ("sentence-transformers", "openvino", "nncf", "optimum-intel", "transformers")

    def load(self, model: Path, texts: Sequence[str], work: Path) -> Mapping[str, Callable[[], Setting]]:
        """Both files, with both performance hints."""
        return {
            f"{name}, {hint}": partial(build, model, work, texts, file, hint)
            for name, file in (("export", EXPORTED), ("int8", QUANTIZED))
            for hint in HINTS
        }


def build(model: Path, work: Path, texts: Sequence[str], file: str, hint: str) -> Setting:
    """The backend on one file, made by the package's own function if it is not there yet."""
    from sentence_transformers import SentenceTransformer

    saved = work / "openvino"
    if not saved.is_dir():
        SentenceTransformer(str(model), device="cpu", backend="openvino").save_pretrained(str(saved))
    if not (saved / "openvino" / file).is_file():
        quantize(saved, texts, work / "calibration")
    kwargs: dict[str, Any] = {"file_name": file, "ov_config": HINTS[hint]}
    return Encoder(SentenceTransformer(str(saved), device="cpu", backend="openvino", model_kwargs=kwargs))


def quantize(saved: Path, texts: Sequence[str], folder: Path) -> None:
    """Add the int8 file; the package reads calibration texts as a data set, here of one CSV file."""
    from optimum.intel import OVQuantizationConfig
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.backend import export_static_quantized_openvino_model

    folder.mkdir(exist_ok=True)
    with (folder / "train.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([["sentence"], *([text] for text in texts)])
    plain = SentenceTransformer(str(saved), device="cpu", backend="openvino", model_kwargs={"file_name": EXPORTED})
    export_static_quantized_openvino_model(
        plain,
        OVQuantizationConfig(num_samples=min(CALIBRATION_SENTENCES, len(texts))),
        str(saved),
        dataset_name=str(folder),
        dataset_config_name="default",
        dataset_split="train",
        column_name="sentence",
    )


if __name__ == "__main__":
    serve(Server(SentenceTransformersOpenVINO()))
