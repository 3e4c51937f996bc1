"""What calibration takes: memory under a cap on a graph far larger than it, and time next to one pass over the data.

    python benchmarks/calibration.py [--quick] [--json FILE] [--check]

The large graph has the shape of Qwen2.5-0.5B and random weights, 2 GB in float32, and second moments of all that its
products read are gathered under 256 MB. all-MiniLM-L6-v2 is calibrated on 1,000 sentences of STS-B, looked for in
../shared (or $HASTEN_SHARED). Each is measured in a process of its own, by the kernel's high-water mark. Needs 3 GB of
disk.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from measure import ROOT, Goal, arguments, finish, machine_line, model_folder
from quality import sts
from shapes import DECODER_SHAPES

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

SHAPE = DECODER_SHAPES["qwen2.5-0.5b"]
CAP_MB = 256
WINDOWS, WINDOW = 8, 128
QUICK_LAYERS, QUICK_WINDOWS = 4, 2
SENTENCES = 1000
ROUNDS = 3
_CHILD = """
import json, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {here!r}]
import calibration
print(json.dumps(calibration.{call}))
"""


def memory_figures(quick: bool, folder: Path) -> dict[str, Any]:
    """By how much a process grows that gathers second moments of the large graph."""
    layers = QUICK_LAYERS if quick else int(str(SHAPE["num_hidden_layers"]))
    child(f"build(Path({str(folder)!r}), {layers})")
    found = child(f"watched(Path({str(folder)!r}), {QUICK_WINDOWS if quick else WINDOWS})")
    print(f"second moments of {found['values']} values of {found['weights_mb']:.0f} MB: {found['told']}", flush=True)
    return {"layers": layers, "cap_mb": CAP_MB, **found}


def time_figures(quick: bool, folder: Path) -> dict[str, Any] | None:
    """Seconds of a calibration of the encoder, and of one pass over the same batches; None without sentences."""
    train = sts("train")
    if train is None:
        return None
    texts = folder / "texts.json"
    texts.write_text(json.dumps(list(train.sentences)[: SENTENCES // (5 if quick else 1)]), encoding="utf-8")
    child(f"export(Path({str(folder)!r}), {str(model_folder())!r})")
    found: dict[str, Any] = child(f"timed(Path({str(folder)!r}), {1 if quick else ROUNDS})")
    print(f"{found['sentences']} sentences: {found['calibration']:.2f} s, one pass {found['pass']:.2f} s", flush=True)
    return found


def judge(figures: dict[str, Any]) -> list[Goal]:
    """The lines of the issue."""
    timed = figures["time"]
    ratio = timed["calibration"] / timed["pass"] if timed else None
    return [
        Goal("calibration of a 0.5B shape above what the process had", float(CAP_MB), False, "MB",
             figures["memory"].get("grown_mb")),
        Goal("calibration on 1,000 sentences over one fp32 pass", 2.5, False, "x", ratio),
    ]  # fmt: skip


def child(call: str) -> Any:
    """What a function of this file gives in a process of its own."""
    here = str(Path(__file__).resolve().parent)
    code = _CHILD.format(root=str(ROOT), here=here, call=call)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{call} failed: {done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def build(folder: Path, layers: int) -> int:
    """Write a decoder of that shape as hasten exports one; its weights are made one by one."""
    from compiler.graphs import GraphFolder

    return GraphFolder(folder).save(_Decoder(layers).model()).path.rename(folder / "model.onnx").stat().st_size


def watched(folder: Path, windows: int) -> dict[str, Any]:
    """Gather second moments under the cap; by how many megabytes this process grew at its height, or the error."""
    import onnx_ir as ir

    from artifacts.errors import HastenError
    from artifacts.manifest import TensorSpec
    from compiler.calibrate import Calibrator, token_batches
    from compiler.calibrate.instrument import weight_bytes
    from compiler.graphs import GraphFolder

    model, graphs = ir.load(folder / "model.onnx"), GraphFolder(folder)
    graphs.save(model)
    rng = np.random.default_rng(0)
    ids = [rng.integers(0, int(str(SHAPE["vocab_size"])), WINDOW) for _ in range(windows)]
    inputs = [
        TensorSpec(str(value.name), str(value.dtype.numpy()), tuple(_extents(value)))
        for value in model.graph.inputs
        if value.dtype is not None
    ]
    values = read_by_products(model)
    lent = Calibrator(token_batches(ids, inputs), graphs, memory=CAP_MB * 10**6, cache=False)
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the height is measured from here on
    start = time.perf_counter()
    try:
        found = lent.moments(model, values)
    except HastenError as error:
        return {"values": len(values), "weights_mb": weight_bytes(model) / 1e6, "told": str(error)}
    seconds, grown = time.perf_counter() - start, (status("VmHWM") - before) / 1e6
    told = f"{grown:.0f} MB above {before / 1e6:.0f} MB in {seconds:.0f} s"
    figures = {"values": len(found), "weights_mb": weight_bytes(model) / 1e6, "before_mb": before / 1e6, "told": told}
    return {**figures, "grown_mb": grown, "seconds": seconds, "tokens": windows * WINDOW}


def export(folder: Path, source: str) -> int:
    """Write the encoder in the form that compression sees, and what makes its inputs."""
    import pickle

    from artifacts.target import CPU
    from compiler.export import export_model
    from compiler.graphs import GraphFolder
    from compiler.source import read_source
    from passes.base import Context
    from passes.fusion.fuse_attention import FuseAttention
    from passes.fusion.fuse_gelu import FuseGelu
    from passes.fusion.fuse_layer_norm import FuseLayerNorm
    from passes.pipeline import Pipeline
    from passes.registry import CLEAN

    exported = export_model(read_source(source, None))
    Pipeline((*CLEAN, FuseLayerNorm(), FuseGelu(), FuseAttention())).run(exported.model, Context(CPU))
    GraphFolder(folder).save(exported.model).path.rename(folder / "encoder.onnx")
    for name, content in exported.files.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_bytes(content)
    names = [spec.name for spec in exported.inputs]
    return (folder / "processor.pkl").write_bytes(pickle.dumps((exported.processor, names)))


def timed(folder: Path, rounds: int) -> dict[str, Any]:
    """Seconds of a calibration and of one pass of an optimized session over its batches, the quicker of each."""
    import pickle

    import onnx_ir as ir
    import onnxruntime as ort

    from compiler.calibrate import Calibrator, text_batches
    from compiler.graphs import GraphFolder
    from runtimes.environment import physical_cores
    from runtimes.text import TextEncoder

    processor, names = pickle.loads((folder / "processor.pkl").read_bytes())
    texts = json.loads((folder / "texts.json").read_text(encoding="utf-8"))
    rows = TextEncoder(processor, folder / processor.tokenizer, names).encode(texts)
    batches, model, graphs = text_batches(rows, names, processor), ir.load(folder / "encoder.onnx"), GraphFolder(folder)
    graphs.save(model)
    values = read_by_products(model)
    options = ort.SessionOptions()
    options.intra_op_num_threads = physical_cores()
    session = ort.InferenceSession(folder / "encoder.onnx", options, providers=["CPUExecutionProvider"])

    def one_pass() -> None:
        for batch in batches:
            session.run(None, dict(batch.feeds))

    def calibrate() -> None:
        Calibrator(batches, graphs, memory=10**9, cache=False).moments(model, values)

    found: dict[str, list[float]] = {"pass": [], "calibration": []}
    for _ in range(rounds):
        found["pass"].append(_seconds(one_pass))
        found["calibration"].append(_seconds(calibrate))
    tokens = sum(len(row) for row in rows)
    quickest = {name: min(seconds) for name, seconds in found.items()}
    return {"sentences": len(texts), "tokens": tokens, "values": len(values), **quickest}


def read_by_products(model: ir.Model) -> list[ir.Value]:
    """What matrix products with a constant factor read."""
    from passes.sites import linear_sites

    return list(dict.fromkeys(site.input for site in linear_sites(model)))


def status(name: str) -> int:
    """A line of what the kernel says of this process, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


