"""ONNX Runtime on Optimum's export, dynamically quantized to int8 with a scale a channel, all graph optimizations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from onnxruntime_settings import export, settings
from protocol import Peer, Server, Setting, serve


class OnnxRuntimeInt8(Peer):
    """See the module."""

    packages = ("onnxruntime", "optimum", "optimum-onnx", "transformers")

    def load(self, model: Path, texts: Sequence[str], work: Path) -> Mapping[str, Callable[[], Setting]]:
        """See `onnxruntime_settings.settings`."""
        path = work / "int8.onnx"
        if not path.is_file():
            from onnxruntime.quantization import QuantType, quantize_dynamic

            quantize_dynamic(export(model, work / "fp32"), path, per_channel=True, weight_type=QuantType.QInt8)
        return settings(model, path)


if __name__ == "__main__":
    serve(Server(OnnxRuntimeInt8()))
