"""Which machine this is: for the proof of a measurement, and as the key of a cached decision."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from pathlib import Path

from artifacts.proof import Machine
from artifacts.target import CUDA_PROVIDER, OPENVINO_PROVIDER, TENSORRT_PROVIDER

from .environment import ep_devices, physical_cores
from .environment import onnxruntime as ort

# The flags that decide which kernels ONNX Runtime and OpenVINO choose.
CPU_FEATURES = ("avx2", "fma", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")
_ARM_FEATURES = ("asimd", "asimddp", "i8mm", "bf16", "sve")
_CPUINFO = Path("/proc/cpuinfo")
_NVIDIA = Path("/proc/driver/nvidia/gpus")


def machine() -> Machine:
    """This machine, as a proof names it."""
    return Machine(
        cpu=cpu_name(),
        cores=physical_cores(),
        memory_gb=round(_memory_bytes() / 1e9, 1),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        onnxruntime=ort.__version__,
        devices=gpus(),
    )


def fingerprint() -> str:
    """Hash (64 hex digits) of all that may change which provider is the fastest correct one here."""
    facts = {
        "cpu": cpu_name(),
        "flags": cpu_features(),
        "cores": physical_cores(),
        "devices": gpus(),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        "python": sys.implementation.cache_tag,
        "onnxruntime": ort.__version__,
        "openvino": _version("onnxruntime-ep-openvino"),
        "hasten": _version("hasten"),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def cpu_name() -> str:
    """The processor's name."""
    for key in ("model name", "Hardware", "Model"):
        if name := _cpuinfo().get(key):
            return name
    return platform.processor() or platform.machine() or "unknown"


def cpu_features() -> tuple[str, ...]:
    """Those of the instruction sets that matter here which this processor has; empty where the system does not say."""
    flags = (_cpuinfo().get("flags") or _cpuinfo().get("Features") or "").split()
    return tuple(flag for flag in (*CPU_FEATURES, *_ARM_FEATURES) if flag in flags)


def gpus() -> tuple[str, ...]:
    """Names of the NVIDIA GPUs that the driver shows. Starts no CUDA context."""
    try:
        files = sorted(_NVIDIA.glob("*/information"))
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
    except OSError:
        return ()
    return tuple(_pairs(text).get("Model", "NVIDIA GPU") for text in texts)


def provider_devices(provider: str) -> tuple[str, ...]:
    """Names of the devices that a provider sees in this process, where its session is already open."""
    if provider in (CUDA_PROVIDER, TENSORRT_PROVIDER):
        return gpus()
    if provider == OPENVINO_PROVIDER:
        return tuple(
            f"{device.device.type.name} {device.ep_metadata.get('FULL_DEVICE_NAME', '')}".strip()
            for device in ep_devices(provider)
        )
    return (cpu_name(),)


def _cpuinfo() -> dict[str, str]:
    try:
        with _CPUINFO.open(encoding="utf-8", errors="replace") as file:
            return _pairs(file.read(1 << 14))
    except OSError:
        return {}


def _pairs(text: str) -> dict[str, str]:
    """``key : value`` lines; the first of a repeated key counts."""
    pairs: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            pairs.setdefault(key.strip(), value.strip())
    return pairs


def _memory_bytes() -> int:
    import psutil

    return int(psutil.virtual_memory().total)


def _version(distribution: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(distribution)
    except PackageNotFoundError:
        return ""
