"""Convolutions made cheaper: a small residual network trained here on handwritten digits, factored and pruned.

The ten thousand images of ../shared/data/mnist (the test set of MNIST) are divided: 8,000 to train, of which 512 are
calibrated on, and 2,000 to measure. The network has 0.7 million parameters and 55 million multiply-adds, 64 channels of
14 x 14 and 128 of 7 x 7; training takes about two minutes on two cores and is kept in the temporary folder.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import inspect
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from measure import SHARED, Goal, arguments, finish
from numpy.typing import NDArray

from artifacts.target import CPU
from compiler.calibrate import Calibrator, tensor_batches
from compiler.graphs import GraphFolder
from passes.base import Context, Pass
from passes.cleanup import Finish
from passes.factor import FactorConvolutions
from passes.factor.convolution_sites import multiply_adds
from passes.fusion.fold_batch_norm import FoldBatchNorm
from passes.pipeline import Pipeline
from passes.prune import PruneChannels
from passes.registry import CLEAN
from passes.sites import convolution_sites

Array = NDArray[Any]

TRAINED_ON = 8000
"""Images; the rest is measured on."""
CALIBRATED_ON = 512
BATCHES = (1, 64)
EPOCHS = 4
SEED = 0
MEMORY = 10**9

METHODS: Mapping[str, tuple[Pass, ...]] = {
    "separable": (FactorConvolutions("separable"),),
    "tucker": (FactorConvolutions("tucker"),),
    "spatial": (FactorConvolutions("spatial"),),
    "separable without repair": (FactorConvolutions("separable", repair=False),),
    "tucker without repair": (FactorConvolutions("tucker", repair=False),),
    "channels": (PruneChannels(0.25),),
    "channels without repair": (PruneChannels(0.25, repair=False),),
    "channels, separable": (PruneChannels(0.25), FactorConvolutions("separable")),
}


@dataclasses.dataclass(frozen=True)
class Digits:
    """Images and labels.

    Attributes:
        images: float32 [count, 1, 28, 28], of mean 0 and variance 1 about.
        labels: int64 [count].
    """

    images: Array
    labels: Array

    def part(self, start: int, stop: int | None = None) -> Digits:
        """Some of them."""
        return Digits(self.images[start:stop], self.labels[start:stop])


def digits(folder: Path) -> Digits:
    """The images of a folder in idx format, in an order drawn once."""
    pixels = np.frombuffer(gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16)
    labels = np.frombuffer(gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    images = (pixels.reshape(-1, 1, 28, 28).astype(np.float32) / 255 - 0.1307) / 0.3081
    order = np.random.default_rng(SEED).permutation(len(labels))
    return Digits(np.ascontiguousarray(images[order], np.float32), labels[order].astype(np.int64))


def trained(data: Digits) -> Path:
    """The network as an .onnx file, of any batch; trained if the temporary folder has it not."""
    told = "".join(inspect.getsource(part) for part in (digits, _network, _train, _export))
    key = hashlib.sha256(f"{EPOCHS} {SEED} {TRAINED_ON} {told}".encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"hasten-cnn-{key}"
    path = folder / "cnn.onnx"
    if not path.exists():
        folder.mkdir(exist_ok=True)
        network = _train(data)
        _export(network, path)
    return path


def _network() -> Any:
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            self.first_norm = nn.BatchNorm2d(outputs)
            self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            self.second_norm = nn.BatchNorm2d(outputs)
            self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

        def forward(self, x: Any) -> Any:
            inner = torch.relu(self.first_norm(self.first(x)))
            return torch.relu(self.second_norm(self.second(inner)) + self.shortcut(x))

    return nn.Sequential(
        nn.Conv2d(1, 64, 3, 2, 1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        Block(64, 64, 1),
        Block(64, 64, 1),
        Block(64, 128, 2),
        Block(128, 128, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def _train(data: Digits) -> Any:
    import torch

    torch.manual_seed(SEED)
    network = _network().to(memory_format=torch.channels_last)
    images: Any = torch.from_numpy(data.images)
    labels: Any = torch.from_numpy(data.labels)
    steps = EPOCHS * (len(labels) // 64)
    optimizer = torch.optim.AdamW(network.parameters(), 2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for epoch in range(EPOCHS):
        started = time.perf_counter()
        order: Any = torch.randperm(len(labels))[: len(labels) // 64 * 64]
        for places in order.split(64):
            down, right = (int(number) for number in torch.randint(-2, 3, (2,)))
            moved = torch.roll(images[places], (down, right), (2, 3)).contiguous(memory_format=torch.channels_last)
            loss: Any = torch.nn.functional.cross_entropy(network(moved), labels[places])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1} of {EPOCHS}: loss {loss.item():.4f}, {time.perf_counter() - started:.0f} s")
    return network.eval().to(memory_format=torch.contiguous_format)


def _export(network: Any, path: Path) -> None:
    import torch

    with torch.no_grad():
        program: Any = torch.onnx.export(
            network,
            (torch.zeros(2, 1, 28, 28),),
            input_names=["image"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            opset_version=20,
            dynamo=True,
            verbose=False,
        )
    temporary = path.with_suffix(".part")
    program.save(str(temporary), external_data=False)
    temporary.replace(path)


@dataclasses.dataclass(frozen=True)
class Made:
    """A network after some passes.

    Attributes:
        path: Of its graph.
        costs: Multiply-adds of its convolutions, for one image.
        seconds: That the passes took.
        notes: Refusals, as text.
    """

    path: Path
    costs: int
    seconds: float
    notes: tuple[str, ...] = ()


def made(source: Path, passes: Sequence[Pass], data: Digits, folder: Path) -> Made:
    """Clean, fold, run the passes, finish."""
    folder.mkdir(parents=True, exist_ok=True)
    model = ir.load(source)
    feeds = [{"image": data.images[start : start + 64]} for start in range(0, len(data.labels), 64)]
    graphs = GraphFolder(folder)
    calibrator = Calibrator(tensor_batches(feeds, rows_apart=True), graphs, MEMORY, cache=False)
    context = Context(CPU, calibrator.observe, calibrator.moments)
    started = time.perf_counter()
    Pipeline((*CLEAN, FoldBatchNorm())).run(model, context)
    outcomes = Pipeline(tuple(passes)).run(model, context)
    seconds = time.perf_counter() - started
    costs = sum(multiply_adds(site) for site in convolution_sites(model))
    Pipeline((*CLEAN, Finish())).run(model, context)
    notes = tuple(f"{item.name}: {one.node} {one.reason}" for item, told in outcomes for one in told.refused)
    return Made(graphs.save(model).path, costs, seconds, notes)


def session(path: Path) -> ort.InferenceSession:
    """On the CPU, with the threads that ONNX Runtime chooses, none of which waits busily."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def accuracy(one: ort.InferenceSession, data: Digits) -> float:
    """Part of the images that are told right."""
    found = [
        one.run(None, {"image": data.images[start : start + 100]})[0].argmax(-1)
        for start in range(0, len(data.labels), 100)
    ]
    return float((np.concatenate(found) == data.labels).mean())


