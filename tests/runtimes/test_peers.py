from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from task_graphs import embedder, write_bundle

from artifacts.bundle import Bundle
from artifacts.errors import ProviderError, UsageError
from runtimes.bench import bench
from runtimes.peers import Peer, parse_peer

ROOT = Path(__file__).resolve().parents[2]
STEADY = """
import json, sys, time
for line in sys.stdin:
    request = json.loads(line)
    if request["op"] == "exit":
        break
    calls = []
    for _ in range(4):
        start = time.perf_counter()
        time.sleep(0.002)
        calls.append(time.perf_counter() - start)
    print(json.dumps({**request, "ok": True, "seconds": calls}), flush=True)
"""
ANSWER = "import sys\nsys.stdin.readline()\nprint({0!r}, flush=True)\nsys.stdin.read()"
Command = Callable[[str], list[str]]


@pytest.fixture
def script(tmp_path: Path) -> Command:
    """Python source -> the command that runs it."""

    def write(source: str) -> list[str]:
        path = tmp_path / "peer.py"
        path.write_text(source)
        return [sys.executable, str(path)]

    return write


def test_a_peer_times_itself(script: Command) -> None:
    with Peer("steady", script(STEADY), timeout=20.0) as peer:
        calls = peer.time(2, 16, 0.01)
        assert len(calls) == 3  # the first of four is dropped
        assert all(0.002 <= call < 1.0 for call in calls)
        reply = peer.ask("load", {"model": "here"})
        assert (reply["op"], reply["model"]) == ("load", "here")
        pid = peer.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_variables_are_set_for_the_peer_only(script: Command) -> None:
    source = 'import os, json\ninput()\nprint(json.dumps({"ok": True, "seen": os.environ["OF_A_PEER"]}))'
    with Peer("it", script(source), environment={"OF_A_PEER": "7"}) as peer:
        assert peer.ask("look")["seen"] == "7"
    assert "OF_A_PEER" not in os.environ


def test_a_program_that_is_not_there() -> None:
    with pytest.raises(UsageError, match="the command of peer x, 'no-such-program', was not found"):
        Peer("x", ["no-such-program"])


def test_a_program_that_may_not_run(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no program")
    with pytest.raises(ProviderError, match="peer x cannot be started: Permission denied"):
        Peer("x", [str(tmp_path / "text")])


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("raise SystemExit(3)", "ended with exit code 3 instead of answering 'time'"),
        ("input()\nraise ValueError('the model is gone')", "exit code 1 .*: ValueError: the model is gone"),
        ("import os\ninput()\nos.kill(os.getpid(), 11)", "ended with signal 11"),
        ("import os, time\ninput()\nos.close(1)\ntime.sleep(60)", "closed its stdout"),
        (ANSWER.format("Loading weights..."), "answered 'time' with 'Loading weights...'. A peer prints nothing but"),
        (ANSWER.format("[" * 100_000), "answered 'time' with"),
        (ANSWER.format("[1]"), re.escape("answered 'time' with '[1]'")),
        (ANSWER.format('{"seconds": [1, 2]}'), "answered 'time' with"),
        (ANSWER.format('{"ok": true}'), "timed seconds: null. It needs the seconds of each call, at least two calls"),
        (ANSWER.format('{"ok": true, "seconds": [1]}'), "at least two calls"),
        (ANSWER.format('{"ok": true, "seconds": [0.001, NaN]}'), "at least two calls"),
        (ANSWER.format('{"ok": true, "seconds": [0.001, true]}'), "at least two calls"),
        (ANSWER.format('{"ok": true, "seconds": [0.001, -0.001]}'), "at least two calls"),
        (
            ANSWER.format('{"ok": true, "seconds": [71.0, 69.0]}'),
            "reports 140 s of calls within .* s. .*not milliseconds",
        ),
        (ANSWER.format('{"ok": false, "error": "out of\\u001b[31m memory"}'), "peer x: out of memory"),
        (ANSWER.format('{"ok": false}'), "peer x: time failed"),
    ],
)
def test_a_peer_that_does_not_do_its_part(script: Command, source: str, says: str) -> None:
    with Peer("x", script(source), timeout=20.0) as peer, pytest.raises(ProviderError, match=says) as caught:
        peer.time(1, 8, 0.01)
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_a_peer_that_hangs_is_killed_with_what_it_started(script: Command, tmp_path: Path) -> None:
    child = tmp_path / "child"
    source = (
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(child)!r}).write_text(str(child.pid))\ninput()\ntime.sleep(60)"
    )
    start = time.perf_counter()
    with (
        Peer("slow", script(source), timeout=0.6) as peer,
        pytest.raises(ProviderError, match=re.escape("peer slow did not answer 'time' in 0.61 s and was killed")),
    ):
        peer.time(1, 8, 0.01)
    assert time.perf_counter() - start < 20.0
    for _ in range(100):
        if not Path(f"/proc/{child.read_text()}").exists() or "Z" in _state(int(child.read_text())):
            break
        time.sleep(0.05)
    else:
        pytest.fail("the child of the peer still runs")


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"