class _Decoder:
    """A graph of that shape: see docs/format.md for its inputs and outputs."""

    def __init__(self, layers: int) -> None:
        import onnx_ir as ir

        self.ir, self.layers = ir, layers
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": 21, "com.microsoft": 1}, name="decoder")

    def model(self) -> Any:
        """The whole of it."""
        from artifacts.signature import STEP_INPUTS, cache_names

        ir, width, kv = self.ir, self._size("hidden_size"), self._size("num_key_value_heads")
        head = width // self._size("num_attention_heads")
        inputs = {name: self._input(name, dtype, shape) for name, dtype, shape in STEP_INPUTS}
        pasts = [past for layer in range(self.layers) for past, _ in cache_names(layer)]
        inputs |= {name: self._input(name, "float32", ("batch", kv, "capacity", head)) for name in pasts}
        angles = [self._weight(name, 2048, head // 2) for name in ("cos", "sin")]
        x = self._add("Gather", self._weight("embed", self._size("vocab_size"), width), inputs["input_ids"])
        presents = []
        for layer in range(self.layers):
            at = f"model.layers.{layer}"
            y = self._norm(x, f"{at}.norm")
            q, k, v = (
                self._linear(y, f"{at}.{name}", n) for name, n in zip("qkv", (width, kv * head, kv * head), strict=True)
            )
            cache = [inputs[past] for past, _ in cache_names(layer)]
            rest = (*cache, inputs["seqlens_k"], inputs["total_sequence_length"], *angles)
            heads = {"num_heads": self._size("num_attention_heads"), "kv_num_heads": kv, "do_rotary": 1}
            y = self._add("GroupQueryAttention", q, k, v, *rest, domain="com.microsoft", outputs=3, **heads)
            node = y.producer()
            if node is not None:
                for output, (past, present) in zip(node.outputs[1:], cache_names(layer), strict=True):
                    output.name, output.shape = present, inputs[past].shape
                    presents.append(output)
            x = self._add("Add", x, self._linear(y, f"{at}.o", width))
            y = self._norm(x, f"{at}.post_norm")
            gate, up = (self._linear(y, f"{at}.{name}", self._size("intermediate_size")) for name in ("gate", "up"))
            y = self._add("Mul", self._add("Mul", gate, self._add("Sigmoid", gate)), up)
            x = self._add("Add", x, self._linear(y, f"{at}.down", width))
        axis = ir.Value(name="axis", const_value=ir.tensor(np.array([-1]), name="axis"))
        self.graph.register_initializer(axis)
        asked = self._add(
            "GatherND", self._norm(x, "norm"), self._add("Unsqueeze", inputs["logits_index"], axis), batch_dims=1
        )
        logits = self._linear(asked, "lm_head", self._size("vocab_size"))
        logits.name, logits.shape = "logits", ir.Shape(["batch", "positions", self._size("vocab_size")])
        self.graph.outputs.extend([logits, *presents])
        return ir.Model(self.graph, ir_version=10)

    def _size(self, name: str) -> int:
        return int(str(SHAPE[name]))

    def _input(self, name: str, dtype: str, shape: Sequence[int | str]) -> ir.Value:
        kind = self.ir.TensorType(self.ir.DataType.from_numpy(np.dtype(dtype)))
        value = self.ir.Value(name=name, type=kind, shape=self.ir.Shape(shape))
        self.graph.inputs.append(value)
        return value

    def _weight(self, name: str, *shape: int) -> ir.Value:
        ir, seed = self.ir, len(self.graph.initializers)

        def make() -> Any:
            array: NDArray[Any] = np.random.default_rng(seed).standard_normal(shape, np.float32) / np.float32(
                shape[0] ** 0.5
            )
            return ir.Tensor(array, name=name)

        tensor = ir.LazyTensor(make, ir.DataType.FLOAT, ir.Shape(shape), name=name)
        kind = ir.TensorType(ir.DataType.FLOAT)
        value: Any = ir.Value(name=name, const_value=tensor, type=kind, shape=ir.Shape(shape))
        self.graph.register_initializer(value)
        return value  # type: ignore[no-any-return]  # onnx_ir is imported where it is used

    def _add(
        self, op_type: str, *inputs: ir.Value, domain: str = "", outputs: int = 1, **attributes: int | float
    ) -> ir.Value:
        node = self.ir.node(op_type, inputs, attributes, domain=domain, num_outputs=outputs)
        for output in node.outputs:
            output.type = inputs[0].type
        self.graph.append(node)
        return node.outputs[0]

    def _linear(self, x: ir.Value, name: str, columns: int) -> ir.Value:
        return self._add("MatMul", x, self._weight(name, self._rows(name), columns))

    def _rows(self, name: str) -> int:
        return self._size("intermediate_size" if name.endswith(".down") else "hidden_size")

    def _norm(self, x: ir.Value, name: str) -> ir.Value:
        return self._add(
            "SimplifiedLayerNormalization", x, self._weight(name, self._size("hidden_size")), epsilon=1e-6, axis=-1
        )


def _extents(value: ir.Value) -> list[int | str]:
    return [dim if isinstance(dim, int) else str(dim) for dim in value.shape or ()]


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> int:
    options = arguments(__doc__, "fewer layers and sentences, one round").parse_args()
    figures: dict[str, Any] = {"machine": machine_line(), "quick": options.quick}
    print(f"{figures['machine']}\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="hasten-benchmark-") as place:
        folder = Path(place)
        (folder / "encoder").mkdir()
        figures["time"] = time_figures(options.quick, folder / "encoder")
        (folder / "decoder").mkdir()
        figures["memory"] = memory_figures(options.quick, folder / "decoder")
    return finish(figures, judge(figures), options)


if __name__ == "__main__":
    sys.exit(main())
