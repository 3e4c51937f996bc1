"""Read a model source and refuse what cannot be compiled, as far as that can be told without torch or transformers."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from artifacts.errors import SourceError, UnsupportedError, UsageError

from .checkpoint import check_onnx, check_weights, read_json
from .decoders import is_language_model, named_refusal
from .hub import download, looks_like_hub_id
from .tasks import EMBEDDING_TASKS, GENERATION, TASKS, TENSORS, refusal, serves

POOLING_MODES = ("mean", "cls", "max", "none")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "bpe.codes",
    "spm.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_VOCABULARY_FILES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "bpe.codes",
    "spm.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
_SENTENCE_FILES = ("modules.json", "sentence_bert_config.json")
_SENTENCE_MODULES = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True)
class Pooling:
    """How token vectors become one vector of a text.

    Attributes:
        mode: ``mean``, ``cls``, ``max``, or ``none`` (token vectors are the output).
        normalize: Scale the vector to length 1.
        max_length: Longest text in tokens that a sentence-transformers folder states; 0 where it states none.
    """

    mode: str = "mean"
    normalize: bool = False
    max_length: int = 0


@dataclass(frozen=True)
class ModelSource:
    """A model that was found, and whose files are whole.

    Attributes:
        name: Short name: the last part of the path or hub id.
        kind: ``huggingface`` or ``onnx``.
        path: The folder with config.json and the weights, or the .onnx file.
        task: One of `compiler.tasks.TASKS`, or ``tensors``.
        config: Content of config.json; empty for a lone .onnx file.
        architecture: Class name in config.json; ``onnx`` for an .onnx file.
        digest: ``sha256:<hex>`` over names and contents of the files the compile reads.
        pooling: Only for feature-extraction.
        tokenizer: Folder with the tokenizer's files; None for plain tensors.
    """

    name: str
    kind: str
    path: Path
    task: str
    config: dict[str, object] = field(repr=False)
    architecture: str
    digest: str
    pooling: Pooling | None
    tokenizer: Path | None


def read_source(source: str, task: str | None = None, *, pooling: str | None = None) -> ModelSource:
    """Find the model, check that its files are whole and that its task can be compiled.

    Args:
        source: A Hugging Face folder, a hub id, or an .onnx file.
        task: Overrides the task that the architecture implies.
        pooling: Overrides how token vectors become one vector: ``mean``, ``cls``, ``max``, ``none``.

    Raises:
        UsageError: Unknown task or pooling.
        SourceError: The model is missing, incomplete or corrupt.
        UnsupportedError: It can be read, and hasten cannot compile it.
    """
    if task is not None and task not in (*TASKS, *EMBEDDING_TASKS, TENSORS):
        known = ", ".join((*TASKS, "sentence-similarity", TENSORS))
        raise UsageError(f"unknown task {task!r}", f"Choose one of {known}")
    if pooling is not None and pooling not in POOLING_MODES:
        raise UsageError(f"unknown pooling {pooling!r}", f"Choose one of {', '.join(POOLING_MODES)}")
    if not source.strip():
        raise UsageError("the model source is empty", "Pass a folder, a hub id or an .onnx file")
    path = Path(source).expanduser()
    if not path.exists():
        if not looks_like_hub_id(source):
            raise SourceError(f"no such model: {source}", "Pass a folder with config.json, an .onnx file or a hub id")
        return _read_folder(download(source), task, pooling, name=source.rsplit("/", 1)[-1])
    if path.is_dir():
        return _read_folder(path, task, pooling, name=path.resolve().name)
    if path.suffix == ".onnx":
        return _read_onnx(path, task, pooling)
    raise SourceError(f"{path} is neither a model folder nor an .onnx file", "Pass the folder that holds config.json")


def _read_folder(folder: Path, task: str | None, pooling: str | None, *, name: str) -> ModelSource:
    sentence = _read_sentence_folder(folder)
    model_folder, stated = sentence if sentence is not None else (folder, None)
    config = _read_config(model_folder)
    architecture = _architecture(model_folder, config)
    if task in (None, GENERATION) and is_language_model(architecture) and (reason := named_refusal(config)):
        raise UnsupportedError(f"{architecture} {reason}", "Export it to ONNX by other means and pass the .onnx file")
    weights = check_weights(model_folder)
    if task == TENSORS:
        raise UsageError("task tensors is for .onnx files", f"Choose one of {', '.join(TASKS)}")
    if sentence is not None and task in (None, *EMBEDDING_TASKS):
        found = "feature-extraction"
    else:
        found = serves(architecture, task)
    if reason := refusal(found, architecture, config):
        raise UnsupportedError(reason, f"Compiled are models of one part, for {', '.join(TASKS)}")
    tokenizer = next((place for place in (model_folder, folder) if _has_tokenizer(place)), None)
    if tokenizer is None:
        raise SourceError(
            f"{folder} holds no tokenizer", "Put tokenizer.json into it: tokenizer.save_pretrained(folder)"
        )
    extra = [folder / file for file in _SENTENCE_FILES] if sentence is not None else []
    extra += [folder / "1_Pooling" / "config.json"] if sentence is not None else []
    if found == GENERATION:
        extra.append(model_folder / "generation_config.json")
    files = [model_folder / "config.json", *weights, *(tokenizer / file for file in _TOKENIZER_FILES), *extra]
    return ModelSource(
        name=name,
        kind="huggingface",
        path=model_folder,
        task=found,
        config=config,
        architecture=architecture,
        digest=_digest(folder, files),
        pooling=_choose_pooling(found, stated, pooling),
        tokenizer=tokenizer,
    )


def _read_onnx(path: Path, task: str | None, pooling: str | None) -> ModelSource:
    external = check_onnx(path)
    if task == GENERATION:
        raise UnsupportedError(
            f"{path} is a graph, and decoders are compiled from their weights: the cache is part of the export",
            "Pass the model's Hugging Face folder, or leave --task out to compile it as plain tensors",
        )
    found = TENSORS if task is None else ("feature-extraction" if task in EMBEDDING_TASKS else task)
    folder = path.resolve().parent
    if found != TENSORS and not _has_tokenizer(folder):
        folder = folder.parent  # the optimum layout: <model>/onnx/model.onnx
        if not _has_tokenizer(folder):
            raise SourceError(
                f"task {found} needs a tokenizer beside {path.name}",
                "Put tokenizer.json next to it, or leave --task out to compile it as plain tensors",
            )
    text = found != TENSORS
    config = _read_config(folder) if text and (folder / "config.json").is_file() else {}
    files = [path, *external]
    if text:
        files += [folder / "config.json", *(folder / file for file in _TOKENIZER_FILES)]
    return ModelSource(
        name=path.stem,
        kind="onnx",
        path=path,
        task=found,
        config=config,
        architecture="onnx",
        digest=_digest(folder, files),
        pooling=_choose_pooling(found, None, pooling or "none"),
        tokenizer=folder if text else None,
    )


def _read_config(folder: Path) -> dict[str, object]:
    path = folder / "config.json"
    if not path.is_file():
        raise SourceError(f"{folder} has no config.json", "Pass the folder of a Hugging Face model or an .onnx file")
    config = read_json(path)
    if not isinstance(config, dict):
        raise SourceError(f"{path} does not hold a JSON object", "Download the model again")
    return config


def _architecture(folder: Path, config: dict[str, object]) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise SourceError(
            f"{folder / 'config.json'} names no architectures",
            'Add the class the weights belong to, for example "architectures": ["BertModel"]',
        )
    if not isinstance(config.get("model_type"), str):
        raise SourceError(f"{folder / 'config.json'} names no model_type", 'Add it, for example "model_type": "bert"')
    return str(names[0])


def _read_sentence_folder(folder: Path) -> tuple[Path, Pooling] | None:
    """The folder of the transformer and the pooling, where ``folder`` is a sentence-transformers model."""
    listing = folder / "modules.json"
    if not listing.is_file():
        return None
    modules = read_json(listing)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise SourceError(f"{listing} does not hold a list of modules", "Download the model again")
    paths: dict[str, Path] = {}
    for module in modules:
        kind = str(module.get("type", "")).rsplit(".", 1)[-1]
        if kind not in _SENTENCE_MODULES:
            raise UnsupportedError(
                f"{listing} uses the module {kind or '?'}",
                f"Only {', '.join(_SENTENCE_MODULES)} are compiled; --pooling does not replace it",
            )
        paths[kind] = _inside(folder, str(module.get("path", "")), listing)
    if "Transformer" not in paths:
        raise SourceError(f"{listing} names no Transformer module", "Download the model again")
    model_folder = paths["Transformer"]
    mode = _pooling_mode(paths["Pooling"] / "config.json") if "Pooling" in paths else "none"
    return model_folder, Pooling(mode, "Normalize" in paths, _sentence_length(folder, model_folder))


def _inside(folder: Path, relative: str, listing: Path) -> Path:
    if Path(relative).is_absolute() or ".." in Path(relative).parts:
        raise SourceError(f"{listing} points outside its folder: {relative}", "Download the model again")
    return folder / relative


def _pooling_mode(path: Path) -> str:
    config = read_json(path)
    if not isinstance(config, dict):
        raise SourceError(f"{path} does not hold a JSON object", "Download the model again")
    chosen = [key.removeprefix("pooling_mode_") for key, value in config.items() if value is True]
    if isinstance(config.get("pooling_mode"), str):
        chosen = [str(config["pooling_mode"])]
    names = {"mean_tokens": "mean", "cls_token": "cls", "max_tokens": "max", "mean": "mean", "cls": "cls", "max": "max"}
    modes = [mode for mode in chosen if mode not in ("include_prompt",)]
    if len(modes) != 1 or modes[0] not in names:
        raise UnsupportedError(
            f"{path} asks for the pooling {' + '.join(modes) or 'of nothing'}",
            "Compiled are mean, cls and max; choose one with --pooling if that is what the model wants",
        )
    return names[modes[0]]


def _sentence_length(folder: Path, model_folder: Path) -> int:
    for place in (model_folder, folder):
        path = place / "sentence_bert_config.json"
        if path.is_file():
            config = read_json(path)
            length = config.get("max_seq_length") if isinstance(config, dict) else None
            return length if isinstance(length, int) and length > 0 else 0
    return 0


def _choose_pooling(task: str, stated: Pooling | None, wanted: str | None) -> Pooling | None:
    if task != "feature-extraction":
        if wanted not in (None, "none"):
            raise UsageError(f"--pooling {wanted} has no meaning for {task}", "Leave it out")
        return None
    base = stated if stated is not None else Pooling()
    return base if wanted is None else Pooling(wanted, base.normalize and wanted != "none", base.max_length)


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _VOCABULARY_FILES)


def _digest(root: Path, files: Iterable[Path]) -> str:
    """``sha256:<hex>`` over sorted (relative name, content hash) of the files that exist."""
    lines = []
    for path in sorted({file for file in files if file.is_file()}):
        with path.open("rb") as stream:
            content = hashlib.file_digest(stream, "sha256").hexdigest()
        lines.append(f"{content}  {os.path.relpath(path, root)}\n")
    return "sha256:" + hashlib.sha256("".join(lines).encode()).hexdigest()
