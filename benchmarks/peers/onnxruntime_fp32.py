"""ONNX Runtime on Optimum's export, float32, all graph optimizations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from onnxruntime_settings import export, settings
from protocol import Peer, Server, Setting, serve


class OnnxRuntimeFloat(Peer):
    """See the module."""

    packages = ("onnxruntime", "optimum", "optimum-onnx", "transformers")

    def load(self, model: Path, texts: Sequence[str], work: Path) -> Mapping[str, Callable[[], Setting]]:
        """See `onnxruntime_settings.settings`."""
        return settings(model, export(model, work / "fp32"))


if __name__ == "__main__":
    serve(Server(OnnxRuntimeFloat()))
