"""``hasten bench --peer`` as a user types it."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
from real_command import assert_refused, cold, warm

QUICK = ("--batches", "1,2", "--lengths", "8", "--seconds", "0.05")
STEADY = """
import json, sys, time
for line in sys.stdin:
    request = json.loads(line)
    if request["op"] == "exit":
        break
    time.sleep(0.03)
    print(json.dumps({"ok": True, "seconds": [0.01, 0.01, 0.01]}), flush=True)
"""


def peer(tmp_path: Path, name: str, source: str) -> str:
    """The value of --peer for a program of that source."""
    script = tmp_path / f"{name} peer.py"
    script.write_text(source)
    return f"{name}={shlex.join([sys.executable, str(script)])}"


def test_peers_stand_in_the_table_and_in_the_json(mlp_bundle: Path, tmp_path: Path) -> None:
    wish = ("--peer", peer(tmp_path, "steady", STEADY), "--peer", peer(tmp_path, "other", STEADY))
    done = warm("bench", mlp_bundle, *QUICK, *wish, "--json")
    assert (done.code, done.err) == (0, "")
    assert [total["name"] for total in done.document["peers"]] == ["steady", "other"]
    for row in done.document["rows"]:
        for result in row["peers"]:
            assert result["ms"] == pytest.approx(10.0)
            assert result["ratio"]["median"] == pytest.approx(10.0 / row["p50_ms"], rel=0.9)
    shown = cold("bench", mlp_bundle, *QUICK, *wish)
    assert shown.code == 0
    assert "peer ms" in shown.out
    assert "10.00" in shown.out
    assert shown.out.count("steady") == len(done.document["rows"]) + (len(done.document["rows"]) > 1)


@pytest.mark.parametrize(
    ("wish", "code", "says"),
    [
        (("--peer", "nonsense"), 2, ("'nonsense' is not NAME=COMMAND", "docs/peers.md")),
        (("--peer", "a=x", "--peer", "a=y"), 2, ("two peers have the same name",)),
        (("--peer", "a=no-such-program"), 2, ("'no-such-program', was not found",)),
        (("--peer", "a=false"), 8, ("peer a ended with exit code 1",)),
        (("--peer", "a=echo Loading weights"), 8, ("peer a said 'Loading weights' unasked", "docs/peers.md")),
        (("--peer", "a=sleep 60", "--peer-timeout", "0.3"), 8, ("peer a did not answer 'time'", "was killed")),
        (("--peer-timeout", "0"), 2, ("peer-timeout",)),
        (("--peer-timeout", "inf"), 2, ("peer-timeout",)),
    ],
)
def test_peers_that_cannot_be_compared_with(
    mlp_bundle: Path, wish: tuple[str, ...], code: int, says: tuple[str, ...]
) -> None:
    assert_refused(warm("bench", mlp_bundle, *QUICK, *wish), code, *says)
