"""What compiling a large checkpoint takes: memory next to its size, time next to onnxruntime-genai's builder.

    python benchmarks/large_checkpoint.py [--quick] [--json FILE] [--check]

The checkpoint has the shape of Qwen2.5-1.5B, random weights in bfloat16 and several shards. Everything of ours runs
through the real command. The peer is looked for where `benchmarks/peers/install.py` puts it (or in $HASTEN_PEERS); it
is optional. Needs 10 GB of disk.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import ROOT, Goal, arguments, finish, machine_line, run_once
from shapes import LARGE_SHAPE, random_checkpoint

PEERS = ROOT / "benchmarks" / "peers"
RECIPE = "int4-fast"
PEER = "onnxruntime_genai_int4"
BUILD = """
import sys
from pathlib import Path
sys.path.append({scripts!r})
from onnxruntime_genai_int4 import build
build(Path({model!r}), Path({out!r}))
"""
SHARE, REST_MB = 1.25, 1000.0
"""Memory that a compile may take: so much of the checkpoint, and megabytes besides."""
QUICK_LAYERS = 6
ROUNDS = 2
"""Both take minutes: they run in turn, and the quicker run of each counts."""


def measure(shape: dict[str, object], rounds: int, folder: Path) -> dict[str, Any]:
    """Seconds and memory of both, as JSON."""
    sys.path.append(str(PEERS))
    from catalogue import DECODER_PEERS, found

    model = random_checkpoint(folder / "model", shape)
    figures: dict[str, Any] = {"stored_mb": sum(file.stat().st_size for file in model.glob("*.safetensors")) / 1e6}
    figures["hasten"], figures["peer"] = [], []
    peer = next((one for one in found(DECODER_PEERS) if one.name == PEER), None)
    for index in range(rounds):
        bundle = folder / f"bundle-{index}"
        # The perplexity of random weights says nothing: quality is measured on trained models.
        wish = ["--target", "cpu", "--recipe", RECIPE, "--max-drop", "99%", "--quiet"]
        command = [sys.executable, "-m", "hasten", "compile", str(model), "-o", str(bundle), *wish]
        figures["hasten"].append(run_once(command))
        if peer is not None:
            script = BUILD.format(scripts=str(PEERS), model=str(model), out=str(folder / f"peer-{index}" / "int4"))
            figures["peer"].append(run_once([str(peer.python), "-c", script]))
    return figures


def judge(figures: dict[str, Any]) -> list[Goal]:
    """The lines of the issue; of a few layers only the time: memory is next to the size of all of them."""
    ours, peer = figures["hasten"], figures["peer"]
    most = None if figures["quick"] else max(run["peak_mb"] for run in ours)
    allowed = SHARE * figures["stored_mb"] + REST_MB
    ratio = min(run["seconds"] for run in ours) / min(run["seconds"] for run in peer) if peer else None
    return [
        Goal("peak memory of a compile", round(allowed), False, "MB", most),
        Goal("time of a compile over onnxruntime-genai's builder", 1.0, False, "x", ratio),
    ]


def main() -> int:
    options = arguments(__doc__, f"{QUICK_LAYERS} layers, and each side once").parse_args()
    shape = LARGE_SHAPE | ({"num_hidden_layers": QUICK_LAYERS} if options.quick else {})
    print(machine_line(), flush=True)
    with tempfile.TemporaryDirectory(prefix="hasten-benchmark-") as folder:
        figures = {"quick": options.quick} | measure(shape, 1 if options.quick else ROUNDS, Path(folder))
    for name in ("hasten", "peer"):
        for run in figures[name]:
            print(f"{name:8} {run['seconds']:7.1f} s {run['peak_mb']:8.0f} MB")
    return finish({"machine": machine_line(), **figures}, judge(figures), options)


if __name__ == "__main__":
    sys.exit(main())
