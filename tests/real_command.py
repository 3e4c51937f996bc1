"""Run ``hasten`` as a process of its own: cold, as a user does, or forked from a server that has torch imported."""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 300.0
_PRELOADED = ("torch", "transformers.models.bert.modeling_bert", "optimum.exporters.tasks", "compiler.compile")
_PRELOADED += ("compiler.export.torch_export", "compiler.export.onnx_import", "torch.onnx", "hasten.make", "hasten.use")
_PRELOADED += ("hasten.look", "transformers.pytorch_utils", "transformers.masking_utils")


@dataclass(frozen=True)
class Finished:
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[str]:
        return self.err.splitlines()


def command() -> list[str]:
    return [sys.executable, "-m", "hasten"]


def environment(**changes: str) -> dict[str, str]:
    """This environment with the repository importable from any folder."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", **changes}


def cold(
    *arguments: str | Path,
    cwd: Path | None = None,
    stdin: str | bytes | None = None,
    env: dict[str, str] | None = None,
) -> Finished:
    """``python -m hasten …`` in a fresh process."""
    done = subprocess.run(
        [*command(), *map(str, arguments)],
        cwd=cwd,
        input=stdin.encode() if isinstance(stdin, str) else stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        env=env or environment(),
        timeout=TIMEOUT,
    )
    return Finished(done.returncode, done.stdout.decode(), done.stderr.decode())


def ok(done: Finished) -> Finished:
    """The same, if the command did what it was asked."""
    assert done.code == 0, (done.code, done.err)
    assert "Traceback" not in done.err
    return done


def warm(
    *arguments: str | Path, cwd: Path | None = None, file_limit: int | None = None, powerless: bool = False
) -> Finished:
    """The same in a process forked from a server that has imported the heavy packages."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_PRELOADED))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        words = [str(part) for part in arguments]
        setting = (words, str(cwd or place), folder, environment(), file_limit, powerless)
        process = context.Process(target=_serve, args=setting)
        process.start()
        process.join(TIMEOUT)
        if process.exitcode is None:
            process.kill()
            process.join()
        code = process.exitcode
        assert code is not None
        return Finished(code, (place / "out").read_text(), (place / "err").read_text())


def _serve(
    arguments: Sequence[str], cwd: str, folder: str, env: dict[str, str], file_limit: int | None, powerless: bool
) -> None:
    for name, number in (("out", 1), ("err", 2)):
        handle = os.open(Path(folder, name), os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
        os.dup2(handle, number)
    os.chdir(cwd)
    os.environ |= env
    sys.argv = ["hasten", *arguments]
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    if powerless:
        drop_powers()
    from hasten.cli import main

    main()


def drop_powers() -> None:
    """Take the capabilities from root, so that the permissions of files count for it."""
    if os.geteuid() != 0:
        return
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    none = (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, none) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def listing(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder with the content of files, to see that nothing was left or lost."""
    found: dict[str, bytes | None] = {}
    for path in sorted(folder.rglob("*")):
        with contextlib.suppress(FileNotFoundError):
            found[str(path.relative_to(folder))] = path.read_bytes() if path.is_file() else None
    return found


def assert_refused(done: Finished, code: int, *parts: str) -> None:
    """The documented exit code, one line on standard error that says these things, and no traceback."""
    assert done.code == code, (done.code, done.out, done.err)
    assert "Traceback" not in done.err + done.out
    told = [line for line in done.lines if not is_progress(line)]
    assert len(told) == 1, done.err
    assert told[0] == done.lines[-1]
    assert told[0].startswith("hasten: "), done.err
    for part in parts:
        assert part.lower() in told[0].lower(), (part, told[0])


def is_progress(line: str) -> bool:
    """``  2% exporting``: what compile says where there is no terminal."""
    return line[:4].strip().endswith("%") and line[:4].strip()[:-1].isdigit()
