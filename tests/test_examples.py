"""The examples run as a user runs them. (examples/my_pass.py: tests/passes/test_pipeline.py.)"""

from __future__ import annotations

import json
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import serving
import task_graphs
from browser import Browser
from real_command import environment
from task_builders import processor

import hasten
from artifacts.bundle import Bundle

ROOT = Path(__file__).resolve().parent.parent


def command(name: str, *arguments: str | Path) -> list[str]:
    return [sys.executable, "-W", "error", str(ROOT / "examples" / name), *map(str, arguments)]


def example(
    name: str, *arguments: str | Path, cwd: Path | None = None, stdin: str = ""
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(name, *arguments), capture_output=True, text=True, env=environment(), timeout=120, cwd=cwd, input=stdin
    )


def test_semantic_search(encoder_bundle: Bundle) -> None:
    done = example("semantic_search.py", str(encoder_bundle.path))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "Why does dough grow?"
    assert len(lines) == 6
    assert all(-1.0 <= float(line.split()[0]) <= 1.0 for line in lines[1::2])
    done = example("semantic_search.py", str(encoder_bundle.path), "What do glaciers do?")
    assert done.stdout.splitlines()[0] == "What do glaciers do?"


def test_semantic_search_without_a_bundle_says_how() -> None:
    done = example("semantic_search.py")
    assert done.returncode == 1
    assert "semantic_search.py BUNDLE" in done.stderr


# --- ask_documents.py


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serving.write_encoder(tmp_path_factory.mktemp("encoder") / "bundle").path


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("reader") / "bundle"
    return task_graphs.write_bundle(out, "question-answering", task_graphs.spans(), text=processor()).path


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    folder = tmp_path / "documents"
    (folder / "deep").mkdir(parents=True)
    (folder / "cats.txt").write_text("the cat eats fish\n\nthe dog is in the house\n")
    (folder / "deep" / "cities.md").write_text("# Cities\n\n" + "paris is a city on a river. " * 60)
    (folder / "empty.txt").write_text("\n\n")
    (folder / "bytes.rst").write_bytes(b"london \xff is green")
    (folder / "picture.png").write_bytes(b"not a text")
    return folder


def ask(cwd: Path, *arguments: str | Path, stdin: str = "") -> tuple[list[str], str]:
    done = example("ask_documents.py", *arguments, cwd=cwd, stdin=stdin)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines(), done.stderr


def test_questions_to_documents(tmp_path: Path, encoder: Path, documents: Path) -> None:
    told, counts = ask(tmp_path, encoder, documents, "the cat eats fish the dog is in the house")
    assert counts == "4 documents embedded, 0 unchanged, 0 gone\n"
    assert told[0] == "the cat eats fish the dog is in the house"
    assert told[1].split(maxsplit=2) == ["1.00", "cats.txt:1", told[0]]
    assert len(told) == 4
    # What has not changed is not embedded again; what was asked before is answered from the cache.
    again, counts = ask(tmp_path, encoder, documents, told[0])
    assert (again, counts) == (told, "0 documents embedded, 4 unchanged, 0 gone\n")
    (documents / "cats.txt").write_text("the bird is blue\n")
    (documents / "deep" / "cities.md").unlink()
    (documents / "new.txt").write_text("john and mary work in berlin")
    told, counts = ask(tmp_path, encoder, documents, "--top", "9", stdin="bird\n\nberlin\n")
    assert counts == "2 documents embedded, 2 unchanged, 1 gone\n"
    assert [line for line in told if not line.startswith(" ")] == ["bird", "berlin"]
    assert sorted(line.split()[1] for line in told[1:4]) == ["bytes.rst:1", "cats.txt:1", "new.txt:1"]
    with sqlite3.connect(tmp_path / "documents.sqlite") as database:
        assert database.execute("SELECT count(*) FROM passages").fetchone() == (3,)
    database.close()


