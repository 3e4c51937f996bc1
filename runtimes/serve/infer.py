"""One inference: what was asked is checked against the model, run by its engine in portions, and put together."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
import orjson

from artifacts.constraints import shown
from artifacts.errors import ProviderError, UsageError
from artifacts.manifest import Manifest, TensorSpec

from ..engine.calls import Call
from .tensors import Array, InferRequest, Output, to_array, to_texts

if TYPE_CHECKING:
    from ..engine.engine import Engine

P = ParamSpec("P")
T = TypeVar("T")

TEXT_INPUTS: Mapping[str, tuple[str, ...]] = {
    "feature-extraction": ("text",),
    "text-classification": ("text", "text_pair"),
    "token-classification": ("text",),
    "fill-mask": ("text",),
    "question-answering": ("question", "context"),
}
"""Task -> the BYTES inputs [n] that stand for texts."""
OPTIONAL = "text_pair"
MOST_BYTES = 256 << 20
"""Of the outputs of one request, where the manifest says how large they will be."""
_TOKENS = 8192
_LARGE = 1 << 18


def text_outputs(manifest: Manifest) -> list[tuple[str, str, list[int]]]:
    """Name, datatype and shape of what is answered to texts: JSON in BYTES where it is no tensor by nature."""
    if manifest.task not in TEXT_INPUTS:
        return []
    if manifest.task == "feature-extraction":
        width = manifest.outputs[0].shape[-1] if manifest.outputs[0].shape else -1
        return [("embedding", "FP32", [-1, width if isinstance(width, int) else -1])]
    if manifest.task == "text-classification":
        classes = len(manifest.processor.labels) if manifest.processor and manifest.processor.labels else -1
        return [("label", "BYTES", [-1]), ("score", "FP32", [-1]), ("scores", "FP32", [-1, classes])]
    return [("result", "BYTES", [-1])]


async def infer_tensors(engine: Engine, asked: InferRequest, call: Call) -> Mapping[str, Output]:
    """The outputs of the graph, all of them, for plain tensors.

    Raises:
        UsageError: An input is missing, unknown, of another datatype or shape, or the graph refuses what is in it.
    """
    manifest = engine.bundle.manifest
    specs = {spec.name: spec for spec in manifest.inputs}
    _check_names(asked, specs, [spec.name for spec in manifest.outputs], _takes(manifest))
    _check_extents(asked, manifest)
    size = sum(tensor.elements for tensor in asked.inputs.values())
    feeds = await apart(size, lambda: {name: to_array(one, specs[name]) for name, one in asked.inputs.items()})
    parts = portions(feeds, manifest)
    try:
        found = await _together([engine.ask("run", part, call) for part in parts])
    except ProviderError as error:
        raise UsageError(f"the model does not run on these tensors: {error.what}", "Send others") from error
    if len(found) == 1:
        return found[0].arrays
    joined = {name: [answer.arrays[name] for answer in found] for name in found[0].arrays}
    return {name: await apart(MOST_BYTES, np.concatenate, arrays) for name, arrays in joined.items()}


def portions(feeds: Mapping[str, Array], manifest: Manifest) -> list[Mapping[str, Array]]:
    """The rows of a text model's tensors in portions of some thousand tokens, as texts would be; else all at once.

    Rows of a text model know nothing of each other, and what attention takes grows with the size of a batch.
    """
    rows = {spec.shape[0] if spec.shape else 0 for spec in (*manifest.inputs, *manifest.outputs)}
    if manifest.processor is None or len(rows) != 1 or not isinstance(rows.pop(), str):
        return [feeds]
    first = next(iter(feeds.values()))
    step = max(1, _TOKENS * len(first) // first.size)
    return [{name: array[at : at + step] for name, array in feeds.items()} for at in range(0, len(first), step)]


async def _together(asked: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All of them at once, in order; where one fails, the others are given up."""
    tasks = [asyncio.ensure_future(one) for one in asked]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()


