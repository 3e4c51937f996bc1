"""What the two peers on OpenVINO's own API share: conversion, and the settings that are tried."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from protocol import Block, Ids, Setting, Tokenized, Vectors, cores

LATENCY = {"PERFORMANCE_HINT": "LATENCY"}
THROUGHPUT = {"PERFORMANCE_HINT": "THROUGHPUT"}
BFLOAT16 = {"INFERENCE_PRECISION_HINT": "bf16"}
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}


def convert(model: Path, path: Path) -> None:
    """Write the encoder, its pooling and normalization as an OpenVINO model in float32."""
    import openvino
    import torch
    from torch_encoder import sentence_encoder

    example = torch.ones(2, 8, dtype=torch.long)
    graph = openvino.convert_model(
        sentence_encoder(model), example_input={"input_ids": example, "attention_mask": example}
    )
    openvino.save_model(graph, path, compress_to_fp16=False)


def settings(model: Path, path: Path) -> Mapping[str, Callable[[], Setting]]:
    """Both performance hints, with streams for the throughput one, in both precisions."""
    streams = {**THROUGHPUT, "NUM_STREAMS": str(cores())}
    return {
        f"{hint}, {precision}": partial(kind, model, path, {**options, **numbers})
        for hint, kind, options in (("latency", Compiled, LATENCY), (f"{cores()} streams", Streams, streams))
        for precision, numbers in (("bf16", BFLOAT16), ("f32", FLOAT32))
    }


class Compiled(Tokenized):
    """One request at a time."""

    def __init__(self, model: Path, path: Path, options: Mapping[str, str]) -> None:
        import openvino

        super().__init__(model)
        self._compiled = openvino.Core().compile_model(path, "CPU", dict(options))
        self._request = self._compiled.create_infer_request()

    def vectors(self, ids: Ids, mask: Ids) -> Vectors:
        """See `Setting.vectors`."""
        feeds = {"input_ids": ids, "attention_mask": mask}
        found: Vectors = self._request.infer(feeds, share_inputs=True, share_outputs=True)[0]
        return found


class Streams(Tokenized):
    """As many requests at a time as the compiled model has streams; a batch is divided among them."""

    def __init__(self, model: Path, path: Path, options: Mapping[str, str]) -> None:
        import openvino

        super().__init__(model)
        compiled = openvino.Core().compile_model(path, "CPU", dict(options))
        self._queue = openvino.AsyncInferQueue(compiled)
        self._found: list[tuple[list[int], Vectors]] = []
        self._queue.set_callback(self._keep)

    def _keep(self, request: Any, indices: list[int]) -> None:
        self._found.append((indices, request.get_output_tensor(0).data.copy()))

    def vectors(self, ids: Ids, mask: Ids) -> Vectors:
        """See `Setting.vectors`."""
        parts = [part for part in np.array_split(np.arange(len(ids)), len(self._queue)) if len(part)]
        blocks = [(part.tolist(), ids[part], mask[part]) for part in parts]
        found = {indices[0]: vectors for indices, vectors in self.run(blocks)}
        return np.concatenate([found[start] for start in sorted(found)])

    def run(self, blocks: Iterable[Block]) -> Iterator[tuple[list[int], Vectors]]:
        """See `Tokenized.run`."""
        self._found.clear()
        for indices, ids, mask in blocks:
            self._queue.start_async({"input_ids": ids, "attention_mask": mask}, userdata=indices)
        self._queue.wait_all()
        yield from self._found
