"""OpenVINO on its own model conversion, not quantized: bfloat16 where the CPU has it, by OpenVINO's own default."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from openvino_settings import convert, settings
from protocol import Peer, Server, Setting, serve


class OpenVINONative(Peer):
    """See the module."""

    packages = ("openvino", "torch", "transformers")

    def load(self, model: Path, texts: Sequence[str], work: Path) -> Mapping[str, Callable[[], Setting]]:
        """Latency and throughput hints, bfloat16 and float32."""
        path = work / "model.xml"
        if not path.is_file():
            convert(model, path)
        return settings(model, path)


if __name__ == "__main__":
    serve(Server(OpenVINONative()))
