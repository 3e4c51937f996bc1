"""onnxruntime-genai with the int4 model of its own builder, decoded by its own loop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from decoder_protocol import DecoderPeer, DecoderServer, DecoderSetting
from protocol import Ids, serve

_LONGEST = 1024


class GenAI(DecoderPeer):
    """See the module."""

    packages = ("onnxruntime-genai", "onnxruntime")

    def load(self, model: Path, texts: Sequence[str], work: Path) -> Mapping[str, Callable[[], DecoderSetting]]:
        """Blocks of 32, computed in int8."""
        folder = work / "int4"
        if not (folder / "genai_config.json").is_file():
            build(model, folder)
        return {"int4, blocks of 32": lambda: Loaded(folder)}

    def vocabulary(self, model: Path) -> int:
        """See `DecoderPeer.vocabulary`."""
        return int(json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"])


def build(model: Path, folder: Path) -> None:
    """Write the int4 model, by the builder's own command."""
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", "", "-i", str(model), "-o", str(folder)]
    command += ["-p", "int4", "-e", "cpu", "-c", str(folder.parent / "cache")]
    command += ["--extra_options", "int4_accuracy_level=4", "int4_block_size=32"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the builder failed: {done.stderr[-200:]}")


class Loaded(DecoderSetting):
    """A model of onnxruntime-genai."""

    batches = (1, 8)

    def __init__(self, folder: Path) -> None:
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        import onnxruntime_genai

        self._package = onnxruntime_genai
        self._model: Any = onnxruntime_genai.Model(str(folder))
        self._generator: Any = None

    def prefill(self, ids: Ids) -> None:
        """A generator of its own; the logits of the prompts are there when it returns."""
        options = self._package.GeneratorParams(self._model)
        options.set_search_options(max_length=_LONGEST, batch_size=len(ids), do_sample=False)
        self._generator = self._package.Generator(self._model, options)
        self._generator.append_tokens(ids.astype("int32"))
        self._generator.get_logits()

    def step(self) -> None:
        """Chooses the token of the logits that are there, and computes the next."""
        self._generator.generate_next_token()
        self._generator.get_logits()


if __name__ == "__main__":
    serve(DecoderServer(GenAI()))
