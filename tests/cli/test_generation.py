"""run, chat, eval, bench and inspect of a language model: the real command on small real bundles."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import decoder_graphs
import numpy as np
import psutil
import pytest
from real_command import assert_refused, cold, command, environment, listing, ok, warm

import hasten
from runtimes.tasks.generate import Generator

TEXT = "the cat sat on the mat\n" * 20


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``talk``: a tiny model with a chat template; ``base``: without; ``endless``: never ends by itself."""
    root = tmp_path_factory.mktemp("decoders")
    tokenizer = decoder_graphs.byte_level(root / "tokenizer.json")
    decoder_graphs.write_decoder(root / "talk", decoder_graphs.tiny_llama(context=512), tokenizer)
    decoder_graphs.write_decoder(root / "base", decoder_graphs.tiny_llama(1), tokenizer, template="")
    endless = decoder_graphs.tiny_llama(2, context=1 << 16)
    decoder_graphs.write_decoder(root / "endless", endless, tokenizer, generation={"eos": ()})
    return root


@pytest.fixture(scope="module")
def talk(place: Path) -> Iterator[Generator]:
    """The model of ``talk``, in this process."""
    with hasten.load(place / "talk") as model:
        assert isinstance(model, Generator)
        yield model


# run --------------------------------------------------------------------------------------------------------------


def test_a_prompt_is_continued_or_answered(place: Path, talk: Generator) -> None:
    words = ("--prompt", "the cat", "--max-new-tokens", "12")
    answered = ok(cold("run", place / "talk", *words))
    expected = talk.generate([{"role": "user", "content": "the cat"}], max_new_tokens=12).text
    assert (answered.out, answered.err) == (expected + "\n" * (not expected.endswith("\n")), "")
    continued = ok(warm("run", place / "talk", *words, "--no-chat")).out
    assert continued.removesuffix("\n") == talk.generate("the cat", max_new_tokens=12).text.removesuffix("\n")
    system = ok(warm("run", place / "talk", *words, "--system", "be brief")).out
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the cat"}]
    assert system.removesuffix("\n") == talk.generate(messages, max_new_tokens=12).text.removesuffix("\n")
    assert len({answered.out, continued, system}) == 3


def test_a_prompt_from_standard_input_and_stats(place: Path) -> None:
    given = ok(warm("run", place / "base", "--prompt", "grüße 東京\n", "--max-new-tokens", "9")).out
    done = ok(cold("run", place / "base", "--prompt", "-", "--max-new-tokens", "9", "--stats", stdin="grüße 東京\n"))
    assert done.out == given
    assert re.fullmatch(r"\d+ tokens of prompt, first text after [\d.]+ s.*; 9 written, reached its limit\n", done.err)
    assert_refused(cold("run", place / "base", "--prompt", "-", stdin=b"\xff\xfe"), 4, "stdin is not UTF-8")


def test_sampling_follows_the_seed(place: Path) -> None:
    def text(*options: str) -> str:
        return ok(warm("run", place / "base", "--prompt", "a dog", "--max-new-tokens", "20", *options)).out

    hot = ("--temperature", "1.5", "--top-k", "50", "--top-p", "0.95", "--min-p", "0.01")
    assert text(*hot, "--seed", "1") == text(*hot, "--seed", "1")
    assert text(*hot, "--seed", "1") != text(*hot, "--seed", "2")
    assert text("--temperature", "0") == text()


def test_stop(place: Path) -> None:
    whole = ok(warm("run", place / "base", "--prompt", "a dog", "--max-new-tokens", "20")).out
    end = whole[3:5]
    cut = ok(warm("run", place / "base", "--prompt", "a dog", "--max-new-tokens", "20", "--stop", end)).out
    assert cut.removesuffix("\n") == whole[: whole.index(end)]


