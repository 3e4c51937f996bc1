"""``hasten inspect SOURCE``: whether a model can be compiled, told from its config.json alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from artifacts.errors import SourceError, UnsupportedError

_FACTS = (
    ("hidden_size", "hidden size"),
    ("n_embd", "hidden size"),
    ("num_hidden_layers", "layers"),
    ("n_layer", "layers"),
    ("num_attention_heads", "attention heads"),
    ("n_head", "attention heads"),
    ("num_key_value_heads", "key/value heads"),
    ("head_dim", "head size"),
    ("vocab_size", "vocabulary"),
    ("max_position_embeddings", "context"),
    ("n_positions", "context"),
    ("sliding_window", "sliding window"),
)


@dataclass(frozen=True)
class Examined:
    """What config.json says of a model.

    Attributes:
        name: Name of its folder, or its hub id.
        architecture: Class in transformers.
        task: What it would be compiled for; empty where that cannot be told.
        supported: `hasten compile` takes it.
        reason: Why it does not; empty if it does.
        facts: What the config states of its size, by name.
    """

    name: str
    architecture: str
    task: str
    supported: bool
    reason: str
    facts: dict[str, int]


def is_model(source: str) -> bool:
    """Whether this is a model and no bundle: a folder with config.json, or a hub id ``owner/name`` that is no path."""
    path = Path(source)
    try:
        if path.exists():
            return (path / "config.json").is_file() and not (path / "manifest.json").exists()
    except (OSError, ValueError):  # too long, or no name at all: the bundle's reader says so
        return False
    if "/" not in source or path.parent.exists():
        return False
    from compiler.hub import looks_like_hub_id

    return looks_like_hub_id(source)


def examine(source: str) -> Examined:
    """Read config.json and say whether the model can be compiled. No weights are read, nor downloaded.

    Args:
        source: A Hugging Face folder or a hub id.

    Raises:
        SourceError: There is no such model, or its config.json is none.
        InstallationError: The ``compile`` extra is not installed.
    """
    from compiler.checkpoint import read_json

    path = Path(source)
    place = path / "config.json" if path.is_dir() else _from_hub(source)
    config = read_json(place)
    names = config.get("architectures") if isinstance(config, dict) else None
    if not isinstance(config, dict) or not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise SourceError(f"{place} names no architectures", 'Add its class: "architectures": ["LlamaForCausalLM"]')
    sentence = path.is_dir() and (path / "modules.json").is_file()
    task, reason = _task(names[0], config, sentence=sentence)
    facts = {label: config[key] for key, label in _FACTS if type(config.get(key)) is int}
    name = path.resolve().name if path.is_dir() else source
    return Examined(name, names[0], task, not reason, reason, facts)


def _task(architecture: str, config: dict[str, object], *, sentence: bool) -> tuple[str, str]:
    """The task, and why the architecture is not compiled for it."""
    from compiler.tasks import GENERATION, refusal, serves

    try:
        task = serves(architecture, "feature-extraction" if sentence else None)
    except UnsupportedError as error:
        return "", str(error)
    if task != GENERATION:
        return task, refusal(task, architecture, config)
    from compiler.export.decoder_survey import decoder_refusal

    return task, decoder_refusal(config, architecture)


def _from_hub(hub_id: str) -> Path:
    from compiler.quiet import quiet

    try:
        with quiet():
            from huggingface_hub import hf_hub_download

            return Path(hf_hub_download(hub_id, "config.json"))
    except (OSError, ValueError) as error:  # what the hub and the network raise
        remedy = "Check the name, or download the model elsewhere and pass its folder"
        raise SourceError(f"{hub_id} is no path, and its config.json cannot be had from the hub", remedy) from error
