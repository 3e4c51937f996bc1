"""Models of known shapes with random weights: what is measured of them is speed."""

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


DECODER_SHAPES: dict[str, dict[str, object]] = {
    "llama-168m": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
    },
    "qwen2.5-0.5b": {
        "model_type": "qwen2",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "rope_theta": 1000000.0,
    },
}


def random_decoder(folder: Path, shape: dict[str, object]) -> Path:
    """Write a language model of that shape in float16, with a tokenizer that has a word for every token."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    kind = str(shape["model_type"])
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(
        kind, **ends, **{name: value for name, value in shape.items() if name != "model_type"}
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(folder)
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{index}" for index in range(4, int(str(shape["vocab_size"]))))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder
