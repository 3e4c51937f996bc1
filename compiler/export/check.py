"""Hold an exported graph against torch: batch and length other than the example's, padding, and empty rows."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from artifacts.errors import UnsupportedError
from runtimes.environment import ORT_ERRORS, short_reason
from runtimes.environment import onnxruntime as ort
from runtimes.golden import relative_error

from ..processor import Config, maximum_length, pad_id
from ..tolerance import rounding_tolerance
from .exported import Arrays, Reference

_LONGEST = 512  # tokens: all positions of most encoders; longer costs minutes


def check(model: ir.Model, reference: Reference, config: Config, seed: int) -> float:
    """Run the graph in ONNX Runtime, without its optimizations, and compare.

    Args:
        model: The graph.
        reference: The torch model.
        config: The model's complete config.
        seed: Of the token ids.

    Returns:
        Largest relative L2 distance.

    Raises:
        UnsupportedError: They differ by more than rounding, or an empty row gives numbers that are not finite.
    """
    names = [str(value.name) for value in model.graph.inputs]
    tolerance = rounding_tolerance(model)
    session = _session(model, config)
    worst = 0.0
    for feeds in sample_feeds(names, config, seed):
        expected = _valid(reference(feeds), feeds)
        outputs = _valid(_run(session, feeds, config), feeds)
        error = max(relative_error(outputs[name], expected[name]) for name in expected)
        if error > tolerance:
            shape = "x".join(str(size) for size in feeds["input_ids"].shape)
            raise UnsupportedError(
                f"the exported graph of {_name(config)} differs from torch by {error:.1e} at {shape} "
                f"(allowed {tolerance:.1e})",
                "Please report the architecture",
            )
        worst = max(worst, error)
    empty = next(iter(sample_feeds(names, config, seed)))
    empty["attention_mask"][0] = 0
    if not all(np.isfinite(array).all() for array in _run(session, empty, config).values()):
        raise UnsupportedError(f"the exported graph of {_name(config)} is not finite where a whole row is masked")
    return worst


def sample_feeds(names: Sequence[str], config: Config, seed: int) -> list[dict[str, NDArray[np.int64]]]:
    """Random ids: a ragged batch with columns that no row uses, one long row, one token alone."""
    generator = np.random.default_rng(seed)
    length = maximum_length(config)
    feeds = []
    for rows, columns, used in ((3, 17, (14, 6, 1)), (1, _LONGEST, (_LONGEST,)), (2, 5, (5, 3)), (1, 1, (1,))):
        width = min(columns, length)
        lengths = np.minimum(np.asarray(used), width)
        mask = (np.arange(width) < lengths[:, None]).astype(np.int64)
        ids = generator.integers(0, _vocabulary(config), (rows, width))
        pad = pad_id(config)
        ids = np.where(ids == pad, (pad + 1) % _vocabulary(config), ids)
        feed = {"input_ids": np.where(mask == 1, ids, pad).astype(np.int64), "attention_mask": mask}
        if "token_type_ids" in names:
            feed["token_type_ids"] = ((np.arange(width) >= lengths[:, None] // 2) & (mask == 1)).astype(np.int64)
        feeds.append(feed)
    return feeds


def _vocabulary(config: Config) -> int:
    size = config.get("vocab_size", 1000)
    return size if isinstance(size, int) and size > 1 else 1000


def _session(model: ir.Model, config: Config) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    with tempfile.TemporaryDirectory(prefix="hasten-") as folder:
        path = Path(folder) / "model.onnx"
        try:
            ir.save(model, path, external_data="weights.data")
            return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except ORT_ERRORS as error:
            raise UnsupportedError(
                f"ONNX Runtime refuses the exported graph of {_name(config)}: {short_reason(error)}"
            ) from error


def _run(session: ort.InferenceSession, feeds: dict[str, NDArray[np.int64]], config: Config) -> Arrays:
    try:
        outputs = session.run(None, feeds)
    except ORT_ERRORS as error:
        shape = "x".join(str(size) for size in feeds["input_ids"].shape)
        raise UnsupportedError(
            f"the exported graph of {_name(config)} fails at {shape}: {short_reason(error)}"
        ) from error
    return dict(zip((output.name for output in session.get_outputs()), outputs, strict=True))


def _valid(outputs: Arrays, feeds: dict[str, NDArray[np.int64]]) -> Arrays:
    """Outputs with the padded positions blanked: what a model computes there has no meaning."""
    mask = feeds["attention_mask"]
    blanked: Arrays = {}
    for name, array in outputs.items():
        if array.shape[:2] == mask.shape and name not in ("sentence_embedding",):
            keep = mask.reshape(*mask.shape, *([1] * (array.ndim - 2))).astype(bool)
            array = np.where(keep, array, 0)  # noqa: PLW2901
            if not math.isfinite(float(np.abs(array).max(initial=0.0))):
                array = np.where(np.isfinite(array), array, np.inf)  # noqa: PLW2901
        blanked[name] = array
    return blanked


def _name(config: Config) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else str(config.get("model_type"))
