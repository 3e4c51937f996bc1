"""ONNX Runtime, imported the one way hasten imports it, and what this process may use of the machine.

Everything in ``runtimes`` says ``from .environment import onnxruntime as ort``: Linux wheels of ONNX Runtime >= 1.29
send telemetry unless ``ORT_DISABLE_TELEMETRY`` is set *before* the import.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from artifacts.errors import InstallationError, ProviderError
from artifacts.target import OPENVINO_PROVIDER

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

try:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as _native
except (ImportError, OSError, AttributeError) as error:  # AttributeError: two distributions, half overwritten
    raise InstallationError(
        f"ONNX Runtime cannot be imported: {error}", "Run `hasten doctor`; reinstall onnxruntime if it is missing"
    ) from error

# The default logger prints to stderr what the exceptions say too. 4: fatal errors only.
onnxruntime.set_default_logger_severity(4)

# ONNX Runtime's own exceptions share no base class but Exception.
ORT_ERRORS: tuple[type[Exception], ...] = (
    *(
        kind
        for kind in vars(_native).values()
        if isinstance(kind, type) and issubclass(kind, Exception) and kind.__module__ == _native.__name__
    ),
    OSError,
    ValueError,
    RuntimeError,
    TypeError,
)

__all__ = [
    "ORT_ERRORS",
    "cache_directory",
    "ep_devices",
    "import_paths",
    "onnxruntime",
    "physical_cores",
    "register_openvino",
    "short_reason",
]


def physical_cores() -> int:
    """Physical cores this process may use: its affinity mask, hyper-threads counted once, and its CPU quota."""
    logical = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    cores = {_read(siblings.format(index)) or str(index) for index in logical}
    return max(1, min(len(cores), _quota() or len(cores)))


def _quota() -> int | None:
    # cgroup v2: "max 100000" or "<quota> <period>" in microseconds.
    words = _read("/sys/fs/cgroup/cpu.max").split()
    if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]) > 0:
        return -(-int(words[0]) // int(words[1]))
    return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def register_openvino() -> None:
    """Load the OpenVINO plugin into this process, once.

    Raises:
        ProviderError: The plugin is not installed or its library does not load.
    """
    if ep_devices(OPENVINO_PROVIDER):
        return
    if find_spec("onnxruntime_ep_openvino") is None:
        raise ProviderError("the OpenVINO plugin is not installed", "pip install onnxruntime-ep-openvino")
    import onnxruntime_ep_openvino as plugin

    try:
        onnxruntime.register_execution_provider_library(OPENVINO_PROVIDER, plugin.get_library_path())
    except ORT_ERRORS as error:
        raise ProviderError(f"the OpenVINO plugin does not load: {short_reason(error)}") from error


def ep_devices(provider: str) -> tuple[Any, ...]:
    """Devices (``OrtEpDevice``) that a registered provider offers in this process."""
    return tuple(device for device in onnxruntime.get_ep_devices() if device.ep_name == provider)


def short_reason(error: BaseException) -> str:
    """One line of an ONNX Runtime error: no error codes, C++ signatures or folders of shared libraries."""
    import re

    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"\[ONNXRuntimeError\] : \d+ : [A-Z_]+ : ", "", text)
    text = re.sub(r"(?<![\w.])/(?:[^\s/:]+/)+[\w.+-]*\.(?:cc|cpp|h|cuh|cu):\d+ (?:.*?\) )?", "", text)
    text = re.sub(r"(?<![\w.])/(?:[^\s/:]+/)+([\w.+-]+\.(?:so|dll|dylib)[\w.]*)", r"\1", text)
    text = text.strip(" :")
    return text if len(text) <= 300 else text[:297] + "..."


def cache_directory() -> Path:
    """Where decisions are cached: ``HASTEN_CACHE_DIR``, else the user's cache folder. It may not exist."""
    override = os.environ.get("HASTEN_CACHE_DIR")
    if override:
        return Path(override)
    if "linux" in sys.platform:  # As platformdirs says, whose import would cost every first load 10 ms.
        return Path(os.environ.get("XDG_CACHE_HOME", "").strip() or Path.home() / ".cache") / "hasten"
    import platformdirs

    return Path(platformdirs.user_cache_dir("hasten", appauthor=False))


def import_paths() -> list[str]:
    """``sys.path`` for a child process that must find the same modules, our own root included."""
    paths = [path or str(Path.cwd()) for path in sys.path]
    root = str(Path(__file__).resolve().parent.parent)
    return paths if root in paths else [*paths, root]