def test_a_text_that_has_to_match(place: Path, tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "y"]}}, "required": ["a"]}
    (tmp_path / "schema.json").write_text(json.dumps({**schema, "additionalProperties": False}))
    told = ok(cold("run", place / "talk", "--prompt", "the cat", "--schema", tmp_path / "schema.json")).out
    assert json.loads(told)["a"] in ("x", "y")
    assert re.fullmatch("[ab]{3}\n", ok(warm("run", place / "base", "--prompt", "the cat", "--regex", "[ab]{3}")).out)
    choices = ("--choice", "yes", "--choice", "no")
    lines = ok(warm("run", place / "talk", "the cat", "a dog", *choices)).out.splitlines()
    assert {json.loads(line)["text"] for line in lines} <= {"yes", "no"}
    assert ok(cold("chat", place / "talk", *choices, stdin="the cat\n")).out.strip() in ("yes", "no")


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (("--regex", "("), 2, "the regex cannot be used"),
        (("--regex", "a", "--choice", "b"), 2, "regex and choices were both given"),
        (("--schema", "absent.json"), 4, "cannot be read"),
        (("--schema", "schema.json"), 2, "Unimplemented keys"),
        (("--schema", "broken.json"), 2, "schema is no JSON"),
    ],
)
def test_forms_that_make_no_sense(place: Path, tmp_path: Path, options: tuple[str, ...], code: int, says: str) -> None:
    (tmp_path / "schema.json").write_text('{"not": {}}')
    (tmp_path / "broken.json").write_text("{")
    told = [str(tmp_path / one) if one.endswith(".json") else one for one in options]
    assert_refused(warm("run", place / "base", "--prompt", "the cat", *told), code, says)


def test_guesses_and_drafts(place: Path, mlp_bundle: Path) -> None:
    words = ("run", place / "base", "--prompt", "the cat the cat the cat", "--max-new-tokens", "30")
    plain = ok(warm(*words)).out
    assert ok(warm(*words, "--speculate", "8")).out == plain
    drafted = ok(cold(*words, "--draft", place / "base", "--stats"))
    assert drafted.out == plain
    assert re.search(r"30 written(, \d+ of \d+ guesses right)?, reached its limit", drafted.err)
    assert_refused(warm(*words, "--draft", mlp_bundle), 2, "a draft is a language model")
    assert_refused(warm(*words, "--speculate", "17"), 2, "17 is not in the range")


def test_many_prompts_are_lines_of_json(place: Path, talk: Generator, tmp_path: Path) -> None:
    done = ok(cold("run", place / "talk", "the cat", "a dog", "--max-new-tokens", "5", "--no-chat"))
    rows = [json.loads(line) for line in done.out.splitlines()]
    assert [row["text"] for row in rows] == [
        talk.generate(text, max_new_tokens=5).text for text in ("the cat", "a dog")
    ]
    assert rows[0].keys() == {"text", "finish", "tokens", "prompt_tokens"}
    records = [
        {"id": 1, "prompt": "the cat"},
        {"id": 2, "messages": [{"role": "user", "content": "the cat"}], "max_new_tokens": 3},
        {"id": 3, "text": "the cat"},
        {"id": 4, "prompt": "the cat", "temperature": 1.0, "n": 2, "seed": 5},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = ("--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl", "--max-new-tokens", "5")
    done = ok(warm("run", place / "talk", *arguments))
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in found] == [1, 2, 3, 4]
    assert found[0]["text"] == rows[0]["text"]
    assert found[1]["tokens"] == 3
    assert found[2]["text"] == talk.generate([{"role": "user", "content": "the cat"}], max_new_tokens=5).text
    assert len(found[3]["texts"]) == 2


def test_variables_of_the_template(tmp_path: Path) -> None:
    template = "{{ greeting }}{{ 7 if n is not defined else n + 1 }}{{ messages[0].content }}"
    tokenizer = decoder_graphs.byte_level(tmp_path / "tokenizer.json", bos=False)
    decoder_graphs.write_decoder(tmp_path / "model", decoder_graphs.tiny_llama(), tokenizer, template=template)
    options = ("--template-option", "greeting=hi there", "--template-option", "n=2", "--max-new-tokens", "8")
    done = ok(warm("run", tmp_path / "model", "--prompt", " cat", *options))
    plain = ok(warm("run", tmp_path / "model", "--prompt", "hi there3 cat", "--no-chat", "--max-new-tokens", "8"))
    assert done.out == plain.out
    rows = ok(warm("run", tmp_path / "model", " cat", *options)).document
    assert rows["text"].removesuffix("\n") == plain.out.removesuffix("\n")
    assert_refused(warm("run", tmp_path / "model", "x", "--template-option", "n"), 2, "'n' is not NAME=VALUE")