def timed(sessions: Mapping[str, ort.InferenceSession], image: Array, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of a run, the median of a block; all take turns in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    runs = max(3, 200 // len(image))
    for _ in range(rounds):
        for name, one in sessions.items():
            block = []
            for _ in range(runs):
                started = time.perf_counter()
                one.run(None, {"image": image})
                block.append(time.perf_counter() - started)
            seconds[name].append(median(block) * 1e3)
    return seconds


def measure_cnn(folder: Path, *, methods: Sequence[str] = tuple(METHODS), rounds: int = 15) -> dict[str, Any]:
    """Accuracy, multiply-adds and speed of each method against the network as it is; empty without the images."""
    source = SHARED / "data" / "mnist"
    if not source.exists():
        print(f"the images are not at {source}: convolutions are not measured")
        return {}
    data = digits(source)
    path = trained(data.part(0, TRAINED_ON))
    seen, held = data.part(0, CALIBRATED_ON), data.part(TRAINED_ON)
    built = {"dense": made(path, (), seen, folder / "dense")}
    built |= {name: made(path, METHODS[name], seen, folder / name.replace(" ", "-")) for name in methods}
    sessions = {name: session(one.path) for name, one in built.items()}
    figures: dict[str, Any] = {
        name: {
            "accuracy": accuracy(sessions[name], held),
            "multiply_adds": one.costs / built["dense"].costs,
            "megabytes": one.path.stat().st_size / 1e6,
            "compile_seconds": one.seconds,
            "notes": list(one.notes),
        }
        for name, one in built.items()
    }
    for batch in BATCHES:
        times = timed(sessions, data.images[:batch], rounds)
        for name in built:
            ratios = [dense / own for dense, own in zip(times["dense"], times[name], strict=True)]
            figures[name] |= {f"milliseconds_{batch}": median(times[name]), f"speed_{batch}": median(ratios)}
    for name, one in figures.items():
        told = ", ".join(
            f"{one[f'speed_{batch}']:.2f}x at {batch} ({one[f'milliseconds_{batch}']:.2f} ms)" for batch in BATCHES
        )
        print(f"{name}: {one['accuracy']:.2%}, {one['multiply_adds']:.0%} of the multiply-adds, {told}")
    return figures


def goals(figures: Mapping[str, Any]) -> list[Goal]:
    """The lines of the issue's table."""
    found = []
    for name in ("separable", "tucker"):
        one, dense = figures.get(name), figures.get("dense")
        speed = min(one[f"speed_{batch}"] for batch in BATCHES) if one else None
        drop = 100 * (dense["accuracy"] - one["accuracy"]) if one and dense else None
        found.append(Goal(f"{name} at half the work: speed", 1.4, at_least=True, unit="x", figure=speed))
        found.append(Goal(f"{name} at half the work: accuracy lost", 1.0, at_least=False, unit="points", figure=drop))
    return found


def main() -> int:
    """Measure, print, write, and hold to the goals."""
    options = arguments(__doc__, "only separable and tucker").parse_args()
    methods = ("separable", "tucker") if options.quick else tuple(METHODS)
    with tempfile.TemporaryDirectory(prefix="hasten-") as folder:
        figures = measure_cnn(Path(folder), methods=methods)
    return finish({"cnn": figures}, goals(figures), options)


if __name__ == "__main__":
    sys.exit(main())
