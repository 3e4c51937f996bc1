from __future__ import annotations

import io
import itertools
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from task_graphs import embedder, spans, write_bundle

import runtimes.jsonl as jsonl
from artifacts.errors import DataError, OutputError, ProviderError, UsageError
from artifacts.target import CPU_PROVIDER
from runtimes.jsonl import read_records, run_records, to_line, write_rows
from runtimes.session import Session
from runtimes.tasks import TASKS, Task


def read(data: bytes, **options: object) -> list[object]:
    return list(read_records(io.BytesIO(data), **options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Task]]:
    folder = tmp_path_factory.mktemp("jsonl")
    opened = {}
    for task, graph in (("feature-extraction", embedder()), ("question-answering", spans())):
        bundle = write_bundle(folder / task, task, graph)
        variant = bundle.manifest.variants[0]
        session = Session(bundle.path / variant.model, CPU_PROVIDER, options=variant.session, threads=1)
        opened[task] = TASKS[task](bundle, session)
    yield opened
    for model in opened.values():
        model.close()


# --- reading


def test_lines_of_text_are_records() -> None:
    assert read(b"one\n\n  \ntwo\r\nthree") == [(1, "one"), (4, "two"), (5, "three")]


def test_the_first_line_decides_the_form() -> None:
    assert read(b'\n{"text": "a"}\n"b"\n') == [(2, {"text": "a"}), (3, "b")]
    assert read(b'say\n{"text": "a"}\n') == [(1, "say"), (2, '{"text": "a"}')]
    assert read(b'{"text": "a"}\n', form="text") == [(1, '{"text": "a"}')]


def test_a_byte_order_mark_is_dropped() -> None:
    assert read(b"\xef\xbb\xbf" + b'{"text": "a"}\n') == [(1, {"text": "a"})]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"a": 1}\n{"a": \n', "line 2 is not JSON"),
        (b'{"a": 1}\n3\n', "line 2 is not a JSON object"),
        (b'{"a": 1}\n[1]\n', "line 2 is not a JSON object"),
        (b"fine\n\xff\xfe\n", "line 2 is not UTF-8"),
        (b'{"a": ' + b"[" * 200_000 + b"\n", "line 1 is nested too deeply"),
        (b'{"a": ' + b"9" * 10_000 + b"}\n", "line 1 is not JSON"),
    ],
)
def test_bad_lines_are_named(data: bytes, words: str) -> None:
    with pytest.raises(DataError, match=rf"data\.jsonl, {words}"):
        read(data, name="data.jsonl")


def test_a_gigantic_line_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE", 1 << 20)
    read(b"x" * (1 << 20))
    with pytest.raises(DataError, match="line 1 is longer than 1 MiB"):
        read(b"x" * ((1 << 20) + 1))


def test_nothing_gives_no_records() -> None:
    assert read(b"") == []


# --- running


def test_results_come_in_order_with_their_ids(models: dict[str, Task]) -> None:
    model = models["feature-extraction"]
    texts = ["hello " * n for n in (30, 1, 0, 7)]
    records = [(1, texts[0]), (2, {"text": texts[1], "id": "b"}), (3, texts[2]), (9, {"text": texts[3]})]
    rows = list(run_records(model, records, chunk=3))  # type: ignore[arg-type]
    assert [set(row) for row in rows] == [{"embedding"}, {"id", "embedding"}, {"embedding"}, {"embedding"}]
    assert rows[1]["id"] == "b"
    for row, vector in zip(rows, model.embed(texts), strict=True):
        assert row["embedding"] == pytest.approx(vector.tolist(), abs=1e-6)


def test_a_bad_record_is_named_by_its_line(models: dict[str, Task]) -> None:
    with pytest.raises(DataError, match='data, line 7: field "text" is missing'):
        list(run_records(models["feature-extraction"], [(3, "a"), (7, {"x": 1}), (8, "b")], name="data"))
    with pytest.raises(DataError, match='stdin, line 1: field "question" is missing'):
        list(run_records(models["question-answering"], [(1, "a")]))


def test_an_endless_stream_is_answered_as_it_comes(models: dict[str, Task]) -> None:
    read_so_far = itertools.count()
    stream = ((next(read_so_far), "hello") for _ in itertools.repeat(None))
    next(run_records(models["feature-extraction"], stream, chunk=1))
    assert next(read_so_far) == 1


@pytest.mark.parametrize("options", [{"chunk": 0}, {"max_tokens": 0}])
def test_sizes_are_positive(models: dict[str, Task], options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="counts"):
        list(run_records(models["feature-extraction"], [(1, "a")], **options))


# --- writing


def test_a_line_is_utf8_json() -> None:
    assert to_line({"text": "é😀"}) == '{"text": "é😀"}\n'.encode()
    assert json.loads(to_line({"id": "\ud800"})) == {"id": "?"}
    with pytest.raises(ProviderError, match="not finite"):
        to_line({"score": float("nan")})


def test_rows_are_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    assert write_rows(({"i": i} for i in range(1000)), path) == 1000
    assert [json.loads(line)["i"] for line in path.read_text().splitlines()] == list(range(1000))
    assert write_rows([], path) == 0
    assert path.read_bytes() == b""
    assert [child.name for child in tmp_path.iterdir()] == ["out.jsonl"]


def test_a_failure_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"old\n")

    def rows() -> Iterator[dict[str, object]]:
        yield {"a": 1}
        raise DataError("line 2 is bad")

    with pytest.raises(DataError):
        write_rows(rows(), path)
    assert path.read_bytes() == b"old\n"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_link_is_followed(tmp_path: Path) -> None:
    real = tmp_path / "real.jsonl"
    real.write_bytes(b"")
    (tmp_path / "link").symlink_to(real)
    write_rows([{"a": 1}], tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert real.read_bytes() == b'{"a": 1}\n'


def test_devices_are_written_to_directly() -> None:
    assert write_rows([{"a": 1}], Path(os.devnull)) == 1
    assert stat.S_ISCHR(Path(os.devnull).stat().st_mode)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_output_error() -> None:
    with pytest.raises(OutputError, match="No space left"):
        write_rows(({"a": "x" * 1000} for _ in range(1000)), Path("/dev/full"))


def test_places_that_cannot_be_written_are_output_errors(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is a folder"):
        write_rows([], tmp_path)
    with pytest.raises(OutputError, match=r"cannot be written: .*missing does not exist"):
        write_rows([], tmp_path / "missing" / "out.jsonl")