# chat -------------------------------------------------------------------------------------------------------------


def test_a_conversation_from_standard_input(place: Path, talk: Generator, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    lines = f"the cat\n\n/save {file}\na <|im_end|> dog\n//reset\n/reset\nthe cat\n"
    done = ok(cold("chat", place / "talk", "--max-new-tokens", "8", stdin=lines))
    messages: list[dict[str, str]] = []
    answers = []
    for said in ("the cat", "a <|im_end|> dog", "/reset"):
        messages.append({"role": "user", "content": said})
        answers.append(talk.generate(messages, max_new_tokens=8).text)
        messages.append({"role": "assistant", "content": answers[-1]})
    assert done.out == "".join(f"{answer}\n" for answer in [*answers, answers[0]])
    assert [json.loads(line) for line in file.read_text().splitlines()] == messages[:2]
    assert done.err.splitlines()[0] == "(the answer reached its limit; /set max_new_tokens changes it)"
    again = ok(warm("chat", place / "talk", "--max-new-tokens", "8")).out
    assert again == ""
    loaded = ok(cold("chat", place / "talk", "--max-new-tokens", "8", stdin=f"/load {file}\na <|im_end|> dog\n"))
    assert loaded.out == f"{answers[1]}\n"


def test_commands_of_a_conversation(place: Path, talk: Generator) -> None:
    lines = (
        '/help\n/system be brief\nthe cat\n/set max-new-tokens 3\n/retry\n/undo\n/set\n"""\none\ntwo\n"""\n/exit\nno\n'
    )
    done = ok(cold("chat", place / "talk", "--max-new-tokens", "8", "--stats", stdin=lines))
    first = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the cat"}]
    last = [first[0], {"role": "user", "content": "one\ntwo"}]
    answers = [talk.generate(first, max_new_tokens=8), talk.generate(first, max_new_tokens=3)]
    answers.append(talk.generate(last, max_new_tokens=3))
    assert done.out == "".join(f"{answer.text}\n" for answer in answers)
    for name in ("help", "reset", "system", "retry", "undo", "set", "save", "load", "exit"):
        assert f"  /{name}" in done.err
    assert "  max_new_tokens 3\n  temperature default" in done.err
    assert done.err.count("tokens of prompt") == 3


def test_old_exchanges_are_forgotten(place: Path) -> None:
    done = ok(cold("chat", place / "talk", "--max-new-tokens", "6", stdin="the cat sat on the mat\n" * 20))
    assert len(done.out) > 8
    assert "(the oldest exchange is forgotten: the model takes 512 tokens)" in done.err


@pytest.mark.parametrize(
    ("lines", "code", "says"),
    [
        ("/nope\n", 2, "there is no command /nope"),
        ("/retry\n", 2, "there is no answer to try again"),
        ("/set warmth 1\n", 2, "there is no option 'warmth'"),
        ("/set top-k many\n", 2, "'many' is no number"),
        ("/set top-p 7\nhello\n", 2, "top_p is 7"),
        ("/load gone.jsonl\n", 4, "gone.jsonl cannot be read"),
        ("/save\n", 2, "no file was named"),
        ("/save .\n", 5, ". exists"),
        ("the cat " * 300 + "\n", 2, "the model takes 512"),
    ],
)
def test_what_a_conversation_refuses(place: Path, tmp_path: Path, lines: str, code: int, says: str) -> None:
    done = cold("chat", place / "talk", stdin=lines, cwd=tmp_path)
    assert_refused(done, code, says)
    assert done.out == ""
    assert listing(tmp_path) == {}


_IN_A_TERMINAL = (
    "import fcntl, runpy, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); sys.argv[0] = 'hasten';"
    "runpy.run_module('hasten', run_name='__main__')"
)


class Terminal:
    """The command with a terminal of its own."""

    def __init__(self, *arguments: str | Path) -> None:
        import pty

        self._ours, theirs = pty.openpty()
        words = [sys.executable, "-c", _IN_A_TERMINAL, *map(str, arguments)]
        self.process = subprocess.Popen(
            words, stdin=theirs, stdout=theirs, stderr=theirs, env=environment(TERM="dumb"), start_new_session=True
        )
        os.close(theirs)
        self.seen = ""

    def type(self, text: str) -> None:
        self.seen = ""
        os.write(self._ours, text.encode())

    def wait_for(self, text: str, seconds: float = 60.0) -> str:
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, self.seen[-2000:]
            if select.select([self._ours], [], [], 0.2)[0]:
                self.seen += os.read(self._ours, 1 << 16).decode("utf-8", "replace")
        return self.seen

    def wait_until_it_waits(self) -> None:
        """Until it sleeps and computes nothing: Python's readline sees a signal that comes between the prompt and the
        waiting for a key only with the next key, and what ends the input is lost where nobody reads yet.
        """
        watched, before = psutil.Process(self.process.pid), None
        while watched.status() != psutil.STATUS_SLEEPING or watched.cpu_times() != before:
            before = watched.cpu_times()
            time.sleep(0.2)

    def finish(self) -> int:
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()
            self.process.wait()
            os.close(self._ours)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_control_c_stops_the_answer_and_not_the_program(place: Path) -> None:
    terminal = Terminal("chat", place / "endless", "--max-new-tokens", "60000", "--stats")
    terminal.wait_for("> ")
    terminal.type("the cat\n")
    terminal.wait_for("\n")
    time.sleep(0.5)
    terminal.type("\x03")
    assert "was stopped" in terminal.wait_for("was stopped")
    terminal.wait_for("> ")
    terminal.wait_until_it_waits()
    terminal.type("\x03")
    terminal.wait_for("Ctrl-D or /exit ends the conversation")
    terminal.wait_until_it_waits()
    terminal.type("/nope\n")
    terminal.wait_for("hasten: there is no command /nope")
    terminal.wait_until_it_waits()
    terminal.type("\x04")
    assert terminal.finish() == 0


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_a_terminal_is_told_no_escape_sequences(place: Path) -> None:
    terminal = Terminal("chat", place / "endless", "--max-new-tokens", "200", "--temperature", "5", "--seed", "3")
    terminal.wait_for("> ")
    terminal.type("the cat\n")
    answer = terminal.wait_for("(the answer reached its limit")
    assert "\ufffd" in answer
    assert set(re.findall(r"[\x00-\x1f\x7f]", answer)) <= {"\r", "\n", "\t"}
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.finish() == 143


# eval and bench ---------------------------------------------------------------------------------------------------


def test_perplexity(place: Path, talk: Generator, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    expected = talk.perplexity(TEXT, window=64)
    done = ok(cold("eval", place / "talk", "--perplexity", tmp_path / "text.txt", "--window", "64", "--json"))
    assert done.document == {
        "name": "tiny",
        "data": str(tmp_path / "text.txt"),
        "window": 64,
        "perplexity": pytest.approx(expected.value, rel=1e-6),
        "loss": pytest.approx(expected.loss, rel=1e-6),
        "tokens": expected.tokens,
    }
    assert (
        f"{expected.value:.4f}"
        in ok(warm("eval", place / "talk", "--perplexity", tmp_path / "text.txt", "--window", "64")).out
    )
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "a dog"}) + "\n" + json.dumps({"text": TEXT}) + "\n")
    both = talk.perplexity(["a dog", TEXT], window=64)
    records = ok(warm("eval", place / "talk", "--perplexity", tmp_path / "texts.jsonl", "--window", "64", "--json"))
    assert records.document["tokens"] == both.tokens
    np.testing.assert_allclose(records.document["perplexity"], both.value, rtol=1e-6)
    cut = ok(warm("eval", place / "talk", "--perplexity", "texts.jsonl", "--max-tokens", "90", "--json", cwd=tmp_path))
    ids = talk.encoder.encode("a dog"), talk.encoder.encode(TEXT)
    parts = [talk.perplexity(ids[0]), talk.perplexity(ids[1][: 90 - len(ids[0])])]
    assert cut.document["tokens"] == 90 - 2 == sum(part.tokens for part in parts)
    loss = sum(part.loss * part.tokens for part in parts) / 88
    np.testing.assert_allclose(cut.document["loss"], loss, rtol=1e-6)
    piped = ok(cold("eval", place / "talk", "--perplexity", "-", "--window", "64", "--json", stdin=TEXT)).document
    assert piped["perplexity"] == done.document["perplexity"]


