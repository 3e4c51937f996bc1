from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import tiny_models

COMMIT = "a" * 40
API = "/api/models/owner/tiny"


class Hub(BaseHTTPRequestHandler):
    """The few routes of the Hugging Face hub that a download uses."""

    folder: ClassVar[Path]
    asked: ClassVar[list[str]] = []

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.split("?")[0]
        prefix = f"/owner/tiny/resolve/{COMMIT}/"
        files = {str(file.relative_to(self.folder)): file for file in self.folder.rglob("*") if file.is_file()}
        if path.startswith(prefix) and path.removeprefix(prefix) in files:
            name = path.removeprefix(prefix)
            self.asked.append(name)
            self.send(200, files[name].read_bytes())
        elif path in (API, f"{API}/revision/main"):
            siblings = [{"rfilename": name} for name in files]
            self.send(200, json.dumps({"id": "owner/tiny", "sha": COMMIT, "siblings": siblings}).encode())
        elif path.startswith(f"{API}/tree/"):
            tree = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": "b" * 40}
                for name, file in files.items()
            ]
            self.send(200, json.dumps(tree).encode())
        else:
            self.send(404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})

    def send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        etag = hashlib.sha1(content).hexdigest()
        for name, value in {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', **(headers or {})}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[str]:
    Hub.folder = tiny_models.write_model(tmp_path / "served")
    Hub.asked.clear()
    (Hub.folder / "pytorch_model.bin").write_bytes(b"not wanted")
    (Hub.folder / "onnx").mkdir()
    (Hub.folder / "onnx" / "model.onnx").write_bytes(b"not wanted")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def read(model: str, home: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    script = (
        "import sys\nfrom compiler.source import read_source\nfrom artifacts.errors import SourceError\n"
        f"try:\n    source = read_source({model!r})\n    print(source.name, source.task, source.path)\n"
        "except SourceError as error:\n    print(error)\n"
    )
    online = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    settings = {**online, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", **environment}
    return subprocess.run(
        [sys.executable, "-c", script], env=settings, capture_output=True, text=True, timeout=120, check=False
    )


def test_downloads_only_what_a_compile_reads(hub: str, tmp_path: Path) -> None:
    done = read("owner/tiny", tmp_path / "home", HF_ENDPOINT=hub)
    assert done.stdout.startswith("tiny feature-extraction "), done.stdout + done.stderr
    assert done.stderr == ""
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(Hub.asked)
    assert not {"pytorch_model.bin", "onnx/model.onnx"} & set(Hub.asked)
    again = read("owner/tiny", tmp_path / "home", HF_HUB_OFFLINE="1")
    assert again.stdout == done.stdout, again.stdout + again.stderr
    unplugged = read("owner/tiny", tmp_path / "home", HF_ENDPOINT="http://127.0.0.1:9")
    assert unplugged.stdout == done.stdout, unplugged.stdout + unplugged.stderr


def test_an_unknown_model_is_named(hub: str, tmp_path: Path) -> None:
    done = read("owner/other", tmp_path / "home", HF_ENDPOINT=hub)
    assert "neither a path nor a public hub model: owner/other" in done.stdout, done.stdout + done.stderr
