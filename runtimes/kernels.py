"""Which kernels ran and how long each took, from the trace that ONNX Runtime writes of a profiled session."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from artifacts.errors import ProviderError

INTEGER_OPERATORS = (
    "DynamicQuantizeMatMul",
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "MatMulNBits",
    "QGemm",
    "QLinearMatMul",
)
"""Operators of the CPU provider that multiply integers."""


@dataclass(frozen=True)
class Kernel:
    """One node of the graph that the provider made of the model, as it ran.

    Attributes:
        name: The node's name.
        operator: Its operator type, in the provider's words (``MatMulIntegerToFloat``, ``FullyConnected``).
        implementation: The kernel behind it where the provider tells (``brgemm_avx512_amx_I8``), else the operator.
        ms: Milliseconds of one run, mean over the runs of the trace.
    """

    name: str
    operator: str
    implementation: str
    ms: float

    @property
    def integer(self) -> bool:
        """Whether it multiplies 8-bit integers (or unpacks 8-bit weights)."""
        product = self.operator.startswith(("FullyConnected", "MatMul"))
        return self.operator in INTEGER_OPERATORS or (product and self.implementation.lower().endswith("_i8"))


@dataclass(frozen=True)
class Share:
    """All kernels of one kind.

    Attributes:
        operator: Operator type.
        implementation: Kernel.
        count: How many nodes.
        ms: Milliseconds of one run, all of them together.
    """

    operator: str
    implementation: str
    count: int
    ms: float


def read_trace(path: Path, *, runs: int) -> tuple[Kernel, ...]:
    """The kernels of a trace of that many equal runs, in the order in which they first ran.

    The first run is left out where there are more: it pays for buffers and kernels of a new shape.

    Raises:
        ProviderError: The file is no trace of ONNX Runtime's, or no kernel is in it.
    """
    try:
        events: list[dict[str, Any]] = json.loads(path.read_bytes())
        found = [one for event in events if (one := _kernel(event)) is not None]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ProviderError(f"the profile cannot be read: {error}") from error
    # A provider that compiles the graph shows as one node of ONNX Runtime's around its own kernels.
    own = [kernel for kernel, inner in found if inner] or [kernel for kernel, _ in found]
    if not own:
        raise ProviderError("the profile holds no kernels")
    times: dict[tuple[str, str, str], list[float]] = {}
    for kernel in own:
        times.setdefault((kernel.name, kernel.operator, kernel.implementation), []).append(kernel.ms)
    return tuple(Kernel(*key, sum(ms[runs > 1 :]) / max(1, runs - 1)) for key, ms in times.items())


def shares(kernels: Iterable[Kernel]) -> tuple[Share, ...]:
    """The kernels by kind, the costliest first."""
    kinds: dict[tuple[str, str], list[float]] = {}
    for kernel in kernels:
        kinds.setdefault((kernel.operator, kernel.implementation), []).append(kernel.ms)
    found = (Share(*kind, len(ms), sum(ms)) for kind, ms in kinds.items())
    return tuple(sorted(found, key=lambda share: -share.ms))


def _kernel(event: dict[str, Any]) -> tuple[Kernel, bool] | None:
    """The kernel of one event, and whether it is one inside a compiled node."""
    arguments, ms = event.get("args", {}), float(event.get("dur", 0)) / 1e3
    if event.get("cat") == "Kernel" and "ov_exec_type" in arguments:
        if arguments.get("ov_status") != "EXECUTED":
            return None
        name = str(event["name"]).removeprefix("OV::")
        return Kernel(name, arguments["ov_node_type"], arguments["ov_exec_type"], ms), True
    if event.get("cat") == "Node" and str(event["name"]).endswith("_kernel_time"):
        operator = arguments["op_name"]
        return Kernel(event["name"].removesuffix("_kernel_time"), operator, operator, ms), False
    return None
