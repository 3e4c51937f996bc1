"""How texts become ids: the tokenizer of the model folder, its limits, special tokens and labels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import tokenizers

from artifacts.errors import SourceError, UnsupportedError
from artifacts.manifest import TextProcessor

from .checkpoint import read_json
from .quiet import quiet
from .source import ModelSource
from .tasks import GENERATION

TOKENIZER = "processor/tokenizer.json"
CHAT_TEMPLATE = "processor/chat_template.jinja"
DEFAULT_LENGTH = 512
PAIR_TASKS = ("text-classification", "question-answering")
_OFFSET_POSITIONS = (
    "camembert",
    "data2vec-text",
    "ibert",
    "longformer",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)
"""Model types whose first position is pad_token_id + 1, so that fewer positions are left for tokens."""

_CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len")

Config = Mapping[str, object]


def maximum_length(config: Config) -> int:
    """Longest sequence in tokens that the position embeddings of a model reach; 512 where the config states none."""
    positions = config.get("max_position_embeddings")
    if not isinstance(positions, int) or positions <= 0:
        return DEFAULT_LENGTH
    if config.get("model_type") in _OFFSET_POSITIONS:
        positions -= pad_id(config) + 1
    return max(positions, 1)


def context_length(config: Config) -> int:
    """Longest text in tokens that a language model takes; 512 where the config states none.

    Where rotary frequencies change with the length of the text (``longrope``), it is the length up to which they are
    those of short texts: what the KV cache already holds could not follow a change.
    """
    stated = (config.get(key) for key in _CONTEXT)
    length = next((value for value in stated if isinstance(value, int) and value > 0), DEFAULT_LENGTH)
    for rope in _ropes(config):
        original = rope.get("original_max_position_embeddings")
        if rope.get("rope_type") == "longrope" and isinstance(original, int) and original > 0:
            length = min(length, original)
    return length


def _ropes(config: Config) -> list[Mapping[str, object]]:
    """Parameters of the rotary embedding: one set, or one for each kind of layer."""
    stated = config.get("rope_parameters")
    if not isinstance(stated, Mapping):
        return []
    return [stated, *(value for value in stated.values() if isinstance(value, Mapping))]


def pad_id(config: Config) -> int:
    """The padding id that the model itself knows; 0 where the config states none."""
    pad = config.get("pad_token_id")
    return pad if isinstance(pad, int) and pad >= 0 else 0


def takes_pairs(task: str, config: Config) -> bool:
    """The graph tells two texts apart by token_type_ids."""
    types = config.get("type_vocab_size")
    return task in PAIR_TASKS and isinstance(types, int) and types > 1


def read_processor(
    source: ModelSource, config: Config, *, pairs: bool | None = None
) -> tuple[TextProcessor, dict[str, bytes]]:
    """The processor of a model, and the files it needs in the bundle.

    Args:
        source: The model; it has a tokenizer folder.
        config: The complete config: config.json with the defaults of its class.
        pairs: The graph takes token_type_ids; by default what the task and config imply.

    Raises:
        SourceError: The tokenizer is missing, corrupt, or of another vocabulary than the model.
        UnsupportedError: There is no fast tokenizer for it.
    """
    if source.tokenizer is None:
        raise SourceError(f"{source.path} has no tokenizer", "Put tokenizer.json beside the model")
    content = _tokenizer_json(source.tokenizer, config)
    try:
        tokenizer = tokenizers.Tokenizer.from_buffer(content)
    except (ValueError, TypeError) as error:
        raise SourceError(f"{source.tokenizer} has a corrupt tokenizer: {error}", "Download the model again") from error
    _check_vocabulary(tokenizer, source.tokenizer, config)
    special = special_tokens(source.tokenizer)
    pad_token, pad = _pad(tokenizer, special, config)
    mask = _mask(tokenizer, special) if source.task == "fill-mask" else ""
    labels = _labels(config) if source.task in ("text-classification", "token-classification") else ()
    processor = TextProcessor(
        tokenizer=TOKENIZER,
        max_length=_length(source, config),
        pad_id=pad,
        pad_token=pad_token,
        pad_type_id=0,
        pairs=takes_pairs(source.task, config) if pairs is None else pairs,
        labels=labels,
        mask_token=mask,
        problem=_problem(source.task, config, labels),
    )
    return processor, {TOKENIZER: content}


def _tokenizer_json(folder: Path, config: Config) -> bytes:
    path = folder / "tokenizer.json"
    if path.is_file():
        content = path.read_bytes()
        if not content.strip():
            raise SourceError(f"{path} is empty", "Download the model again")
        return content
    remedy = "Convert it with transformers and save tokenizer.json into the folder"
    with quiet():
        import transformers

        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, use_fast=True
            )
        except (OSError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise SourceError(f"{folder} holds no tokenizer that transformers reads: {reason}", remedy) from error
        if not tokenizer.is_fast:
            raise UnsupportedError(f"{type(tokenizer).__name__} of {config.get('model_type')} has no fast form", remedy)
        return str(tokenizer.backend_tokenizer.to_str()).encode()


def _check_vocabulary(tokenizer: tokenizers.Tokenizer, folder: Path, config: Config) -> None:
    rows = config.get("vocab_size")
    highest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if highest < 0:
        raise SourceError(f"the tokenizer of {folder} has an empty vocabulary", "Download the model again")
    if isinstance(rows, int) and highest >= rows:
        raise SourceError(
            f"the tokenizer of {folder} gives ids up to {highest}, the model knows {rows}",
            "Tokenizer and weights belong to different models",
        )


def special_tokens(folder: Path) -> dict[str, str]:
    """Special tokens by role, as the folder's files name them."""
    tokens: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        content = read_json(path) if path.is_file() else {}
        if not isinstance(content, dict):
            raise SourceError(f"{path} does not hold a JSON object", "Download the model again")
        for role, value in content.items():
            text = value.get("content") if isinstance(value, dict) else value
            if role.endswith("_token") and isinstance(text, str):
                tokens[role] = text
    return tokens


