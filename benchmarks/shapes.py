"""Other encoders than the small one that the benchmark is named for: their shapes, with random weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

OTHER_SHAPES = {
    "bert-base": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
    "minilm-l12": {"num_hidden_layers": 12, "hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
}


def random_encoder(source: Path, folder: Path, shape: dict[str, int]) -> Path:
    """Write a BERT of that shape as a sentence-transformers folder; tokenizer and pooling are those of ``source``."""
    import torch
    from transformers import BertConfig, BertModel

    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    torch.manual_seed(0)
    vocabulary = json.loads((source / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    BertModel(BertConfig(vocab_size=vocabulary, **shape)).save_pretrained(folder)
    pooling = folder / "1_Pooling" / "config.json"
    told = json.loads(pooling.read_text(encoding="utf-8"))
    pooling.write_text(json.dumps({**told, "word_embedding_dimension": shape["hidden_size"]}), encoding="utf-8")
    return folder
