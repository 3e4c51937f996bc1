"""The random checkpoint is one that transformers loads, and the goals are those of the issue."""

from __future__ import annotations

from pathlib import Path

import pytest
import shapes
import torch
import transformers
from large_checkpoint import judge
from shapes import LARGE_SHAPE, random_checkpoint

from compiler.source import read_source

TINY = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}


def test_a_random_checkpoint_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "_SHARD_BYTES", 20_000)
    folder = random_checkpoint(tmp_path / "model", LARGE_SHAPE | TINY)
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 2
    assert read_source(str(folder)).task == "text-generation"
    model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    norms = [parameter.detach() for name, parameter in model.named_parameters() if "norm" in name]
    assert 0.9 < float(torch.cat(norms).float().mean()) < 1.1
    assert model.lm_head.weight is model.model.embed_tokens.weight


def run(seconds: float, megabytes: float) -> dict[str, float]:
    return {"seconds": seconds, "peak_mb": megabytes}


def test_goals() -> None:
    runs = {"hasten": [run(60, 4750), run(50, 4700)], "peer": [run(40, 1), run(52, 1)]}
    figures = {"quick": False, "stored_mb": 3000.0, **runs}
    memory, time = judge(figures)
    assert (memory.goal, memory.figure, memory.met) == (4750, 4750, True)
    assert (time.figure, time.met) == (1.25, False)
    assert judge({**figures, "peer": []})[1].figure is None
    assert judge({**figures, "quick": True})[0].figure is None
