"""One loaded graph on one execution provider."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from artifacts.errors import ProviderError, UsageError
from artifacts.manifest import SessionOptions, TensorSpec
from artifacts.target import CPU_PROVIDER, CUDA_PROVIDER, OPENVINO_PROVIDER, TENSORRT_PROVIDER

from .environment import ORT_ERRORS, ep_devices, register_openvino, short_reason
from .environment import onnxruntime as ort
from .providers import find, parse_device, preload, translate, why_not
from .settings import Settings, default_settings

Feeds = Mapping[str, NDArray[Any]]

_LEVELS = {
    "disabled": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
_DTYPES = {"float": "float32", "double": "float64", "bool": "bool", "string": "str"}
_ERROR_LEVEL = 3


class Session:
    """A graph loaded on a provider, ready to run. Safe to call from several threads, as ONNX Runtime's sessions are.

    Args:
        model: The ``.onnx`` file; its external data lies beside or below it.
        provider: Execution provider, by full name.
        options: What the variant fixes of ONNX Runtime's own optimizers and of the provider's precision.
        device: ``cpu``, ``cuda``, ``cuda:1``...
        threads: Threads within an operator; 0 means the physical cores this process may use. ``settings`` says it too.
        settings: How it uses the machine; None: `default_settings`.
        wide: Open it for ``settings.lanes`` runs at once, on one thread each, instead of for one run on all threads.
        record_assignment: Keep which node went to which provider, for :meth:`assignment`.
        io_binding: Bind tensors to the device; None means where it gains (CUDA, TensorRT).
        optimized: Write the graph that ONNX Runtime made of the model to this file.
        profile: Record every run in a trace beside this path; :meth:`end_profile` says which file it is.

    Raises:
        ProviderError: ONNX Runtime or the provider refuses the model, or would have fallen back to another provider.
    """

    def __init__(
        self,
        model: Path,
        provider: str,
        *,
        options: SessionOptions,
        device: str = "",
        threads: int = 0,
        settings: Settings | None = None,
        wide: bool = False,
        record_assignment: bool = False,
        io_binding: bool | None = None,
        optimized: Path | None = None,
        profile: Path | None = None,
    ) -> None:
        self.provider = provider
        self.device = device or find(provider).devices[0]
        self._device_kind, self._device_index = parse_device(self.device)
        self.settings = settings or default_settings(provider, self.device, threads)
        self.threads = self.settings.threads
        self.lanes = self.settings.lanes if wide else 1
        self._bind = provider in (CUDA_PROVIDER, TENSORRT_PROVIDER) if io_binding is None else io_binding
        told = self._session_options(options, record_assignment, optimized)
        if profile is not None:
            told.enable_profiling, told.profile_file_prefix = True, str(profile)
        self._profiled = profile is not None
        self._session = self._open(model, told, options)
        self.inputs = tuple(_spec(value) for value in self._session.get_inputs())
        self.outputs = tuple(_spec(value) for value in self._session.get_outputs())
        self._names = [spec.name for spec in self.outputs]

    def run(self, feeds: Feeds) -> dict[str, NDArray[Any]]:
        """Outputs by name.

        Raises:
            ProviderError: The feeds do not fit the graph, or execution failed.
        """
        if self._session is None:
            raise ProviderError("the session is closed")
        try:
            values = self._run_bound(feeds) if self._bind else self._session.run(self._names, feeds)
        except ORT_ERRORS as error:
            raise ProviderError(f"{find(self.provider).short} cannot run the model: {short_reason(error)}") from error
        return dict(zip(self._names, values, strict=True))

    def bind(self, inputs: Feeds, outputs: Feeds) -> Binding:
        """Tie every input and output of the graph to arrays of the caller's, for many runs.

        Args:
            inputs: By name; each run reads what they hold then.
            outputs: By name, of the shapes that the graph computes; each run writes into them. An array that is also an
                input is updated in place, if the graph and the provider can.

        Raises:
            UsageError: An array is not C-contiguous: it would be copied, and the copy updated.
            ProviderError: The session is closed, or the arrays do not fit the graph.
        """
        if self._session is None:
            raise ProviderError("the session is closed")
        return Binding(self._session, self.provider, self._device_kind, inputs, outputs)

    def assignment(self) -> dict[str, tuple[tuple[str, str], ...]]:
        """(node name, operator type) by provider, as partitioned at load. Needs ``record_assignment=True``."""
        nodes: dict[str, list[tuple[str, str]]] = {}
        if self._session is None:
            raise ProviderError("the session is closed")
        try:
            groups = self._session.get_provider_graph_assignment_info()
        except ORT_ERRORS as error:
            raise ProviderError(f"the node assignment was not recorded: {short_reason(error)}") from error
        for group in groups:
            nodes.setdefault(group.ep_name, []).extend((node.name, node.op_type) for node in group.get_nodes())
        return {name: tuple(found) for name, found in nodes.items()}

    def fallback(self) -> tuple[str, ...]:
        """``name (operator)`` of the nodes that another provider runs. Needs ``record_assignment=True``."""
        return tuple(
            f"{name or '?'} ({operator})"
            for provider, nodes in self.assignment().items()
            if provider != self.provider
            for name, operator in nodes
        )

    def end_profile(self) -> Path:
        """The trace of the runs so far, as `runtimes.kernels.read_trace` takes it. Needs ``profile``."""
        if self._session is None or not self._profiled:
            raise ProviderError("the session was not profiled")
        return Path(self._session.end_profiling())

    def close(self) -> None:
        """Free the graph and its threads."""
        self._session = None

    def _session_options(self, options: SessionOptions, record: bool, optimized: Path | None) -> ort.SessionOptions:
        told = ort.SessionOptions()
        told.log_severity_level = _ERROR_LEVEL
        # On one thread a run stays on the thread that called it, so that as many run at once as there are callers.
        told.intra_op_num_threads = 1 if self.lanes > 1 else self.threads
        told.graph_optimization_level = _LEVELS[options.optimization_level]
        told.enable_cpu_mem_arena = self.settings.arena
        # An idle session must not burn the cores that another one, or the tokenizer, needs. Measured so, shipped so.
        told.add_session_config_entry("session.force_spinning_stop", "1")
        if not self.settings.spinning:
            told.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if record:
            told.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        if optimized is not None:
            told.optimized_model_filepath = str(optimized)
        return told

    def _open(self, model: Path, told: ort.SessionOptions, options: SessionOptions) -> ort.InferenceSession:
        arguments: dict[str, Any] = {"enable_fallback": 0}
        if options.disabled_optimizers:
            arguments["disabled_optimizers"] = list(options.disabled_optimizers)
        provider = translate(
            options,
            self.provider,
            device=self.device,
            threads=self.threads,
            streams=self.lanes,
            profile=self._profiled,
        )
        short = find(self.provider).short
        try:
            if self.provider == OPENVINO_PROVIDER:
                told.add_provider_for_devices(self._plugin_devices(), provider)
            else:
                preload(self.provider)
                arguments["providers"] = _with_fallbacks(self.provider, provider)
            session = ort.InferenceSession(str(model), told, **arguments)
        except ORT_ERRORS as error:
            if missing := why_not(self.provider):
                raise ProviderError(f"{short} does not work here: {missing}") from error
            raise ProviderError(f"{short} cannot load {model.name}: {short_reason(error)}") from error
        got = session.get_providers()
        if not got or got[0] != self.provider:
            reason = why_not(self.provider) or f"ONNX Runtime fell back to {', '.join(got) or 'nothing'}"
            raise ProviderError(f"{short} does not work here: {reason}")
        return session

    def _plugin_devices(self) -> list[Any]:
        register_openvino()
        found = [d for d in ep_devices(self.provider) if d.device.type.name.lower() == self._device_kind]
        if self._device_index >= len(found):
            raise ProviderError(f"openvino has no device {self.device} here")
        return found[self._device_index : self._device_index + 1]

    def _run_bound(self, feeds: Feeds) -> list[NDArray[Any]]:
        binding = self._session.io_binding()
        for name, value in feeds.items():
            array = np.ascontiguousarray(value)
            copy = ort.OrtValue.ortvalue_from_numpy(array, self._device_kind, self._device_index)
            binding.bind_ortvalue_input(name, copy)
        for name in self._names:
            binding.bind_output(name, self._device_kind, self._device_index)
        self._session.run_with_iobinding(binding)
        outputs: list[NDArray[Any]] = binding.copy_outputs_to_cpu()
        return outputs


class Binding:
    """Arrays tied to the inputs and outputs of a session, see `Session.bind`. It keeps them and the session alive."""

    def __init__(
        self, session: ort.InferenceSession, provider: str, device: str, inputs: Feeds, outputs: Feeds
    ) -> None:
        self._session = session
        self._provider = provider
        # A device other than the CPU takes its copy of the inputs when they are bound: bind them for each run.
        self._again = device != "cpu"
        for name, array in (*inputs.items(), *outputs.items()):
            if not array.flags.c_contiguous:
                raise UsageError(f"the array for {name} is not C-contiguous", "Pass a contiguous one")
        # On the CPU a value is the array's own memory; nothing is copied.
        self._inputs, self._outputs = (
            {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
            for arrays in (inputs, outputs)
        )
        self._arrays = (inputs, outputs)
        self._binding = self._bound()

    def run(self) -> None:
        """Read the inputs, compute, write the outputs.

        Raises:
            ProviderError: Execution failed.
        """
        if self._again:
            self._binding = self._bound()
        try:
            self._session.run_with_iobinding(self._binding)
        except ORT_ERRORS as error:
            short = find(self._provider).short
            raise ProviderError(f"{short} cannot run the model: {short_reason(error)}") from error

    def _bound(self) -> ort.IOBinding:
        binding = self._session.io_binding()
        try:
            for name, value in self._inputs.items():
                binding.bind_ortvalue_input(name, value)
            for name, value in self._outputs.items():
                binding.bind_ortvalue_output(name, value)
        except ORT_ERRORS as error:
            raise ProviderError(f"the arrays do not fit the graph: {short_reason(error)}") from error
        return binding


def _with_fallbacks(provider: str, told: dict[str, str]) -> list[tuple[str, dict[str, str]]]:
    # The CPU provider is always there for what the asked one leaves; TensorRT leaves it to CUDA first.
    chain = [(provider, told)]
    if provider == TENSORRT_PROVIDER:
        chain.append((CUDA_PROVIDER, {"device_id": told["device_id"]}))
    if provider != CPU_PROVIDER:
        chain.append((CPU_PROVIDER, {}))
    return chain


def _spec(value: ort.NodeArg) -> TensorSpec:
    match = re.fullmatch(r"tensor\((\w+)\)", value.type)
    name = match.group(1) if match else value.type
    shape = tuple(size if isinstance(size, int) else size or "?" for size in value.shape)
    return TensorSpec(value.name, _DTYPES.get(name, name), shape)
