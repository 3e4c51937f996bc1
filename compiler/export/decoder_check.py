"""Hold the graph of a language model against torch: a ragged prefill, then decode steps on the same KV buffers."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from artifacts.errors import UnsupportedError
from runtimes.environment import ORT_ERRORS, short_reason
from runtimes.environment import onnxruntime as ort
from runtimes.generate.feeds import step_feeds
from runtimes.golden import relative_error

from ..tolerance import rounding_tolerance
from .causal_attention import Layer
from .decoder_head import past_names, present_names
from .exported import Reference

_STEPS = 3  # decode steps
_LONGEST = 512  # tokens of the long prompt
_POSITIONS = 16  # of a prompt that get logits

Feeds = dict[str, NDArray[np.generic]]


def check_decoder(
    model: ir.Model, reference: Reference, layers: Sequence[Layer], limits: tuple[int, int], seed: int, *, name: str
) -> float:
    """Run the graph in ONNX Runtime, without its optimizations, and compare.

    Args:
        model: The graph.
        reference: The torch model, for prefills; asked before the graph is loaded.
        layers: What the graph's attention layers are.
        limits: Ids the model knows, and tokens it takes.
        seed: Of the token ids.
        name: Of the architecture.

    Returns:
        Largest relative L2 distance between logits.

    Raises:
        UnsupportedError: They differ by more than rounding.
    """
    tolerance = rounding_tolerance(model)
    cases = list(_cases(limits, seed))
    # Before there is a session, so that the weights of both are never in memory together.
    answers = [reference(case.feeds)["logits"] for case in cases]
    session = _session(model, name)
    worst = 0.0
    for case, wanted in zip(cases, answers, strict=True):
        buffers = _Buffers(session, layers, len(case.prompts), case.ids.shape[1] + 1)
        with _told(name):
            got = [buffers.run(_prompt(case.ids, case.prompts, case.index))]
            for step in range(case.steps):
                token = np.take_along_axis(case.ids, case.later[:, step : step + 1], axis=1)
                got.append(buffers.run(step_feeds(token, case.prompts + step, np.zeros_like(token))))
        error = relative_error(np.concatenate(got, axis=1), wanted)
        if not error <= tolerance:
            raise UnsupportedError(
                f"the exported graph of {name} differs from torch by {error:.1e} for prompts of "
                f"{', '.join(map(str, case.prompts))} tokens and {case.steps} more (allowed {tolerance:.1e})",
                "Please report the architecture",
            )
        worst = max(worst, error)
    return worst


@dataclass(frozen=True)
class _Case:
    """Rows that are read as a prompt, then token by token.

    Attributes:
        ids: All tokens, ``[rows, columns]``.
        prompts: Tokens of each row's prompt, ``[rows]``.
        index: Positions of the prompt that get logits, ``[rows, positions]``.
        steps: Tokens that come after it, one by one.
    """

    ids: NDArray[np.int64]
    prompts: NDArray[np.int64]
    index: NDArray[np.int64]
    steps: int

    @property
    def later(self) -> NDArray[np.int64]:
        """Positions of what comes after the prompt, ``[rows, steps]``."""
        return self.prompts[:, None] + np.arange(self.steps)

    @property
    def feeds(self) -> Feeds:
        """All of it as one prompt."""
        return _prompt(self.ids, self.prompts + self.steps, np.concatenate([self.index, self.later], axis=1))


def _cases(limits: tuple[int, int], seed: int) -> Iterator[_Case]:
    vocabulary, context = limits
    generator = np.random.default_rng(seed)
    for longest in ((14, 6, 1), (_LONGEST,)):
        prompts = np.minimum(np.asarray(longest, np.int64), max(context - _STEPS, 1))
        steps = min(_STEPS, context - int(prompts.max()))
        ids = generator.integers(0, vocabulary, (len(prompts), int(prompts.max()) + steps))
        yield _Case(ids, prompts, np.linspace(0, prompts - 1, _POSITIONS, axis=1).astype(np.int64), steps)


def _prompt(ids: NDArray[np.int64], lengths: NDArray[np.int64], index: NDArray[np.int64]) -> Feeds:
    """Feeds of a first prompt, the first ``lengths [rows]`` of ``ids [rows, columns]``, but for its KV buffers."""
    return step_feeds([row[:length] for row, length in zip(ids, lengths, strict=True)], 0, index)


class _Buffers:
    """A session with KV buffers: past and present are bound to the same memory, which starts as not-a-number."""

    def __init__(self, session: ort.InferenceSession, layers: Sequence[Layer], rows: int, capacity: int) -> None:
        self._session = session
        shapes = [(rows, layer.kv_heads, capacity, layer.cache_width) for layer in layers for _ in range(2)]
        values = [ort.OrtValue.ortvalue_from_numpy(np.full(shape, np.nan, np.float32)) for shape in shapes]
        self._bound = list(zip(past_names(len(layers)), present_names(len(layers)), values, strict=True))

    def run(self, feeds: Feeds) -> NDArray[np.float32]:
        """Logits ``[rows, positions, vocabulary]``; the buffers hold the call's keys and values afterwards."""
        binding = self._session.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for past, present, value in self._bound:
            binding.bind_ortvalue_input(past, value)
            binding.bind_ortvalue_output(present, value)
        binding.bind_output("logits", "cpu")
        self._session.run_with_iobinding(binding)
        logits: NDArray[np.float32] = binding.get_outputs()[-1].numpy()
        return logits


def _session(model: ir.Model, name: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")  # a few runs do not repay a copy of the weights
    with tempfile.TemporaryDirectory(prefix="hasten-") as folder, _told(name):
        path = Path(folder) / "model.onnx"
        ir.save(model, path, external_data="weights.data")
        return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """Errors of ONNX Runtime, told as the architecture's."""
    try:
        yield
    except ORT_ERRORS as error:
        raise UnsupportedError(f"the exported graph of {name} does not run: {short_reason(error)}") from error
