"""Lists of tokens in files, good and bad."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models

from artifacts.errors import OutputError, UsageError
from compiler.source import ModelSource, read_source
from compiler.vocabulary import read_vocabulary, tokens_of, write_vocabulary


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return read_source(str(tiny_models.write_model(tmp_path_factory.mktemp("list") / "m")))


def read(
    folder: Path, content: bytes | str, name: str = "tokens.txt", source: ModelSource | None = None
) -> tuple[str, ...]:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_vocabulary(path, source).tokens


def test_a_line_is_a_token(tmp_path: Path) -> None:
    assert read(tmp_path, "the\n##ing\n\n the \nthe\n▁a\n") == ("the", "##ing", " the ", "▁a")
    assert read(tmp_path, b"\xef\xbb\xbfthe\r\ncat") == ("the", "cat"), "as Windows writes it"
    assert read(tmp_path, "a\u2028b\x0b\n") == ("a\u2028b\x0b",), "only \\n ends a line"


def test_json_lists_and_objects(tmp_path: Path) -> None:
    assert read(tmp_path, '["the", "\\n", "the"]', "tokens.json") == ("the", "\n")
    assert read(tmp_path, '{"the": 5, "cat": 9}', "vocab.JSON") == ("the", "cat")


@pytest.mark.parametrize(
    ("content", "name", "reason"),
    [
        ("", "tokens.txt", "names no token"),
        ("\n\n", "tokens.txt", "names no token"),
        ("[]", "tokens.json", "names no token"),
        (b"the\n\xff\xfe", "tokens.txt", "is not UTF-8: byte 4 is 0xff"),
        ("[1, 2]", "tokens.json", "is no JSON list of tokens"),
        ('"the"', "tokens.json", "is no JSON list of tokens"),
        ("[" * 100_000, "tokens.json", "is not JSON"),
        ("the", "tokens.json", "is not JSON"),
    ],
)
def test_what_is_no_list_is_told(tmp_path: Path, content: bytes | str, name: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as told:
        read(tmp_path, content, name)
    assert "\n" not in str(told.value)


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_vocabulary(tmp_path / "absent.txt")
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        read_vocabulary(tmp_path)
    monkeypatch.setattr("compiler.vocabulary.lists._MOST_BYTES", 1 << 20)
    with pytest.raises(UsageError, match="larger than 1 MiB"):
        read(tmp_path, b"x" * ((1 << 20) + 1))


def test_unknown_tokens_are_told_before_the_export(tmp_path: Path, source: ModelSource) -> None:
    assert read(tmp_path, "the\ncat\n", source=source) == ("the", "cat")
    with pytest.raises(UsageError, match=r"tokens.txt names 'Ġthe' and 2 more, which the model's tokenizer does not"):
        read(tmp_path, "the\nĠthe\ncat\nzebra\nquux\n", source=source)
    with pytest.raises(UsageError, match=r"tokens.txt names 'zebra', which the model's") as told:
        read(tmp_path, "zebra", source=source)
    assert "##ing" in told.value.remedy


def test_a_tokenizer_that_is_not_at_hand_is_looked_at_later(tmp_path: Path) -> None:
    folder = tiny_models.write_model(tmp_path / "m")
    source = read_source(str(folder))
    (folder / "tokenizer.json").write_text("{")
    assert read(tmp_path, "zebra", source=source) == ("zebra",)


def test_a_list_from_texts(tmp_path: Path, source: ModelSource) -> None:
    tokens = tokens_of(source, ["the cat", "the dog ran", *["the park"] * 2000])
    assert tokens[:2] == ("the", "park")
    assert set(tokens) == {"the", "park", "cat", "dog", "r", "##a", "##n"}
    for name in ("tokens.txt", "tokens.json"):
        write_vocabulary(tokens, tmp_path / name)
        assert read_vocabulary(tmp_path / name, source).tokens == tokens


def test_tokens_with_line_breaks_need_json(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"'\\n' has a line break") as told:
        write_vocabulary(["a", "\n"], tmp_path / "tokens.txt")
    assert ".json" in told.value.remedy
    write_vocabulary(["a", "\n"], tmp_path / "tokens.json")
    assert json.loads((tmp_path / "tokens.json").read_text()) == ["a", "\n"]
    with pytest.raises(OutputError, match="cannot be written"):
        write_vocabulary(["a"], tmp_path / "absent" / "tokens.txt")
