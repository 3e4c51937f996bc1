"""A graph in ONNX Runtime as calibration wants it: nothing fused, nothing kept between runs."""

from __future__ import annotations

import ctypes
import json
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from artifacts.errors import DataError, ProviderError
from artifacts.target import CPU_PROVIDER
from runtimes.environment import ORT_ERRORS, physical_cores, short_reason
from runtimes.environment import onnxruntime as ort

from .batches import Batch, place

Event = dict[str, Any]
KERNEL = "_kernel_time"
"""End of the name of the event of an operator; before it stands the name of the node."""


class CalibrationSession:
    """One graph on the CPU, with ONNX Runtime's optimizations off. A context manager.

    Memory goes back as soon as what it holds was read last, and weights are read where the file is mapped: there is no
    arena, no buffer is used again, and no weight is packed; unless there is room for all that, which saves time.
    """

    def __init__(self, model: Path, *, threads: int = 0, profile: Path | None = None, roomy: bool = False) -> None:
        """Load it.

        Args:
            model: The ``.onnx`` file; its weights lie beside it.
            threads: Threads within an operator; 0: the physical cores this process may use.
            profile: A folder: every run leaves there what each node took and gave, for `profiled`.
            roomy: It may take twice the memory.

        Raises:
            ProviderError: ONNX Runtime cannot load it.
        """
        settings = ort.SessionOptions()
        settings.log_severity_level = 4
        settings.intra_op_num_threads = threads or physical_cores()
        settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        settings.enable_cpu_mem_arena = roomy
        settings.enable_mem_pattern = roomy
        settings.enable_mem_reuse = roomy
        # In the order of the graph, the shapes of values first: what is only measured is let go at once.
        settings.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        settings.add_session_config_entry("session.disable_prepacking", "0" if roomy else "1")
        settings.add_session_config_entry("session.force_spinning_stop", "1")
        if profile is not None:
            settings.enable_profiling = True
            settings.profile_file_prefix = str(profile / "profile")
        try:
            self._session = ort.InferenceSession(str(model), settings, providers=[CPU_PROVIDER], enable_fallback=0)
        except ORT_ERRORS as error:
            raise ProviderError(f"ONNX Runtime cannot load the graph to calibrate: {short_reason(error)}") from error
        self._names = [output.name for output in self._session.get_outputs()]

    def __enter__(self) -> CalibrationSession:
        return self

    def __exit__(self, *raised: object) -> None:
        self._session = None

    def run(self, batch: Batch) -> list[NDArray[Any]]:
        """Outputs in the order of the graph.

        Raises:
            DataError: It fails, as it does for ids beyond the end of a table.
        """
        try:
            outputs: list[NDArray[Any]] = self._session.run(self._names, dict(batch.feeds))
        except ORT_ERRORS as error:
            raise DataError(
                f"the model cannot run {place(batch.examples)}: {short_reason(error)}", "Correct them"
            ) from error
        return outputs

    def profiled(self) -> list[list[Event]]:
        """The events of each run so far, in order; deletes them. Needs ``profile``, and can be called once."""
        path = Path(self._session.end_profiling())
        events = json.loads(path.read_bytes())
        path.unlink()
        runs: list[list[Event]] = [[]]
        for event in events:
            runs[-1].append(event)
            if event["name"] == "model_run":
                runs.append([])
        return runs[:-1]


def give_back() -> None:
    """Hand memory that is free back to the system, where the C library holds on to it: glibc does, between the blocks
    still in use, and so grows to twice what is live.
    """
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # another C library; Windows has no handle without a name
        return
    trim(ctypes.c_size_t(0))
