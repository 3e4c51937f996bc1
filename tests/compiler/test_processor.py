from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models
from tokenizers import Tokenizer

from artifacts.errors import SourceError
from compiler.processor import TOKENIZER, maximum_length, pad_id, read_processor, takes_pairs
from compiler.source import ModelSource, Pooling

CONFIG: dict[str, object] = {
    "model_type": "bert",
    "max_position_embeddings": 130,
    "vocab_size": len(tiny_models.vocabulary()),
    "pad_token_id": 1,
    "type_vocab_size": 2,
}


def source(folder: Path, task: str = "feature-extraction", *, length: int = 0) -> ModelSource:
    pooling = Pooling("mean", max_length=length) if task == "feature-extraction" else None
    return ModelSource("m", "huggingface", folder, task, CONFIG, "BertModel", "sha256:" + "0" * 64, pooling, folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_models.write_tokenizer(tmp_path, model_max_length=100)
    return tmp_path


def test_copies_the_tokenizer(folder: Path) -> None:
    processor, files = read_processor(source(folder), CONFIG)
    assert files == {TOKENIZER: (folder / "tokenizer.json").read_bytes()}
    assert (processor.pad_id, processor.pad_token, processor.pad_type_id) == (1, "[PAD]", 0)
    assert (processor.max_length, processor.pairs, processor.mask_token, processor.problem) == (100, False, "", "")


@pytest.mark.parametrize(
    ("stated", "positions", "sentence", "kind", "length"),
    [
        (100, 130, 0, "bert", 100),
        (10**30, 130, 0, "bert", 130),
        (512, 130, 0, "bert", 130),
        (100, 130, 64, "bert", 64),
        (100, 130, 256, "bert", 130),
        (512, 514, 0, "roberta", 512),
        (10**30, 514, 0, "mpnet", 512),
        (10**30, 514, 0, "bert", 514),
        (10**30, None, 0, "bert", 512),
        (10**30, -1, 0, "bert", 512),
    ],
)
def test_maximum_length(
    folder: Path, stated: int, positions: int | None, sentence: int, kind: str, length: int
) -> None:
    tiny_models.write_tokenizer(folder, model_max_length=stated)
    config = CONFIG | {"max_position_embeddings": positions, "model_type": kind}
    processor, _ = read_processor(source(folder, length=sentence), config)
    assert processor.max_length == length
    assert processor.max_length <= maximum_length(config)


def test_labels_and_problem(folder: Path) -> None:
    classify = source(folder, "text-classification")
    config = CONFIG | {"id2label": {"1": "pos", "0": "neg", "10": "x", **{str(i): str(i) for i in range(2, 10)}}}
    processor, _ = read_processor(classify, config)
    assert processor.labels[:2] == ("neg", "pos")
    assert processor.labels[10] == "x"
    assert (processor.problem, processor.pairs) == ("single_label_classification", True)
    assert read_processor(classify, CONFIG | {"id2label": {0: "LABEL_0"}})[0].problem == "regression"
    several = CONFIG | {"id2label": {0: "a", 1: "b"}, "problem_type": "multi_label_classification"}
    assert read_processor(classify, several)[0].problem == "multi_label_classification"
    tokens, _ = read_processor(source(folder, "token-classification"), several)
    assert (tokens.labels, tokens.problem, tokens.pairs) == (("a", "b"), "", False)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"id2label": {"0": "a", "2": "b"}}, "not numbered 0 to 1"),
        ({"id2label": {"a": "0"}}, "no numbers"),
        ({"id2label": {"0": "a", "1": "b"}, "problem_type": "magic"}, 'problem_type "magic"'),
        ({"vocab_size": 20}, r"gives ids up to \d+, the model knows 20"),
    ],
)
def test_bad_configs(folder: Path, changes: dict[str, object], text: str) -> None:
    with pytest.raises(SourceError, match=text):
        read_processor(source(folder, "text-classification"), CONFIG | changes)


def test_fill_mask_needs_a_mask_token(folder: Path) -> None:
    assert read_processor(source(folder, "fill-mask"), CONFIG)[0].mask_token == "[MASK]"
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("[MASK]", "[BLANK]"))
    with pytest.raises(SourceError, match="no mask token"):
        read_processor(source(folder, "fill-mask"), CONFIG)


@pytest.mark.parametrize("content", ["", "{}", "[", '{"version": "1.0", "model": {"type": "Magic"}}'])
def test_corrupt_tokenizers(folder: Path, content: str) -> None:
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(SourceError, match="tokenizer"):
        read_processor(source(folder), CONFIG)


def test_special_tokens_may_be_objects_and_padding_may_be_unnamed(folder: Path) -> None:
    config = folder / "tokenizer_config.json"
    config.write_text(json.dumps({"pad_token": {"content": "[SEP]", "lstrip": False}}))
    assert read_processor(source(folder), CONFIG)[0].pad_id == 3
    config.unlink()
    assert read_processor(source(folder), CONFIG)[0].pad_token == "[PAD]"


def test_makes_a_fast_tokenizer_where_only_a_vocabulary_is_there(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("\n".join(tiny_models.vocabulary()), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    processor, files = read_processor(source(tmp_path), CONFIG)
    tokenizer = Tokenizer.from_buffer(files[TOKENIZER])
    assert tokenizer.encode("The man").tokens == ["[CLS]", "the", "man", "[SEP]"]
    assert processor.pad_id == 1


def test_small_questions() -> None:
    assert pad_id({"pad_token_id": None}) == 0
    assert not takes_pairs("fill-mask", CONFIG)
    assert not takes_pairs("question-answering", CONFIG | {"type_vocab_size": 1})
    assert takes_pairs("question-answering", CONFIG)
