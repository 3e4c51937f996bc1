"""The execution providers hasten knows, what each is told for a variant, and whether it really works here.

``onnxruntime.get_available_providers()`` lists what the wheel was built with: onnxruntime-gpu lists CUDA and TensorRT
on a machine without a GPU. So :func:`probe` runs a model in a child process, and looks at where its nodes ran.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from artifacts.errors import ProviderError, UsageError
from artifacts.manifest import SessionOptions
from artifacts.target import CPU_PROVIDER, CUDA_PROVIDER, OPENVINO_PROVIDER, TENSORRT_PROVIDER

from .environment import onnxruntime as ort
from .environment import register_openvino

PROBE_SECONDS = 60.0
_LIBRARIES = {CUDA_PROVIDER: "onnxruntime_providers_cuda", TENSORRT_PROVIDER: "onnxruntime_providers_tensorrt"}


@dataclass(frozen=True)
class ExecutionProvider:
    """One provider.

    Attributes:
        name: ONNX Runtime's name.
        short: What the user types.
        devices: Device kinds it runs on; the first is its default.
    """

    name: str
    short: str
    devices: tuple[str, ...]


EXECUTION_PROVIDERS: tuple[ExecutionProvider, ...] = (
    ExecutionProvider(CPU_PROVIDER, "cpu", ("cpu",)),
    ExecutionProvider(OPENVINO_PROVIDER, "openvino", ("cpu", "gpu", "npu")),
    ExecutionProvider(CUDA_PROVIDER, "cuda", ("cuda",)),
    ExecutionProvider(TENSORRT_PROVIDER, "tensorrt", ("cuda",)),
)


@dataclass(frozen=True)
class Probe:
    """Whether a provider really runs a model on this machine.

    Attributes:
        provider: Full name.
        ok: It ran the probe model, every node of it, correctly.
        reason: One line that says why not; empty when it did.
        devices: Names of the devices that it sees.
    """

    provider: str
    ok: bool
    reason: str
    devices: tuple[str, ...]


def find(name: str) -> ExecutionProvider:
    """The provider of that full or short name.

    Raises:
        UsageError: There is none.
    """
    for provider in EXECUTION_PROVIDERS:
        if name in (provider.name, provider.short):
            return provider
    raise UsageError(
        f"unknown execution provider {name!r}", f"Choose one of {', '.join(p.short for p in EXECUTION_PROVIDERS)}"
    )


def parse_device(device: str) -> tuple[str, int]:
    """``"cuda:1"`` -> ``("cuda", 1)``; the index is 0 when it is left out.

    Raises:
        UsageError: Not a device that any provider runs on.
    """
    kind, colon, index = device.partition(":")
    kinds = sorted({kind for provider in EXECUTION_PROVIDERS for kind in provider.devices})
    if kind not in kinds or (colon and not (index.isascii() and index.isdigit() and len(index) <= 4)):
        remedy = f"Choose one of {', '.join(kinds)}, or cuda:1 for the second GPU"
        raise UsageError(f"unknown device {device!r}", remedy)
    return kind, int(index) if index else 0


def translate(
    options: SessionOptions,
    provider: str,
    *,
    device: str = "cpu",
    threads: int = 0,
    streams: int = 1,
    profile: bool = False,
) -> dict[str, str]:
    """Provider options that say ``options.precision``, the device and the number of threads to that provider.

    With several ``streams`` OpenVINO shares its threads out among as many runs at once. With ``profile`` it tells what
    each of its kernels took.

    An empty precision leaves the provider its own default, which may be lower than float32: OpenVINO computes in
    bfloat16 where the CPU has AMX, CUDA in TF32.
    """
    kind, index = parse_device(device)
    precision = options.precision
    if provider == OPENVINO_PROVIDER:
        config = _openvino_config(precision, kind.upper(), threads, streams)
        config |= {"PERF_COUNT": "YES"} if profile else {}
        return {"load_config": json.dumps({kind.upper(): config}, sort_keys=True)}
    if provider == CUDA_PROVIDER:
        return {"device_id": str(index)} | ({"use_tf32": "0"} if precision == "fp32" else {})
    if provider == TENSORRT_PROVIDER:
        flags = {"fp16": {"trt_fp16_enable": "1"}, "bf16": {"trt_bf16_enable": "1"}}
        return {"device_id": str(index)} | flags.get(precision, {})
    return {}


def _openvino_config(precision: str, device: str, threads: int, streams: int) -> dict[str, str]:
    config = {"PERFORMANCE_HINT": "LATENCY"}
    if precision:
        config["INFERENCE_PRECISION_HINT"] = {"fp32": "f32", "bf16": "bf16", "fp16": "f16"}[precision]
    if device == "CPU" and threads:
        config["INFERENCE_NUM_THREADS"] = str(threads)
    if device == "CPU" and streams > 1:
        config["NUM_STREAMS"] = str(streams)
    return config


def preload(provider: str) -> None:
    """Load the CUDA libraries of the nvidia-* wheels, where that is how they are installed."""
    if provider not in _LIBRARIES or not hasattr(ort, "preload_dlls"):
        return
    import contextlib
    import io

    # It prints what it misses and where to read about it; why_not() says it in one line.
    with contextlib.redirect_stdout(io.StringIO()):
        ort.preload_dlls()


def built_in(provider: str) -> bool:
    """Whether this ONNX Runtime could have the provider at all. True proves nothing, False is final."""
    if provider == OPENVINO_PROVIDER:
        from importlib.util import find_spec

        return find_spec("onnxruntime_ep_openvino") is not None
    return provider in ort.get_available_providers()


def why_not(provider: str) -> str:
    """Why a provider cannot work on this machine, in one line; empty when nothing is seen to be missing."""
    short = find(provider).short
    if provider == OPENVINO_PROVIDER:
        try:
            register_openvino()
        except ProviderError as error:
            return str(error)
        return ""
    if provider not in ort.get_available_providers():
        return f"this onnxruntime is built without {short}"
    if provider not in _LIBRARIES:
        return ""
    preload(provider)
    if not _loads("libcuda.so.1", "nvcuda.dll"):
        return "no NVIDIA driver is installed here"
    missing = missing_library(Path(ort.__file__).parent / "capi" / f"lib{_LIBRARIES[provider]}.so")
    return f"{missing} is missing" if missing else ""


def missing_library(library: Path) -> str:
    """File name of the first shared library that ``library`` needs and the loader does not find; empty if it loads."""
    import ctypes
    import re

    if not library.exists():
        return ""
    shared = library.with_name("libonnxruntime_providers_shared.so")
    try:
        if shared.exists():
            ctypes.CDLL(str(shared), mode=ctypes.RTLD_GLOBAL)
        ctypes.CDLL(str(library))
    except OSError as error:
        match = re.match(r"(?:.*/)?([\w.+-]+): cannot open shared object", str(error))
        return match.group(1) if match else library.name
    return ""


def _loads(*names: str) -> bool:
    import ctypes

    for name in names:
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return True
    return False


def probe(provider: str, *, timeout: float = PROBE_SECONDS) -> Probe:
    """Run a small model on the provider, in a child process, and look where its nodes ran.

    Args:
        provider: Full or short name.
        timeout: Seconds for each step of the child.
    """
    name = find(provider).name
    if not built_in(name):
        return Probe(name, False, why_not(name), ())
    import tempfile

    with tempfile.TemporaryDirectory(prefix="hasten-probe-", ignore_cleanup_errors=True) as folder:
        try:
            return Probe(name, True, "", _probe_devices(name, Path(folder) / "probe.onnx", timeout))
        except ProviderError as error:
            return Probe(name, False, str(error), ())


def _probe_devices(provider: str, model: Path, timeout: float) -> tuple[str, ...]:
    import numpy as np

    from .client import Worker
    from .protobuf import probe_model

    model.write_bytes(probe_model())
    options = SessionOptions(optimization_level="basic", precision="fp32")
    with Worker(model, provider, options=options, threads=1, timeout=timeout) as worker:
        feeds = np.arange(8, dtype=np.float32).reshape(2, 4)
        got = worker.run({"x": feeds})["y"]
        if not np.allclose(got, 3.0 * feeds, rtol=1e-5, atol=1e-5):
            raise ProviderError(f"{find(provider).short} computes wrong results here")
        if elsewhere := worker.fallback():
            raise ProviderError(f"{find(provider).short} leaves {', '.join(elsewhere)} to another provider")
        return worker.devices()


def available(*, timeout: float = PROBE_SECONDS) -> tuple[Probe, ...]:
    """Every provider that hasten knows, probed at once: each child is on its own, and only works or does not."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(len(EXECUTION_PROVIDERS)) as pool:
        return tuple(pool.map(partial(probe, timeout=timeout), (provider.name for provider in EXECUTION_PROVIDERS)))