def test_a_peer_that_talks_unasked_is_not_misread(script: Command) -> None:
    twice = STEADY.replace("flush=True)", 'flush=True)\n    print("done", flush=True)')
    with Peer("x", script(twice), timeout=20.0) as peer:
        peer.time(1, 8, 0.01)
        time.sleep(0.2)
        with pytest.raises(ProviderError, match="peer x said 'done' unasked"):
            peer.time(1, 8, 0.01)


def test_a_peer_that_ignores_exit_is_ended(script: Command) -> None:
    peer = Peer("x", script("import signal, time\nsignal.signal(15, signal.SIG_IGN)\ntime.sleep(60)"))
    start = time.perf_counter()
    peer.close()
    peer.close()
    assert time.perf_counter() - start < 10.0
    with pytest.raises(ProviderError):
        peer.time(1, 8, 0.01)


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        ("mine=python mine.py", "mine", ("python", "mine.py")),
        ("OpenVINO 2026 (int8)=run 'a b' --x=1", "OpenVINO 2026 (int8)", ("run", "a b", "--x=1")),
    ],
)
def test_how_a_peer_is_written(text: str, name: str, words: tuple[str, ...]) -> None:
    assert parse_peer(text) == (name, words)


@pytest.mark.parametrize("text", ["", "mine", "mine=", "=python x", "mine= ", "a\nb=x", "mine=it's"])
def test_what_is_no_peer(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_peer(text)
    assert "\n" not in str(caught.value)


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    monkeypatch.setenv("HASTEN_CACHE_DIR", str(tmp_path / "cache"))
    return write_bundle(tmp_path / "b", "feature-extraction", embedder())


def test_bench_measures_a_bundle_and_its_peers_in_turn(bundle: Bundle, script: Command) -> None:
    report = bench(
        bundle,
        batches=(1, 2),
        lengths=(8,),
        seconds=0.02,
        threads=1,
        peers={"steady": script(STEADY)},
        peer_timeout=20.0,
    )
    for row in report.rows:
        (peer,) = row.peers
        assert peer.name == "steady"
        assert peer.ms is not None
        assert 2.0 <= peer.ms < 100.0
        assert peer.ratio.low <= peer.ratio.median <= peer.ratio.high
        assert peer.ratio.median == pytest.approx(peer.ms / row.p50_ms, rel=0.9)
    (total,) = report.peers
    assert total.ms is None
    assert total.ratio.median > 1.0  # a tiny graph takes less than the 2 ms of sleep
    assert report.to_dict()["rows"][0]["peers"][0]["name"] == "steady"


def test_bench_ends_its_peers_when_one_fails(bundle: Bundle, script: Command, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    source = f"import os, pathlib\npathlib.Path({str(note)!r}).write_text(str(os.getpid()))\ninput()\nprint('hm')"
    with pytest.raises(ProviderError, match="peer x answered 'time' with 'hm'"):
        bench(bundle, batches=(1,), lengths=(8,), seconds=0.02, threads=1, peers={"x": script(source)})
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


def test_the_peer_of_the_documentation_works(script: Command) -> None:
    text = (ROOT / "docs" / "peers.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    with Peer("documented", script(source), timeout=60.0) as peer:
        assert len(peer.time(2, 8, 0.02)) >= 2
        assert len(peer.time(1, 8, 0.02)) >= 2
