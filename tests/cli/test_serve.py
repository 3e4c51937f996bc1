"""`hasten serve` as a command: what it refuses before it serves, keys it makes, what it says when it starts."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import serving
from real_command import assert_refused, cold, environment, ok, warm

from runtimes.serve.auth import Keys


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return serving.write_encoder(tmp_path_factory.mktemp("serve") / "enc").path


def test_a_key_is_made_and_shown_once(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    done = ok(cold("serve", "--api-keys", file, "--new-key", "alice"))
    key = done.out.strip()
    assert Keys.read(file).who(key) == "alice"
    assert key not in file.read_text() + done.err
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert_refused(cold("serve", "--api-keys", file, "--new-key", "alice"), 2, "has a key named alice")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "no bundle was given"),
        (("--new-key", "alice"), "needs --api-keys"),
        (("BUNDLE", "--new-key", "alice", "--api-keys", "keys"), "serves nothing"),
        (("BUNDLE", "BUNDLE"), "two bundles are named"),
        (("BUNDLE", "--name", "x"), "NAME=BUNDLE"),
        (("--name", "a b=BUNDLE"), "NAME=BUNDLE"),
        (("BUNDLE", "--host", "0.0.0.0"), "no keys are asked for"),
        (("BUNDLE", "--host", "::"), "no keys are asked for"),
        (("BUNDLE", "--host", "no such host"), "no keys are asked for"),
        (("BUNDLE", "--host", "no such host", "--no-auth"), "is no address"),
        (("BUNDLE", "--api-keys", "none"), "cannot be read"),
        (("BUNDLE", "--tls-cert", "none"), "cannot be read"),
        (("BUNDLE", "--tls-key", "none"), "--tls-cert"),
        (("BUNDLE", "--port", "70000"), "70000"),
        (("BUNDLE", "--max-body", "much"), "is no size"),
        (("BUNDLE", "--timeout", "0"), "timeout"),
        (("BUNDLE", "--workers", "0"), "workers"),
        (("BUNDLE", "--cache-size", "1GB"), "no cache"),
        (("BUNDLE", "--cache", "ftp://host"), "ftp"),
        (("BUNDLE", "--device", "cuda:99"), "cuda:99"),
    ],
)
def test_what_is_refused_before_anything_is_served(
    tmp_path: Path, bundle: Path, words: tuple[str, ...], told: str
) -> None:
    given = [word.replace("BUNDLE", str(bundle)) for word in words]
    done = warm("serve", "--port", "0", *given, cwd=tmp_path)
    assert done.code in (2, 8), (done.code, done.err)
    assert_refused(done, done.code, told)
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_bundle(tmp_path: Path, bundle: Path) -> None:
    assert_refused(cold("serve", tmp_path), 6)
    shutil.copytree(bundle, tmp_path / "broken")
    model = next((tmp_path / "broken").glob("*.onnx"))
    model.write_bytes(b"x" + model.read_bytes()[1:])
    assert_refused(cold("serve", "--port", "0", "--name", f"x={tmp_path / 'broken'}"), 6, model.name)


def test_a_port_that_is_taken(bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert_refused(cold("serve", bundle, "--port", port), 2, port, "in use")


def test_what_it_says_when_it_starts(bundle: Path) -> None:
    with serving.serving(bundle, "--workers", "1") as server:
        model, start = server.wait_for("model"), server.wait_for("serving")
        assert (model["name"], model["task"]) == ("tiny", "feature-extraction")
        assert model["workers"] == ["CPUExecutionProvider (cpu-fp32)"]
        assert start["url"] == server.url
        assert start["keys"] == "not asked for"
        assert server.end() == 0


def test_the_log_as_text_and_curl(bundle: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is needed")
    command = ["-m", "hasten", "serve", str(bundle), "--port", "0", "--workers", "1"]
    with serving.spawned(*command) as server:
        url = server.wait_for_line(" serving url=").rsplit("url=", 1)[1].split()[0]
        asked = ["curl", "-sS", f"{url}/v1/embeddings", "-d", '{"input": "a cat"}']
        answer = json.loads(subprocess.run(asked, capture_output=True, check=True, env=environment()).stdout)
        assert len(answer["data"][0]["embedding"]) == 8
        line = server.wait_for_line(" request ")
        assert " method=POST path=/v1/embeddings status=200 " in line
        assert "cat" not in line


def test_an_extra_that_is_not_installed(bundle: Path) -> None:
    words = ["serve", str(bundle), "--port", "0"]
    code = f"import sys\nsys.modules['uvicorn'] = None\nfrom hasten.cli import main\nmain({words!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stderr) == (10, "hasten: uvicorn is not installed. pip install 'hasten[serve]'\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_before_it_serves(bundle: Path, number: int, code: int) -> None:
    words = ["--name", f"a={bundle}", "--name", f"b={bundle}", "--name", f"c={bundle}"]
    with serving.spawned("-m", "hasten", "serve", "--port", "0", "--workers", "1", *words) as server:
        server.wait_for_line(" loaded model=a ")
        assert server.end(number) == code
        assert not [line for line in server.lines if " serving " in line]