@pytest.mark.slow
def test_bench(place: Path) -> None:
    quick = ("--batches", "1,2", "--lengths", "16,4000", "--new-tokens", "8", "--seconds", "0.01")
    report = ok(cold("bench", place / "talk", *quick, "--against", place / "base", "--json")).document
    assert [(row["batch"], row["prompt"]) for row in report["rows"]] == [(1, 16), (2, 16)]
    for row in report["rows"]:
        assert 0 < row["p50_ms"] <= row["p99_ms"]
        assert row["first_ms"] > 0
        assert row["prefill_per_second"] > row["batch"]
        assert row["steps"] >= 3 * 7
        assert row["decode_ratio"]["low"] <= row["decode_ratio"]["median"] <= row["decode_ratio"]["high"]
    assert report["peak_bytes"] > 20e6
    assert report["memory_bandwidth"] > 1e8
    assert 10e3 < report["weight_bytes"] < 200e3
    assert report["against"] == f"{place / 'base'}: cpu-fp32 on cpu"
    shown = ok(warm("bench", place / "talk", *quick)).out
    assert re.search(r"prefill +first +decode +weights *\n.*tok/s +token ms +tok/s .* GB/s *\n", shown), shown
    for part in ("batch × prompt", "1 × 16", "of memory"):
        assert part in shown, part


