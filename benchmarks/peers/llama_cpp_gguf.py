"""llama.cpp through llama-cpp-python: Q4_0 and Q4_K_M, on all cores this process may use."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from decoder_protocol import DecoderPeer, DecoderServer, DecoderSetting
from gguf_file import write_gguf
from protocol import Ids, cores, serve

HERE = Path(__file__).resolve().parent
_CONTEXT = 1024


class LlamaCpp(DecoderPeer):
    """See the module."""

    packages = ("llama-cpp-python", "gguf")

    def load(self, model: Path, texts: Sequence[str], work: Path) -> Mapping[str, Callable[[], DecoderSetting]]:
        """Both files are made once. Weights as they are in the file, and repacked for this CPU where that works."""
        import llama_cpp

        llama_cpp.llama_backend_init()
        kinds = {"Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M}
        full = work / "f16.gguf"
        if not full.is_file():
            write_gguf(model, full)
        for name, kind in kinds.items():
            if not (work / f"{name}.gguf").is_file():
                quantize(full, work / f"{name}.gguf", kind)
        ways = {"repacked": True, "as in the file": False}
        return {
            f"{name}, {way}": partial(Loaded, work / f"{name}.gguf", repack=repack)
            for name in kinds
            for way, repack in ways.items()
            if survives(work / f"{name}.gguf", repack=repack)
        }

    def vocabulary(self, model: Path) -> int:
        """See `DecoderPeer.vocabulary`."""
        return int(json.loads((model / "config.json").read_text(encoding="utf-8"))["vocab_size"])


def quantize(source: Path, target: Path, kind: int) -> None:
    """Write ``source`` in another type, on all cores."""
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = kind
    options.nthread = cores()
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), options):
        raise RuntimeError(f"llama.cpp did not write {target}")


def survives(path: Path, *, repack: bool) -> bool:
    """Whether a prompt can be read; a build for AMX dies on some machines that have it, and would take us along."""
    code = f"from llama_cpp_gguf import try_out; try_out({str(path)!r}, {repack})"
    return not subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, check=False).returncode


def try_out(path: str, repack: bool) -> None:
    """Read a prompt in this process."""
    loaded = Loaded(Path(path), repack=repack)
    loaded.prefill(np.full((1, 64), 20, np.int64))
    loaded.step()


class Loaded(DecoderSetting):
    """A context of llama.cpp, driven without Python objects per token."""

    batches = (1, 8)
    serves = True

    def __init__(self, path: Path, *, repack: bool) -> None:
        import llama_cpp

        self._llama = llama_cpp
        loading = llama_cpp.llama_model_default_params()
        loading.use_extra_bufts = repack
        self._model: Any = llama_cpp.llama_model_load_from_file(str(path).encode(), loading)
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = _CONTEXT * max(self.batches)
        options.n_seq_max = max(self.batches)
        options.n_batch = options.n_ubatch = 512
        options.n_threads = options.n_threads_batch = cores()
        self._context: Any = llama_cpp.llama_init_from_model(self._model, options)
        if not self._context:
            raise RuntimeError("llama.cpp opens no context")
        self._batch: Any = llama_cpp.llama_batch_init(512, 0, 1)
        self._lengths: list[int] = []

    def prefill(self, ids: Ids) -> None:
        """A prompt at a time, as llama.cpp's own tools do."""
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        self._lengths = [0] * len(ids)
        self._next = [self._prompt(row, tokens) for row, tokens in enumerate(ids.tolist())]

    def step(self) -> None:
        """One call for all rows."""
        batch = self._batch
        batch.n_tokens = len(self._next)
        for row, token in enumerate(self._next):
            self._put(row, token, row, last=True)
        self._decode()
        self._next = [self._best(row) for row in range(len(self._next))]

    def serve(self, prompts: Sequence[Ids], steps: Sequence[int]) -> None:
        """As its server does: each call takes a token of every text that is written, and as much of prompts as fits."""
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        self._lengths = [0] * len(prompts)
        unread = [prompt.tolist() for prompt in prompts]
        left, last = list(steps), [-1] * len(prompts)
        while any(left):
            count = 0
            asked: dict[int, int] = {}
            for row, token in enumerate(last):
                if token >= 0 and left[row]:
                    self._put(count, token, row, last=True)
                    asked[row], count = count, count + 1
            for row, tokens in enumerate(unread):
                taken, unread[row] = tokens[: 512 - count], tokens[512 - count :]
                for index, token in enumerate(taken):
                    self._put(count + index, token, row, last=not unread[row] and index == len(taken) - 1)
                count += len(taken)
                if taken and not unread[row]:
                    asked[row] = count - 1
            self._batch.n_tokens = count
            self._decode()
            for row, place in asked.items():
                last[row], left[row] = self._best(place), left[row] - 1

    def _prompt(self, row: int, tokens: list[int]) -> int:
        for start in range(0, len(tokens), 512):
            part = tokens[start : start + 512]
            self._batch.n_tokens = len(part)
            for index, token in enumerate(part):
                self._put(index, token, row, last=index == len(part) - 1)
            self._decode()
        return self._best(self._batch.n_tokens - 1)

    def _put(self, index: int, token: int, row: int, *, last: bool) -> None:
        batch = self._batch
        batch.token[index] = token
        batch.pos[index] = self._lengths[row]
        batch.n_seq_id[index] = 1
        batch.seq_id[index][0] = row
        batch.logits[index] = last
        self._lengths[row] += 1

    def _decode(self) -> None:
        if self._llama.llama_decode(self._context, self._batch):
            raise RuntimeError("llama.cpp did not decode")

    def _best(self, index: int) -> int:
        logits = self._llama.llama_get_logits_ith(self._context, index)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocabulary,)).argmax())


if __name__ == "__main__":
    serve(DecoderServer(LlamaCpp()))
