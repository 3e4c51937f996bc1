from __future__ import annotations

import json
from pathlib import Path

import pytest

from artifacts.errors import DataError, UsageError
from compiler.data import NEUTRAL, Dataset, Row, items, neutral, read_data, with_masks

EMBED, CLASSIFY, ANSWER = "feature-extraction", "text-classification", "question-answering"


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_jsonl_by_usual_names(tmp_path: Path) -> None:
    rows = [{"sentence1": "a", "sentence2": "b", "score": 4.5}, {"sentence1": "c", "sentence2": "d", "score": "3"}]
    path = write(tmp_path / "d.jsonl", "\n\n".join(json.dumps(row) for row in rows))
    data = read_data(path, None, EMBED)
    assert data == Dataset((Row("a", "b", 4.5), Row("c", "d", 3.0)), "d.jsonl", labelled=True)


def test_jsonl_labels_of_classes(tmp_path: Path) -> None:
    rows = [{"text": "good", "label": "POS"}, {"text": "bad", "label": 0}, {"text": "ugly", "label": True}]
    data = read_data(write(tmp_path / "d.jsonl", "\n".join(map(json.dumps, rows))), None, CLASSIFY)
    assert [row.label for row in data.rows] == ["POS", "0", "1"]
    assert data.labelled
    assert not read_data(tmp_path / "d.jsonl", None, EMBED).labelled  # a class is no similarity
    assert not read_data(tmp_path / "d.jsonl", None, "fill-mask").labelled


def test_jsonl_questions(tmp_path: Path) -> None:
    row = {"question": "who", "context": "the man", "answers": {"text": ["man"]}}
    path = write(tmp_path / "d.jsonl", json.dumps(row))
    assert read_data(path, None, ANSWER).rows == (Row("who", "the man"),)
    with pytest.raises(DataError, match="no contexts"):
        read_data(write(tmp_path / "e.jsonl", '{"question": "who"}'), None, ANSWER)


def test_jsonl_columns_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", '{"body": "x", "stars": 5}')
    assert read_data(path, "text=body,label=stars", CLASSIFY).rows == (Row("x", None, "5"),)
    with pytest.raises(DataError, match=r"no column boddy. Its columns are body, stars"):
        read_data(path, "text=boddy", CLASSIFY)
    with pytest.raises(DataError, match=r"no column that looks like text; its columns are body, stars"):
        read_data(path, None, CLASSIFY)


@pytest.mark.parametrize(
    ("line", "text"),
    [("{", "is not JSON"), ("[1]", "no JSON object"), ('{"text": 3}', "int as text"), ("[" * 100_000, "is not JSON")],
)
def test_bad_json_lines_are_named(tmp_path: Path, line: str, text: str) -> None:
    path = write(tmp_path / "d.jsonl", '{"text": "fine"}\n' + line)
    with pytest.raises(DataError, match=text) as caught:
        read_data(path, None, EMBED)
    assert "line 2" in str(caught.value)


def test_csv_with_quotes_and_a_header(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", 'label,text\r\n1,"He said ""no"", twice"\r\n0,"two\nlines"\r\n')
    assert read_data(path, None, CLASSIFY).rows == (
        Row('He said "no", twice', None, "1"),
        Row("two\nlines", None, "0"),
    )


def test_tabs_without_quoting(tmp_path: Path) -> None:
    content = '0\tx\t4.0\t"Go" he said, "now\tA "b" c\n1\tx\t2.5\t"whole ""field"""\tplain\textra\n'
    path = write(tmp_path / "sts.csv", content)
    assert read_data(path, "text=3,pair=4,label=2", EMBED).rows == (
        Row('"Go" he said, "now', 'A "b" c', 4.0),
        Row('whole "field"', "plain", 2.5),
    )


def test_positional_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", "nice film,1\nbad film,0\n")
    assert read_data(path, "text,label", CLASSIFY).rows == (Row("nice film", None, "1"), Row("bad film", None, "0"))
    named = write(tmp_path / "e.tsv", "sentence\tlabel\nnice\t1\n")
    assert read_data(named, None, CLASSIFY).rows == read_data(named, "text,label", CLASSIFY).rows
    assert read_data(named, None, CLASSIFY).rows == (Row("nice", None, "1"),)
    path = write(tmp_path / "d.jsonl", '{"text": "x", "label": 1}')
    assert read_data(path, "text,label", CLASSIFY).rows == (Row("x", None, "1"),)


def test_semicolons_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = write(tmp_path / "d.csv", b"\xef\xbb\xbftext;label\nx;1\n")
    assert read_data(path, None, CLASSIFY).rows == (Row("x", None, "1"),)


def test_columns_without_names_must_be_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="3 columns without names"):
        read_data(write(tmp_path / "d.csv", "1,2,3\n"), None, EMBED)
    with pytest.raises(DataError, match=r"no column 7. Its columns are 0 to 2, without names"):
        read_data(tmp_path / "d.csv", "text=7", EMBED)
    with pytest.raises(DataError, match=r"line 2 of .* has 1 columns, and column 2 is wanted"):
        read_data(write(tmp_path / "e.csv", "1,2,3\n4\n"), "text=2", EMBED)


@pytest.mark.parametrize(
    "columns", ["", "label=1", "text=0,text=1", "colour=1", "text=", "text=0,label", "text,,label"]
)
def test_bad_columns(tmp_path: Path, columns: str) -> None:
    with pytest.raises(UsageError, match="--columns"):
        read_data(write(tmp_path / "d.csv", "1,2,3\n"), columns, EMBED)