def test_inspect(place: Path) -> None:
    shown = ok(warm("inspect", place / "talk")).out
    for part in ("text-generation", "KV cache", "a token", "has a chat template", "… 2 layers", "at most 512 tokens"):
        assert part in shown, part
    assert "past_key_values.1" not in shown


# Bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("run", "--prompt", ""), "the prompt is empty"),
        (("run", "--prompt", "the cat " * 300), "the model takes 512"),
        (("run", "--prompt", "x", "--top-p", "3"), "top_p is 3"),
        (("run", "--prompt", "x", "--temperature", "nan"), "temperature is nan"),
        (("run", "--prompt", "x", "--top-k", "-2"), "top_k is -2"),
        (("run", "--prompt", "x", "--seed", "-1"), "seed is -1"),
        (("run", "--prompt", "x", "--min-p", "x"), "not a valid float"),
        (("run", "--prompt", "x", "--max-new-tokens", "0"), "max-new-tokens"),
        (("run", "--prompt", "x", "--stop", ""), "stop holds ''"),
        (("run", "--prompt", "x", "--no-chat", "--system", "y"), "--system is for chat"),
        (("run", "--prompt", "x", "--no-chat", "--template-option", "y=1"), "--template-option is for chat"),
        (("run", "--prompt", "x", "--template-option", "messages=1"), "'messages' has a meaning of its own"),
        (("run", "--prompt", "x", "text"), "texts and --prompt were both given"),
        (("run", "--prompt", "x", "--output", "y"), "--output is for several texts"),
        (("run", "--prompt", "x", "--max-tokens", "9"), "--max-tokens is for several texts"),
        (("run", "text", "--stats"), "--stats is for --prompt"),
        (("eval", "--perplexity", "TEXT", "--window", "4000"), "beyond the model's 512"),
        (("bench", "--new-tokens", "511"), "beyond the model's 512"),
        (("bench", "--peer", "x=true"), "--peer is for models"),
        (("bench", "--against", "reference"), "holds no reference variant"),
    ],
)
def test_wishes_that_cannot_be_met(place: Path, tmp_path: Path, arguments: tuple[str, ...], says: str) -> None:
    name, *rest = arguments
    (tmp_path / "TEXT").write_text(TEXT)
    before = listing(tmp_path)
    done = warm(name, place / "talk", *rest, cwd=tmp_path)
    assert_refused(done, 2, says)
    assert done.out == ""
    assert listing(tmp_path) == before