def _pad(tokenizer: tokenizers.Tokenizer, special: Mapping[str, str], config: Config) -> tuple[str, int]:
    stated = tokenizer.padding or {}
    for token in (special.get("pad_token"), stated.get("pad_token"), "[PAD]", "<pad>"):
        index = tokenizer.token_to_id(token) if isinstance(token, str) else None
        if isinstance(token, str) and index is not None:
            return token, index
    index = pad_id(config)
    return tokenizer.id_to_token(index) or "", index


def _mask(tokenizer: tokenizers.Tokenizer, special: Mapping[str, str]) -> str:
    for token in (special.get("mask_token"), "[MASK]", "<mask>"):
        if token and tokenizer.token_to_id(token) is not None:
            return token
    raise SourceError("the tokenizer has no mask token", "fill-mask needs one: name it in tokenizer_config.json")


def _length(source: ModelSource, config: Config) -> int:
    if source.task == GENERATION:
        return context_length(config)  # many tokenizers of language models state lengths of other models
    longest = maximum_length(config)
    if source.pooling is not None and source.pooling.max_length:
        return min(source.pooling.max_length, longest)
    path = (source.tokenizer or source.path) / "tokenizer_config.json"
    stated = read_json(path) if path.is_file() else {}
    length = stated.get("model_max_length") if isinstance(stated, dict) else None
    # transformers writes 1e30 for "no limit"
    return int(length) if isinstance(length, int | float) and 0 < length < longest else longest


def _labels(config: Config) -> tuple[str, ...]:
    table = config.get("id2label")
    if not isinstance(table, Mapping) or not table:
        return ()
    try:
        by_id = {int(key): str(value) for key, value in table.items()}
    except ValueError as error:
        raise SourceError("id2label of config.json has keys that are no numbers", "Number the labels from 0") from error
    if sorted(by_id) != list(range(len(by_id))):
        raise SourceError(f"id2label of config.json is not numbered 0 to {len(by_id) - 1}", "Number the labels from 0")
    return tuple(by_id[index] for index in range(len(by_id)))


def _problem(task: str, config: Config, labels: tuple[str, ...]) -> str:
    if task != "text-classification":
        return ""
    known = ("single_label_classification", "multi_label_classification", "regression")
    stated = config.get("problem_type")
    if stated is not None and stated not in known:
        raise SourceError(f"config.json states the problem_type {json.dumps(stated)}", f"Known are {', '.join(known)}")
    return str(stated) if stated else ("regression" if len(labels) == 1 else "single_label_classification")
