"""sentence-transformers on its ONNX backend: as exported, optimized at each level, and quantized for VNNI."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from protocol import Peer, Server, Setting, serve
from sentence_encoder import Encoder

FILES = {
    "export": "model.onnx",
    "O1": "model_O1.onnx",
    "O2": "model_O2.onnx",
    "O3": "model_O3.onnx",
    "avx512_vnni": "model_qint8_avx512_vnni.onnx",
}


class SentenceTransformersOnnx(Peer):
    """See the module."""

    packages = ("sentence-transformers", "onnxruntime", "optimum-onnx", "transformers")

    def load(self, model: Path, texts: Sequence[str], work: Path) -> Mapping[str, Callable[[], Setting]]:
        """Each of its CPU levels."""
        return {name: partial(build, model, work / "onnx", name) for name in FILES}


def build(model: Path, saved: Path, name: str) -> Setting:
    """The backend on one file, made by the package's own function if it is not there yet."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.backend import export_dynamic_quantized_onnx_model, export_optimized_onnx_model

    if not saved.is_dir():
        SentenceTransformer(str(model), device="cpu", backend="onnx").save_pretrained(str(saved))
    if not (saved / "onnx" / FILES[name]).is_file():
        plain = SentenceTransformer(
            str(saved), device="cpu", backend="onnx", model_kwargs={"file_name": FILES["export"]}
        )
        make = export_optimized_onnx_model if name.startswith("O") else export_dynamic_quantized_onnx_model
        make(plain, name, str(saved))
    kwargs = {"file_name": FILES[name], "provider": "CPUExecutionProvider"}
    return Encoder(SentenceTransformer(str(saved), device="cpu", backend="onnx", model_kwargs=kwargs))


if __name__ == "__main__":
    serve(Server(SentenceTransformersOnnx()))