def test_a_model_without_a_chat_template(place: Path) -> None:
    assert_refused(warm("chat", place / "base"), 2, "has no chat template", "--prompt TEXT")
    assert_refused(warm("run", place / "base", "--prompt", "x", "--chat"), 2, "has no chat template")
    record = json.dumps({"messages": [{"role": "user", "content": "x"}]})
    assert_refused(cold("run", place / "base", stdin=record), 4, "stdin, line 1", "no chat template")


@pytest.mark.parametrize(
    ("template", "code", "says"),
    [
        ("{% for", 6, "the chat template is broken: line 1"),
        ("{{ 10 ** (10 ** 9) }}", 6, "did not end within 5 s"),
        ("{{ ''.__class__.__mro__ }}", 6, "does what is forbidden"),
        ("{{ nothing }}", 2, "the prompt is empty"),
        ("{{ raise_exception('no [users] here') }}", 2, "refuses these messages: no [users] here"),
    ],
)
def test_a_template_that_fails(tmp_path: Path, template: str, code: int, says: str) -> None:
    tokenizer = decoder_graphs.byte_level(tmp_path / "tokenizer.json")
    decoder_graphs.write_decoder(tmp_path / "model", decoder_graphs.tiny_llama(), tokenizer, template=template)
    done = warm("run", tmp_path / "model", "--prompt", "hello")
    assert_refused(done, code, says)
    assert done.out == ""
    assert ok(warm("run", tmp_path / "model", "--prompt", "hello", "--no-chat", "--max-new-tokens", "3")).out


def test_data_that_holds_no_text(place: Path, tmp_path: Path) -> None:
    for name, content, says in (
        ("empty.txt", b"", "empty.txt holds no text"),
        ("latin.txt", b"\xff\xfe\xfa", "latin.txt is not UTF-8"),
        ("bad.jsonl", b'{"text": 1}\n', '"text" is not a text'),
        ("worse.jsonl", b"nope\n", "worse.jsonl, line 1 is not JSON"),
    ):
        (tmp_path / name).write_bytes(content)
        assert_refused(warm("eval", place / "base", "--perplexity", name, cwd=tmp_path), 4, says)
    assert_refused(warm("eval", place / "base", "--perplexity", "gone", cwd=tmp_path), 4, "gone cannot be read")
    assert_refused(warm("eval", place / "base"), 2, "--perplexity")


def test_models_of_other_tasks_write_no_texts(mlp_bundle: Path, tmp_path: Path) -> None:
    assert_refused(warm("run", mlp_bundle, "--prompt", "x"), 2, "is a tensors model: it writes no texts")
    assert_refused(warm("run", mlp_bundle, "{}", "--top-k", "3"), 2, "is a tensors model: it writes no texts")
    assert_refused(warm("chat", mlp_bundle), 2, "is a tensors model: it writes no answers")
    (tmp_path / "text.txt").write_text(TEXT)
    assert_refused(warm("eval", mlp_bundle, "--perplexity", tmp_path / "text.txt"), 2, "it predicts no texts")
    assert_refused(warm("bench", mlp_bundle, "--new-tokens", "4"), 2, "it writes no tokens")


def test_a_reader_that_hangs_up(place: Path) -> None:
    words = [*command(), "run", str(place / "endless"), "--prompt", "x", "--max-new-tokens", "60000"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(10)
        process.stdout.close()
        assert process.wait(60) == 141
        assert process.stderr.read() == b""