def test_long_documents_are_cut_into_passages(tmp_path: Path, encoder: Path, documents: Path) -> None:
    ask(tmp_path, encoder, documents, "paris")
    with sqlite3.connect(tmp_path / "documents.sqlite") as database:
        rows = database.execute(
            "SELECT line, text FROM passages WHERE path = 'deep/cities.md' ORDER BY rowid"
        ).fetchall()
    database.close()
    assert [line for line, _ in rows] == [1, 3, 3]
    assert all(len(text) <= 700 for _, text in rows)
    assert " ".join(text for _, text in rows).split() == (documents / "deep" / "cities.md").read_text().split()


def test_a_reader_cuts_the_answer_out(tmp_path: Path, encoder: Path, reader: Path, documents: Path) -> None:
    told, _ = ask(tmp_path, encoder, documents, "where is the dog ?", "--reader", reader)
    passages = " ".join(path.read_text(errors="replace") for path in documents.rglob("*.*") if path.suffix != ".png")
    assert told[1].startswith("  = ")
    assert told[1].removeprefix("  = ") in passages


def test_another_model_starts_anew(tmp_path: Path, encoder: Path, documents: Path) -> None:
    graph = task_graphs.embedder("last_hidden_state")
    other = task_graphs.write_bundle(tmp_path / "other", "feature-extraction", graph, text=processor())
    ask(tmp_path, encoder, documents, "paris")
    _, counts = ask(tmp_path, other.path, documents, "paris")
    assert counts == "4 documents embedded, 0 unchanged, 0 gone\n"


def test_serving_needs_no_compiler(tmp_path: Path, encoder: Path, documents: Path) -> None:
    """What hasten[serve] installs is enough."""
    without = ("torch", "transformers", "onnx", "onnx_ir", "onnxscript", "optimum", "scipy", "requests", "compiler")
    code = f"import runpy, sys\nsys.modules |= dict.fromkeys({without!r})\n"
    code += "sys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    words = [sys.executable, "-c", code, str(ROOT / "examples" / "ask_documents.py"), str(encoder), str(documents), "a"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("a\n")


