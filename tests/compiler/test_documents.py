from __future__ import annotations

import json
from pathlib import Path

import pytest

from artifacts.errors import DataError, UsageError
from compiler.data import NEUTRAL, neutral, read_data
from compiler.documents import passages, read_documents

TASK = "text-generation"
STORY = "One day, a girl found a needle.\n\n    She knew\tit was sharp.\n" * 200


@pytest.mark.parametrize("text", [STORY, "a" * 5000, "a b" * 3000, " x" * 4000, "é" * 3000 + " ", "short"])
def test_passages_lose_nothing(text: str) -> None:
    pieces = list(passages(text, 512))
    assert "".join(pieces) == text.rstrip() or "".join(pieces) == text
    assert all(0 < len(piece) <= 512 for piece in pieces)


def test_words_stay_whole() -> None:
    pieces = list(passages("needle " * 500, 100))
    assert {word for piece in pieces for word in piece.split()} == {"needle"}


def test_blank_pieces_are_left_out() -> None:
    assert list(passages(" " * 5000, 512)) == []
    assert list(passages("", 512)) == []


def test_a_text_file_is_running_text(tmp_path: Path) -> None:
    file = tmp_path / "code.txt"
    file.write_text("def f():\n\n    return 1\n", encoding="utf-8")
    data = read_data(file, None, TASK)
    assert [row.text for row in data.rows] == ["def f():\n\n    return 1"]
    assert (data.name, data.labelled) == ("code.txt", False)
    (words,) = {len(read_data(file, None, "fill-mask").rows)}
    assert words == 2, "other tasks read lines"


def test_a_separator_parts_texts(tmp_path: Path) -> None:
    file = tmp_path / "stories.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo\n<|endoftext|>\nthree<|endoftext|>\n\n<|endoftext|>")
    assert read_documents(file) == ("one\ntwo", "three")


def test_records_are_texts_of_any_length(tmp_path: Path) -> None:
    file = tmp_path / "stories.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in (STORY, "short")))
    rows = read_data(file, None, TASK).rows
    assert len(rows) > 2
    assert rows[-1].text == "short"
    assert "".join(row.text for row in rows[:-1]) == STORY
    file = tmp_path / "stories.csv"
    file.write_text("id,story\n1,a long tale\n")
    assert [row.text for row in read_data(file, "text=story", TASK).rows] == ["a long tale"]


def test_only_so_much_of_a_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "long.txt"
    file.write_text("é" * 100, encoding="utf-8")
    monkeypatch.setattr("compiler.documents.MOST_BYTES", 11)
    assert read_documents(file) == ("é" * 5,)


@pytest.mark.parametrize("content", [b"caf\xe9 au lait and more", b"text that ends in half a character \xc3"])
def test_not_utf_8(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "latin.txt"
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"is not UTF-8: byte (3 is 0xe9|35 is 0xc3)"):
        read_data(file, None, TASK)


def test_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n <|endoftext|> \n")
    with pytest.raises(DataError, match="is empty"):
        read_data(tmp_path / "empty.txt", None, TASK)
    with pytest.raises(DataError, match="there is no data file"):
        read_data(tmp_path / "missing.txt", None, TASK)
    with pytest.raises(UsageError, match="has no columns"):
        read_data(tmp_path / "empty.txt", "text=0", TASK)


def test_neutral_text_is_joined() -> None:
    data = neutral(TASK)
    assert data.name == NEUTRAL
    assert 4 <= len(data.rows) <= 16
    assert " ".join(row.text.strip() for row in data.rows) == " ".join(row.text for row in neutral("fill-mask").rows)
