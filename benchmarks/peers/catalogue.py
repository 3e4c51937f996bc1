"""The peers of the benchmark, and where each one's Python is. Standard library only."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
VARIABLE = "HASTEN_PEERS"


@dataclass(frozen=True)
class Entry:
    """A peer: its script is ``<name>.py``, what it needs ``<name>.txt``, both in this folder.

    Attributes:
        name: As above.
        title: What people read.
        quick: Whether it is ready within seconds, for a quick benchmark.
        shapes: Whether it is compared on the other encoder shapes too.
    """

    name: str
    title: str
    quick: bool = True
    shapes: bool = False

    @property
    def script(self) -> Path:
        """The program that speaks the protocol."""
        return HERE / f"{self.name}.py"

    @property
    def environment(self) -> str:
        """Name of its virtual environment; peers whose file says ``-r other.txt`` share the other's."""
        first = (HERE / f"{self.name}.txt").read_text(encoding="utf-8").splitlines()[0]
        return first.removeprefix("-r ").removesuffix(".txt") if first.startswith("-r ") else self.name

    @property
    def requirements(self) -> Path:
        """What its environment is made from."""
        return HERE / f"{self.environment}.txt"

    @property
    def python(self) -> Path:
        """The interpreter of its environment, which may not exist."""
        folder, program = ("Scripts", "python.exe") if sys.platform == "win32" else ("bin", "python")
        return home() / self.environment / folder / program


PEERS = (
    Entry("torch_eager", "torch eager"),
    Entry("torch_compile", "torch.compile", quick=False),
    Entry("sentence_transformers_torch", "sentence-transformers"),
    Entry("sentence_transformers_onnx", "sentence-transformers (onnx)", quick=False),
    Entry("sentence_transformers_openvino", "sentence-transformers (openvino)", quick=False),
    Entry("onnxruntime_fp32", "ONNX Runtime fp32"),
    Entry("onnxruntime_int8", "ONNX Runtime dynamic int8", shapes=True),
    Entry("optimum_onnxruntime", "Optimum ORTModel", quick=False),
    Entry("openvino_native", "OpenVINO", shapes=True),
    Entry("openvino_nncf", "OpenVINO + NNCF int8", shapes=True),
    Entry("ctranslate2_int8", "CTranslate2 int8"),
)

DECODER_PEERS = (
    Entry("llama_cpp_gguf", "llama.cpp"),
    Entry("onnxruntime_genai_int4", "onnxruntime-genai int4"),
    Entry("transformers_generate", "transformers"),
)

SERVER_PEERS = (Entry("fastapi_sentence_transformers", "FastAPI + sentence-transformers"),)

EVERY = (*PEERS, *DECODER_PEERS, *SERVER_PEERS)


def home() -> Path:
    """Folder of the peers' environments: ``HASTEN_PEERS``, else one in the user's cache."""
    told = os.environ.get(VARIABLE)
    return Path(told) if told else Path.home() / ".cache" / "hasten-benchmarks" / "peers"


def found(peers: tuple[Entry, ...] = PEERS) -> tuple[Entry, ...]:
    """The peers, of those given, whose environments are there."""
    return tuple(peer for peer in peers if peer.python.is_file())
