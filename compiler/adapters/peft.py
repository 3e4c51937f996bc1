"""Read a LoRA adapter as PEFT saves it, and refuse what is more than LoRA on linear layers."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from artifacts.adapters import MAX_RANK, AdaptedModule
from artifacts.constraints import printable, shown
from artifacts.errors import SourceError, UnsupportedError

from ..checkpoint import check_safetensors, read_json
from ..stored_weights import FLOATS, StoredWeights

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
_KEY = re.compile(r"(?:base_model\.model\.)?([A-Za-z0-9_.]+)\.lora_([AB])(?:\.default)?\.weight")
_REMEDY = "Train it as LoRA on linear layers, or merge it into the model (merge_and_unload) and compile that"

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class LoraModule:
    """What an adapter does to one module: ``y = x W + (x a) b``.

    Attributes:
        entry: Its path and extents.
        a: float32 [rows, rank].
        b: float32 [rank, columns]; what LoRA scales by is in it.
    """

    entry: AdaptedModule
    a: Floats
    b: Floats


@dataclass(frozen=True)
class Lora:
    """A LoRA adapter.

    Attributes:
        modules: What it changes, sorted by path.
        base: What it says that it was trained on; empty where it does not say.
        digest: ``sha256:…`` of its two files.
    """

    modules: tuple[LoraModule, ...]
    base: str
    digest: str

    def to_bytes(self) -> bytes:
        """The numbers, in the order of the modules; see `artifacts.adapters.Adapter`."""
        arrays = (array for module in self.modules for array in (module.a, module.b))
        return b"".join(np.ascontiguousarray(array, "<f4").tobytes() for array in arrays)


def read_lora(folder: Path) -> Lora:
    """The adapter of a folder that PEFT's ``save_pretrained`` wrote.

    Formula: ``W + s B A``, ``s = alpha / r``, or ``alpha / sqrt(r)`` for rank-stabilized LoRA (Hu et al., 2021;
    Kalajdzievski, 2023).

    Raises:
        SourceError: A file is missing or not whole, the numbers are not finite, or A and B do not fit each other.
        UnsupportedError: It is no LoRA adapter, or does more than LoRA on linear layers; names what.
    """
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict):
        raise SourceError(f"{folder / CONFIG} is no JSON object", "Save the adapter again")
    _refuse(config, folder)
    path = folder / WEIGHTS
    if not path.is_file():
        pickled = " It holds adapter_model.bin, a pickle" if (folder / "adapter_model.bin").is_file() else ""
        remedy = "Save it with safetensors: model.save_pretrained(folder)"
        raise SourceError(f"{folder} holds no {WEIGHTS}.{pickled}", remedy)
    weights = StoredWeights(check_safetensors(path))
    pairs = _pairs(weights, path)
    modules = tuple(_module(name, pairs[name], weights, config, path) for name in sorted(pairs))
    base = config.get("base_model_name_or_path")
    digest = hashlib.sha256()
    for file in (folder / CONFIG, path):
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return Lora(modules, printable(base)[:256] if isinstance(base, str) else "", f"sha256:{digest.hexdigest()}")


_REFUSALS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("use_dora", bool, "it is DoRA, which also scales the columns of the weights"),
    ("use_qalora", bool, "it is QALoRA, which pools what goes into A"),
    ("bias", lambda value: value not in (None, "none"), "it changes biases too"),
    ("lora_bias", bool, "its B has biases"),
    ("modules_to_save", bool, "it replaces whole modules (modules_to_save)"),
    ("trainable_token_indices", bool, "it changes embeddings (trainable_token_indices)"),
    ("target_parameters", bool, "it changes parameters that are no linear layers (target_parameters)"),
    ("layer_replication", bool, "it repeats layers (layer_replication)"),
    ("alora_invocation_tokens", bool, "it is activated by tokens of the text (aLoRA)"),
    ("arrow_config", bool, "it routes between adapters (Arrow)"),
    (
        "init_lora_weights",
        lambda value: isinstance(value, str) and value.startswith(("pissa", "olora", "corda", "loftq", "lora_ga")),
        "its training began by changing the base (init_lora_weights)",
    ),
)
"""(key of the config, whether its value is refused, why)."""


def _refuse(config: Mapping[str, Any], folder: Path) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(f"{folder} is no LoRA adapter: its peft_type is {shown(kind)}", _REMEDY)
    for key, refused, reason in _REFUSALS:
        if refused(config.get(key)):
            raise UnsupportedError(f"the adapter {folder} cannot be added: {reason}", _REMEDY)


def _pairs(weights: StoredWeights, path: Path) -> dict[str, dict[str, str]]:
    """Module -> the names of its A and its B."""
    pairs: dict[str, dict[str, str]] = {}
    for name in weights:
        match = _KEY.fullmatch(name)
        if match is None:
            what = "changes embeddings" if "lora_embedding" in name else "holds what is no A or B of a linear layer"
            raise UnsupportedError(f"the adapter {path.parent} {what}: {shown(name)}", _REMEDY)
        pairs.setdefault(match[1], {})[match[2]] = name
    for module, found in pairs.items():
        if len(found) < 2:
            raise SourceError(f"{path} lacks {'B' if 'A' in found else 'A'} of {module}", "Save the adapter again")
    return pairs


def _module(
    module: str, pair: Mapping[str, str], weights: StoredWeights, config: Mapping[str, Any], path: Path
) -> LoraModule:
    again = "Save the adapter again"
    for name in pair.values():
        if weights[name].dtype not in FLOATS or len(weights[name].shape) != 2:
            stored = weights[name]
            raise SourceError(f"{name} in {path} is {stored.dtype} of {list(stored.shape)}, no float matrix", again)
    (rank, rows), (columns, other) = weights[pair["A"]].shape, weights[pair["B"]].shape
    if other != rank or not min(rank, rows, columns) or rank > MAX_RANK:
        what = f"A of {module} is {rank} x {rows} and B {columns} x {other}"
        raise SourceError(f"{path}: {what}", again if other != rank else f"Ranks from 1 to {MAX_RANK} are taken")
    a, b = weights.floats(pair["A"]).T, weights.floats(pair["B"]).T
    b = np.float32(_scale(module, rank, config)) * b
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise SourceError(f"{path} has numbers in {module} that are not finite", "Train it again")
    return LoraModule(AdaptedModule(module, rows, columns, rank), a, b)


def _scale(module: str, rank: int, config: Mapping[str, Any]) -> float:
    """What ``B A`` is multiplied by."""
    alphas = config.get("alpha_pattern")
    alpha = config.get("lora_alpha", 8)
    for pattern, own in alphas.items() if isinstance(alphas, dict) else ():
        if _names(pattern, module):
            alpha = own
            break
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise SourceError(f"lora_alpha of {module} is {shown(alpha)}, no number", "Save the adapter again")
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _names(pattern: str, module: str) -> bool:
    """Whether a key of alpha_pattern is for the module, as PEFT reads it: the path's end, or a regular expression."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error:
        return False
