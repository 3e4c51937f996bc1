"""What an interrupt does to a program that is importing, and how it ends after one."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from real_command import TIMEOUT, environment

pytestmark = pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="an interrupt does not wait here")

SLOW_IMPORT = """
import os, signal
os.kill(os.getpid(), {number})
for _ in range(100_000):
    len("")
print("imported", flush=True)
"""

PROGRAM = """
import sys, time
from hasten import interrupts
interrupts.install()
try:
    {work}
except KeyboardInterrupt:
    {forget}
    print("interrupted", flush=True)
sys.exit(3)
"""


def end(folder: Path, work: str, forget: str = "interrupts.forget()") -> tuple[int, list[str]]:
    (folder / "program.py").write_text(PROGRAM.format(work=work, forget=forget))
    done = subprocess.run(
        [sys.executable, "-m", "program"],
        cwd=folder,
        env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        stdout=subprocess.PIPE,
        text=True,
        timeout=TIMEOUT,
    )
    return done.returncode, done.stdout.split()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_for_an_import(tmp_path: Path, number: signal.Signals) -> None:
    (tmp_path / "slow_import.py").write_text(SLOW_IMPORT.format(number=int(number)))
    assert end(tmp_path, "import slow_import; time.sleep(60)") == (3, ["imported", "interrupted"])


def test_an_interrupt_is_at_once_elsewhere(tmp_path: Path) -> None:
    assert end(tmp_path, "import signal; signal.raise_signal(2); print('went on')") == (3, ["interrupted"])


def test_an_interrupt_out_of_an_exec_does_not_change_the_exit_code(tmp_path: Path) -> None:
    assert end(tmp_path, "exec('raise KeyboardInterrupt')") == (3, ["interrupted"])
    assert end(tmp_path, "exec('raise KeyboardInterrupt')", "pass") == (-signal.SIGINT, ["interrupted"])


def test_what_was_ignored_stays_ignored(tmp_path: Path) -> None:
    work = "import signal; signal.signal(2, signal.SIG_IGN); interrupts.install(); signal.raise_signal(2); print('on')"
    assert end(tmp_path, work) == (3, ["on"])
