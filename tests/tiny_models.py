"""Tiny Hugging Face model folders with random weights and a real tokenizer, made in milliseconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_TEXT = """
the a man woman child dog cat is was are playing running eating sleeping in on at with park house street river
good bad great terrible movie film music guitar ball red blue green small large and or not very who what where
london paris lives works . , ? !
"""
WORDS = tuple(_TEXT.split())
LABELS = {"text-classification": ("negative", "neutral", "positive"), "token-classification": ("O", "B-PER", "B-LOC")}
_HEADS = {
    "feature-extraction": "Model",
    "text-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
    "fill-mask": "ForMaskedLM",
}
_SIZE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 130,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Bert": {},
    "Roberta": {"type_vocab_size": 1},
    "DistilBert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "MPNet": {},
    "Electra": {"embedding_size": 16},
    "Camembert": {"type_vocab_size": 1},
    "XLMRoberta": {"type_vocab_size": 1},
    "Albert": {"embedding_size": 16},
    "DebertaV2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "type_vocab_size": 0,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_buckets": 16,
    },
    "ModernBert": {"local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 2, "sep_token_id": 3},
}


def vocabulary() -> list[str]:
    """Special tokens first: padding is 1, as RoBERTa has it."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    pieces = [*letters, *(f"##{letter}" for letter in letters)]
    return ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", *dict.fromkeys((*WORDS, *pieces))]


def write_tokenizer(folder: Path, *, model_max_length: int = 128) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    words = vocabulary()
    tokenizer = Tokenizer(models.WordPiece({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens(words[:5])
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": model_max_length, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(content))


def write_model(
    folder: Path, architecture: str = "Bert", task: str = "feature-extraction", *, seed: int = 0, **overrides: Any
) -> Path:
    """A folder with config.json, model.safetensors and a tokenizer."""
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    options = {**_SIZE, **ARCHITECTURES[architecture], "vocab_size": len(vocabulary()), "pad_token_id": 1, **overrides}
    labels = LABELS.get(task)
    if labels and "num_labels" not in overrides:
        options |= {"id2label": dict(enumerate(labels)), "label2id": {label: i for i, label in enumerate(labels)}}
    config = getattr(transformers, f"{architecture}Config")(**options)
    torch.manual_seed(seed)
    model = getattr(transformers, architecture + _HEADS[task])(config)
    _spread(model)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_sentence_model(folder: Path, *, mode: str = "mean_tokens", normalize: bool = True, length: int = 64) -> Path:
    """A sentence-transformers folder around a tiny BERT."""
    write_model(folder)
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": paths[i], "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    names = ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")
    pooling = {"word_embedding_dimension": 32, **{f"pooling_mode_{name}": name == mode for name in names}}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": length, "do_lower_case": False}))
    return folder


def _spread(model: Any) -> None:
    """Weights wide enough that attention is uneven: with the usual init every key weighs the same and masks hide."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.5 if "embed" in name else 0.25)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
            else:  # scales of layer norms, each its own: equal ones would be stored once
                parameter.normal_(1.0, 0.1)