async def infer_texts(engine: Engine, asked: InferRequest, call: Call) -> Mapping[str, Output]:
    """The outputs of `text_outputs` for texts.

    Raises:
        UsageError: An input is missing, unknown or no list of texts, or two are of different lengths.
    """
    manifest = engine.bundle.manifest
    names = TEXT_INPUTS[manifest.task]
    missing = [name for name in names if name not in asked.inputs and name != OPTIONAL]
    _check_names(asked, [*asked.inputs, *missing], [one[0] for one in text_outputs(manifest)], _takes(manifest))
    if unknown := [name for name in asked.inputs if name not in names]:
        raise UsageError(f"texts and the input {shown(unknown[0])} were both sent", _takes(manifest))
    columns = {name: to_texts(tensor) for name, tensor in asked.inputs.items()}
    lengths = {len(texts) for texts in columns.values()}
    if len(lengths) > 1:
        raise UsageError(f"the inputs {' and '.join(columns)} have different lengths", "Send as many of each")
    if manifest.task == "feature-extraction":
        return (await engine.ask("embed", columns["text"], call)).arrays
    records = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    rows = (await engine.ask("rows", records, call)).rows
    if manifest.task != "text-classification":
        return {"result": [orjson.dumps(row).decode() for row in rows]}
    return {
        "label": [str(row["label"]) for row in rows],
        "score": np.array([row["score"] for row in rows], np.float32),
        "scores": np.array([list(row["scores"].values()) for row in rows], np.float32),
    }


def _check_names(asked: InferRequest, inputs: Collection[str], outputs: Sequence[str], takes: str) -> None:
    if unknown := [name for name in asked.inputs if name not in inputs]:
        raise UsageError(f"the model has no input {shown(unknown[0])}", takes)
    if missing := [name for name in inputs if name not in asked.inputs]:
        raise UsageError(f"input {shown(missing[0])} is missing", takes)
    if wrong := [one.name for one in asked.outputs if one.name not in outputs]:
        raise UsageError(f"these inputs give no output {shown(wrong[0])}", f"They give {', '.join(outputs)}")


def _check_extents(asked: InferRequest, manifest: Manifest) -> None:
    """Refuse inputs that disagree about an extent which has a name, and texts longer than the model takes."""
    known: dict[str, tuple[int, str]] = {}
    for spec in manifest.inputs:
        shape = asked.inputs[spec.name].shape
        if len(shape) != len(spec.shape):
            continue  # `to_array` says so
        for wanted, extent in zip(spec.shape, shape, strict=True):
            if isinstance(wanted, str) and known.setdefault(wanted, (extent, spec.name))[0] != extent:
                first, name = known[wanted]
                raise UsageError(
                    f"input {spec.name!r} has {extent} where {name!r} has {first}: both are {shown(wanted)}",
                    "Send inputs that fit together",
                )
        if manifest.processor and len(shape) > 1 and shape[1] > manifest.processor.max_length:
            most = manifest.processor.max_length
            raise UsageError(f"input {spec.name!r} has {shape[1]} tokens", f"The model takes {most}")
    size = sum(_bytes(spec, {name: extent for name, (extent, _) in known.items()}) for spec in manifest.outputs)
    if size > MOST_BYTES:
        raise UsageError(f"the outputs would have {size} bytes; {MOST_BYTES} are sent", "Send fewer rows at a time")


def _bytes(spec: TensorSpec, known: Mapping[str, int]) -> int:
    """Bytes of an output, an extent that nobody knows yet taken for 1."""
    width = 2 if spec.dtype == "bfloat16" else np.dtype(spec.dtype).itemsize
    return width * math.prod(extent if isinstance(extent, int) else known.get(extent, 1) for extent in spec.shape)


def _takes(manifest: Manifest) -> str:
    texts = TEXT_INPUTS.get(manifest.task)
    tensors = ", ".join(spec.name for spec in manifest.inputs)
    return f"It takes {tensors}" + (f"; or {', '.join(texts)} as BYTES" if texts else "")


async def apart(size: int, work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """``work(…)``; on a thread where there is much to do, so that others are answered meanwhile."""
    if size <= _LARGE:
        return work(*args, **options)
    return await asyncio.to_thread(work, *args, **options)
