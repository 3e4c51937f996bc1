"""Tokenizers of every kind, trained in milliseconds on sentences of a few hundred made-up words."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<mask>")
_SYLLABLES = (
    "ba",
    "be",
    "ca",
    "co",
    "da",
    "en",
    "er",
    "in",
    "ing",
    "la",
    "lo",
    "ma",
    "na",
    "on",
    "ra",
    "re",
    "sa",
    "ti",
)


@cache
def sentences(count: int = 400, seed: int = 0) -> tuple[str, ...]:
    """Words that share syllables, the frequent ones far more often; now and then a number, an accent, a rare sign."""
    rng = np.random.default_rng(seed)
    words = ["".join(rng.choice(_SYLLABLES, rng.integers(1, 5))) for _ in range(120)]
    words += ["été", "naïve", "42", "1999", "x_y", "…", "straße"]
    odds = 1.0 / np.arange(1, len(words) + 1)
    picks = (rng.choice(words, rng.integers(1, 9), p=odds / odds.sum()) for _ in range(count))
    return tuple(" ".join(pick) + str(rng.choice([".", "!", " ?", ""])) for pick in picks)


def _trained(tokenizer: Tokenizer, trainer: Any) -> Tokenizer:
    tokenizer.train_from_iterator(sentences(), trainer)
    ids = {name: tokenizer.token_to_id(name) for name in SPECIAL}
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[(name, ids[name]) for name in ("<s>", "</s>")],
    )
    tokenizer.enable_padding(pad_id=ids["<pad>"], pad_token="<pad>")
    return tokenizer


def byte_level() -> Tokenizer:
    """BPE on bytes, as GPT-2, Llama 3 and Qwen have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=480, special_tokens=list(SPECIAL), initial_alphabet=letters, show_progress=False
    )
    return _trained(tokenizer, trainer)


def byte_fallback() -> Tokenizer:
    """BPE on characters with bytes for those that it lacks, as Llama 2 and Gemma have it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = _trained(tokenizer, trainers.BpeTrainer(vocab_size=480, special_tokens=special, show_progress=False))
    document = json.loads(trained.to_str())  # bytes are tokens of the model, and no added ones
    document["added_tokens"] = [item for item in document["added_tokens"] if item["content"] in SPECIAL]
    made = Tokenizer.from_str(json.dumps(document))
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return made


def ended() -> Tokenizer:
    """BPE that marks the end of a word, as CLIP and GPT-1 have it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=220, special_tokens=list(SPECIAL), end_of_word_suffix="</w>", show_progress=False
    )
    return _trained(tokenizer, trainer)


def continued() -> Tokenizer:
    """BPE that marks what is inside of a word."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", continuing_subword_prefix="##"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.BpeTrainer(
        vocab_size=220, special_tokens=list(SPECIAL), continuing_subword_prefix="##", show_progress=False
    )
    return _trained(tokenizer, trainer)


def word_piece() -> Tokenizer:
    """As BERT has it."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return _trained(
        tokenizer, trainers.WordPieceTrainer(vocab_size=220, special_tokens=list(SPECIAL), show_progress=False)
    )


def unigram() -> Tokenizer:
    """As XLM-RoBERTa and T5 have it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=220, special_tokens=list(SPECIAL), unk_token="<unk>", show_progress=False
    )
    return _trained(tokenizer, trainer)


def words() -> Tokenizer:
    """A token for a word."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return _trained(tokenizer, trainers.WordLevelTrainer(special_tokens=list(SPECIAL), show_progress=False))


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level BPE": byte_level,
    "BPE with byte fallback": byte_fallback,
    "BPE with ends of words": ended,
    "BPE with insides of words": continued,
    "WordPiece": word_piece,
    "Unigram": unigram,
    "WordLevel": words,
}
