"""How a language model begins, ends and samples a text, and its chat template: read from the model's folder."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import tokenizers

from artifacts.errors import SourceError
from artifacts.manifest import Generation

from .checkpoint import read_json
from .processor import CHAT_TEMPLATE, Config, special_tokens
from .source import ModelSource

_AGAIN = "Download the model again"
_ROLE = re.compile(r"[a-z][a-z0-9_]{0,63}")
_NUMBERS = {
    "temperature": (1.0, 0.0, 100.0),
    "top_p": (1.0, 0.0, 1.0),
    "min_p": (0.0, 0.0, 1.0),
    "repetition_penalty": (1.0, 0.01, 100.0),
}
"""Neutral value, least and largest of the sampling parameters; top_k is a whole number."""


def read_generation(source: ModelSource, config: Config, tokenizer: bytes) -> tuple[Generation, dict[str, bytes]]:
    """The defaults of a language model, and the files they need in the bundle.

    generation_config.json is believed first, then config.json; the end of a text, where neither states one, is the
    tokenizer's eos_token. Ids that the model does not know are left out: it never gives them.

    Args:
        source: The model; it has a tokenizer folder.
        config: The complete config: config.json with the defaults of its class.
        tokenizer: Content of the bundle's tokenizer.json.

    Raises:
        SourceError: generation_config.json or the chat template is corrupt, or states what cannot be.
    """
    folder = source.tokenizer or source.path
    path = source.path / "generation_config.json"
    stated = _object(path) if path.is_file() else {}
    special = {role: text for role, text in special_tokens(folder).items() if _ROLE.fullmatch(role)}
    template = _chat_template(folder)
    ending = tokenizers.Tokenizer.from_buffer(tokenizer).token_to_id(special.get("eos_token", ""))
    eos = _ids("eos_token_id", stated, config, {"eos_token_id": ending})
    bos = _ids("bos_token_id", stated, config)
    top_k = stated.get("top_k")
    if top_k is not None and not (isinstance(top_k, int) and 0 <= top_k <= 1 << 24):
        raise SourceError(f"{path} states the top_k {top_k!r}", "It is a whole number, 0 for none")
    generation = Generation(
        eos=eos,
        bos=bos[0] if bos else -1,
        chat_template=CHAT_TEMPLATE if template else "",
        special=tuple(sorted(special.items())),
        top_k=top_k or 0,
        sample=stated.get("do_sample") is True,
        **{name: _number(path, stated, name) for name in _NUMBERS},
    )
    return generation, {CHAT_TEMPLATE: template.encode()} if template else {}


def _object(path: Path) -> Mapping[str, object]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise SourceError(f"{path} does not hold a JSON object", _AGAIN)
    return content


def _ids(key: str, *places: Mapping[str, object]) -> tuple[int, ...]:
    """Token ids under ``key`` in the first place that states any the model knows."""
    sizes = (place.get("vocab_size") for place in places)
    rows = next((size for size in sizes if isinstance(size, int)), 0)
    for place in places:
        found = place.get(key)
        ids = found if isinstance(found, list) else [found]
        known = tuple(dict.fromkeys(item for item in ids if type(item) is int and 0 <= item < rows))
        if known:
            return known
    return ()


def _number(path: Path, stated: Mapping[str, object], name: str) -> float:
    neutral, least, largest = _NUMBERS[name]
    value = stated.get(name)
    if value is None:
        return neutral
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SourceError(f"{path} states the {name} {value!r}", "It is a number")
    if not least <= value <= largest:
        raise SourceError(f"{path} states the {name} {value!r}", f"It is between {least:g} and {largest:g}")
    return float(value)


def _chat_template(folder: Path) -> str:
    """The Jinja text: a file of its own, or part of the tokenizer's; of several, the one named ``default``."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise SourceError(f"{path} is not UTF-8", _AGAIN) from error
    for name in ("chat_template.json", "tokenizer_config.json"):
        path = folder / name
        template = _object(path).get("chat_template") if path.is_file() else None
        if isinstance(template, list):
            named = {item.get("name"): item.get("template") for item in template if isinstance(item, dict)}
            template = named.get("default")
        if isinstance(template, str) and template.strip():
            return template
        if template is not None and not isinstance(template, str):
            raise SourceError(f"the chat_template of {path} is no text", _AGAIN)
    return ""
