"""Models of known shapes with random weights: what is measured of them is speed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

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


LARGE_SHAPE: dict[str, object] = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
    "rope_theta": 1000000.0,
}
"""Qwen2.5-1.5B: 1.54 billion parameters."""
_SHARD_BYTES = 1 << 30


def random_decoder(folder: Path, shape: dict[str, object]) -> Path:
    """Write a language model of that shape in float16, with a tokenizer that has a word for every token."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(_config(shape), dtype=torch.float16).save_pretrained(folder)
    _write_tokenizer(folder, int(str(shape["vocab_size"])))
    return folder


def random_checkpoint(folder: Path, shape: dict[str, object]) -> Path:
    """The same in bfloat16 and in shards of 1 GiB, written tensor by tensor: the model is never in memory."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    generator = torch.Generator().manual_seed(0)
    config = _config(shape)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, parameter in model.named_parameters():
        if sum(held.nbytes for held in shards[-1].values()) + parameter.nbytes > _SHARD_BYTES and shards[-1]:
            shards.append({})
        shards[-1][name] = parameter
    folder.mkdir(parents=True)
    places: dict[str, str] = {}
    for index, shard in enumerate(shards):
        file = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        filled = {name: _random(name, held, generator) for name, held in shard.items()}
        save_file(filled, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, file)
    size = sum(parameter.nbytes for parameter in model.parameters())
    listing = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listing), encoding="utf-8")
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    _write_tokenizer(folder, int(str(shape["vocab_size"])))
    return folder


def _random(name: str, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Of deviation 0.02; the scales of norms around 1."""
    import torch

    mean = 1.0 if like.ndim == 1 and not name.endswith("bias") else 0.0
    return torch.empty(like.shape, dtype=like.dtype).normal_(mean, 0.02, generator=generator)


def _config(shape: dict[str, object]) -> PreTrainedConfig:
    from transformers import AutoConfig

    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    rest = {name: value for name, value in shape.items() if name != "model_type"}
    return AutoConfig.for_model(str(shape["model_type"]), **ends, **rest)


def _write_tokenizer(folder: Path, vocabulary: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{index}" for index in range(4, vocabulary))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