def test_documents_that_are_none(tmp_path: Path, encoder: Path) -> None:
    done = example("ask_documents.py", encoder, tmp_path / "nowhere", "a", cwd=tmp_path)
    assert (done.returncode, done.stderr.splitlines()[-1].endswith("nowhere is no folder")) == (2, True)
    (tmp_path / "bare").mkdir()
    done = example("ask_documents.py", encoder, tmp_path / "bare", "a", cwd=tmp_path)
    assert "there is no text in" in done.stderr
    done = example("ask_documents.py", tmp_path / "bare", tmp_path / "bare", "a", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("ask_documents: ")
    assert "Traceback" not in done.stderr


# --- classify_file.py


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serving.write_classifier(tmp_path_factory.mktemp("classifier") / "bundle").path


WORDS = ["the", "cat", "eats", "fish", "in", "london", "and", "the", "dog", "sleeps", "in", "paris"]


def texts(count: int) -> list[str]:
    return [" ".join(WORDS[(index * 7 + place) % len(WORDS)] for place in range(index % 9)) for index in range(count)]


def test_a_file_is_classified(tmp_path: Path, classifier: Path) -> None:
    given = texts(3000)
    (tmp_path / "in.txt").write_text("\n".join(given))
    done = example("classify_file.py", classifier, tmp_path / "in.txt", tmp_path / "out.jsonl")
    assert done.returncode == 0, done.stderr
    assert "3,000 lines" in done.stderr
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    with hasten.load(classifier, device="cpu") as model:
        wanted = model.classify(given)
    assert [row["label"] for row in rows] == [one.label for one in wanted]
    assert [row["score"] for row in rows] == pytest.approx([one.score for one in wanted], abs=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "out.jsonl"]


def test_what_was_interrupted_goes_on(tmp_path: Path, classifier: Path) -> None:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text, "more": 1}) + "\n" for text in texts(60_000)))
    running = subprocess.Popen(
        command("classify_file.py", classifier, tmp_path / "in.jsonl", tmp_path / "out.jsonl"),
        stderr=subprocess.PIPE,
        env=environment(),
    )
    part = tmp_path / "out.part"
    until = time.monotonic() + 60
    while not (part.exists() and part.stat().st_size > 100_000) and time.monotonic() < until:
        time.sleep(0.005)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    before = part.read_bytes()
    assert 0 < before.count(b"\n") < 60_000
    part.write_bytes(before + b'{"label": "ha')
    # Another input is not taken for the same.
    (tmp_path / "other.jsonl").write_text('{"text": "a"}\n')
    done = example("classify_file.py", classifier, tmp_path / "other.jsonl", tmp_path / "out.jsonl")
    assert done.returncode == 1
    assert "of another input or model" in done.stderr
    done = example("classify_file.py", classifier, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert done.returncode == 0, done.stderr
    assert f"goes on after {before.count(chr(10).encode()):,} lines" in done.stderr
    after = (tmp_path / "out.jsonl").read_bytes()
    assert after.startswith(before[: before.rindex(b"\n") + 1])
    assert after.count(b"\n") == 60_000
    assert [json.loads(line)["label"] for line in after.splitlines()[:20]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\nnot json\n', "line 2 is no JSON"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', 'line 2 has no "text"'),
        ("none.txt", None, "is no file"),
    ],
)
def test_files_that_are_none(tmp_path: Path, classifier: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    done = example("classify_file.py", classifier, tmp_path / name, tmp_path / "out.jsonl")
    assert done.returncode in {1, 2}
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


# --- chat_page.py


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of the page of a chat model that runs, and ends well."""
    bundle = serving.write_decoder(tmp_path_factory.mktemp("chat"), context=2048).path
    running = subprocess.Popen(
        command("chat_page.py", bundle, "--port", "0"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        text=True,
    )
    assert running.stdout is not None
    url = running.stdout.readline().strip()
    assert url.startswith("http://127.0.0.1:"), running.communicate()
    yield url
    running.send_signal(signal.SIGINT)
    _, told = running.communicate(timeout=60)
    assert running.returncode == 0, told
    assert "Traceback" not in told


def test_the_chat_page_and_the_api_beside_it(chat: str) -> None:
    with urllib.request.urlopen(chat) as answer:
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert b"<textarea" in answer.read()
    base = chat.removesuffix("/chat")
    asked = {"model": "chat", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
    request = urllib.request.Request(
        f"{base}/v1/chat/completions", json.dumps(asked).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        assert json.load(answer)["usage"]["completion_tokens"] <= 5
    with urllib.request.urlopen(f"{base}/v1/models") as answer:
        assert [one["id"] for one in json.load(answer)["data"]] == ["chat"]


def test_the_chat_page_in_a_browser(chat: str, tmp_path: Path) -> None:
    with Browser(tmp_path) as browser:
        browser.go(chat)
        browser.type("textarea", "hello <b>you</b>")
        browser.click("button")
        browser.wait("document.querySelector('.assistant')?.textContent.length > 3")
        assert browser.text(".user") == "hello <b>you</b>"
        browser.wait(
            "document.querySelector('button').textContent === 'Send' || "
            "(document.querySelector('button').click(), false)"
        )
        browser.type("textarea", "more")
        browser.click("button")
        browser.wait("document.querySelectorAll('.assistant').length === 2")
        assert browser.run("document.querySelectorAll('.error').length") == 0
        assert browser.said == []


def test_a_chat_page_without_a_model(tmp_path: Path) -> None:
    done = example("chat_page.py", tmp_path, "--port", "0")
    assert done.returncode == 1
    assert done.stderr.startswith("chat_page: ")
    assert "Traceback" not in done.stderr


def test_every_example_is_tested() -> None:
    named = {"my_pass.py", "semantic_search.py", "ask_documents.py", "classify_file.py", "chat_page.py"}
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == named