@pytest.mark.parametrize("score", ["nan", "inf", "-inf", "abc", "1e999"])
def test_scores_must_be_finite(tmp_path: Path, score: str) -> None:
    path = write(tmp_path / "d.tsv", f"sentence1\tsentence2\tscore\na\tb\t1\nc\td\t{score}\n")
    with pytest.raises(DataError, match=r"line 3 of .* has the score"):
        read_data(path, None, EMBED)
    path = write(tmp_path / "d.jsonl", '{"text": "a", "pair": "b", "score": NaN}')
    with pytest.raises(DataError, match="line 1"):
        read_data(path, None, EMBED)


@pytest.mark.parametrize("name", ["d.txt", "d.csv", "d.jsonl", "d.tsv"])
@pytest.mark.parametrize("content", [b"", b"\n \n\t\n"])
def test_empty_files(tmp_path: Path, name: str, content: bytes) -> None:
    with pytest.raises(DataError, match=f"{name} is empty"):
        read_data(write(tmp_path / name, content), None, EMBED)


def test_header_only(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is empty"):
        read_data(write(tmp_path / "d.csv", "text,label\n"), None, CLASSIFY)


@pytest.mark.parametrize("name", ["d.txt", "d.csv", "d.jsonl"])
def test_not_utf8_names_the_byte(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, b'"text"\n"fine"\nab\xe9cd\n')
    if name == "d.jsonl":
        path = write(tmp_path / name, b'"text"\n"fine"\nab\xe9cd\n')
    with pytest.raises(DataError, match=r"is not UTF-8: byte 16 is 0xe9 \(line 3\)"):
        read_data(path, None, EMBED)


@pytest.mark.parametrize("name", ["d.txt", "d.csv", "d.jsonl"])
def test_gigantic_lines_are_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, b'"text"\n"' + b"x" * 1_000_001 + b'"\n')
    with pytest.raises(DataError, match=r"line 2 of .* is longer than 1,000,000 bytes"):
        read_data(path, None, EMBED)


def test_a_line_of_exactly_the_limit_is_fine(tmp_path: Path) -> None:
    path = write(tmp_path / "d.txt", b"x" * 1_000_000 + b"\r\nnext\r\n")
    assert [len(row.text) for row in read_data(path, None, EMBED).rows] == [1_000_000, 4]


def test_broken_csv(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not valid CSV"):
        read_data(write(tmp_path / "d.csv", 'text,label\n"open,1\n'), None, CLASSIFY)


def test_paths(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.csv"):
        with pytest.raises(DataError, match="there is no data file"):
            read_data(path, None, EMBED)
    with pytest.raises(DataError, match=r"unknown suffix \.parquet"):
        read_data(write(tmp_path / "d.parquet", "x"), None, EMBED)


def test_txt_is_one_text_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "d.txt", "one, two\tthree\n\n  \nvier\n")
    assert [row.text for row in read_data(path, None, EMBED).rows] == ["one, two\tthree", "vier"]


def test_split_is_disjoint_and_repeats(tmp_path: Path) -> None:
    data = Dataset(tuple(Row(str(index)) for index in range(50)), "d", labelled=False)
    calibration, held_out = data.split(7, 10, 20)
    assert (len(calibration.rows), len(held_out.rows)) == (10, 20)
    assert not set(calibration.rows) & set(held_out.rows)
    assert data.split(7, 10, 20) == (calibration, held_out)
    assert data.split(8, 10, 20)[0] != calibration
    assert [len(part.rows) for part in data.split(0, 0, 20)] == [0, 20]
    assert [len(part.rows) for part in data.split(0, 300, 300)] == [25, 25]
    assert [len(part.rows) for part in data.split(0, 1000, 1)] == [49, 1]
    one = Dataset((Row("x"),), "d", labelled=False)
    assert one.split(0, 5, 5) == (one, one)


def test_neutral_text() -> None:
    data = neutral(EMBED)
    assert (data.name, data.labelled) == (NEUTRAL, False)
    assert len(data.rows) >= 120
    assert len({row.text for row in data.rows}) == len(data.rows)
    lengths = [len(row.text.split()) for row in data.rows]
    assert min(lengths) <= 3
    assert max(lengths) >= 30
    assert all(row.pair and row.text.endswith("?") for row in neutral(ANSWER).rows)
    assert read_data(None, None, CLASSIFY) == neutral(CLASSIFY)


def test_masks() -> None:
    data = Dataset((Row("the man is here"), Row("a [MASK] b"), Row("one")), "d", labelled=False)
    masked = with_masks(data, "[MASK]", 3)
    assert [row.text.count("[MASK]") for row in masked.rows] == [1, 1, 1]
    assert masked.rows[1].text == "a [MASK] b"
    assert len(masked.rows[0].text.split()) == 4
    assert with_masks(data, "[MASK]", 3) == masked


def test_items() -> None:
    pairs = (Row("a", "b"), Row("c", "d"))
    assert items(pairs, EMBED) == ["a", "c", "b", "d"]
    assert items(pairs, CLASSIFY) == [("a", "b"), ("c", "d")]
    assert items((Row("a"), Row("c", "d")), EMBED) == ["a", "c"]


def test_shared_data(request: pytest.FixtureRequest) -> None:
    shared = request.config.rootpath.parent / "shared" / "data"
    if not shared.is_dir():
        pytest.skip(f"no shared data at {shared}")
    stsb = read_data(shared / "stsb" / "sts-dev.csv", "text=5,pair=6,label=4", EMBED)
    assert (len(stsb.rows), stsb.labelled) == (1500, True)
    assert all(isinstance(row.label, float) and 0 <= row.label <= 5 for row in stsb.rows)
    sst2 = read_data(shared / "sst2" / "test.tsv", None, CLASSIFY)
    assert (len(sst2.rows), sst2.labelled) == (872, True)
    assert {row.label for row in sst2.rows} == {"0", "1"}
