"""Lists of tokens: read from a file, made from texts, written to one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from artifacts.errors import OutputError, UsageError

from ..processor import TOKENIZER, read_processor
from ..source import ModelSource

_MOST_BYTES = 64 << 20
_BATCH = 1024  # texts
_SPELLING = "Write each as tokenizer.json does, with its mark of a word's beginning or inside: Ġthe, ▁the, ##ing"


@dataclass(frozen=True)
class Vocabulary:
    """Tokens that a user wants to keep.

    Attributes:
        tokens: As the tokenizer's vocabulary writes them, each once.
        name: What to call the list in a message.
    """

    tokens: tuple[str, ...]
    name: str


def read_vocabulary(path: Path, source: ModelSource | None = None) -> Vocabulary:
    """The tokens of a file, UTF-8: a line each, or a JSON list or object (of which the keys count) in a .json file.

    Lines are not stripped: a token may begin or end with a space. One with a line break in it needs the JSON form.

    Args:
        path: The file.
        source: The model, to look now whether its tokenizer.json has the tokens; `compiler.vocabulary.trim` does later.

    Raises:
        UsageError: It cannot be read, names no token, or one that the tokenizer does not have.
    """
    try:
        with path.open("rb") as stream:
            data = stream.read(_MOST_BYTES + 1)
    except OSError as error:
        raise UsageError(f"the vocabulary {path} cannot be read: {error.strerror}", "Pass a list of tokens") from error
    if len(data) > _MOST_BYTES:
        raise UsageError(f"the vocabulary {path} is larger than {_MOST_BYTES >> 20} MiB", "Pass a list of tokens")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"the vocabulary {path} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}"
        raise UsageError(what, "Convert it to UTF-8") from error
    json_file = path.suffix.lower() == ".json"
    lines = _of_json(path, text) if json_file else [line.removesuffix("\r") for line in text.split("\n")]
    vocabulary = Vocabulary(tuple(dict.fromkeys(token for token in lines if token)), path.name)
    if not vocabulary.tokens:
        raise UsageError(f"the vocabulary {path} names no token", "Write a token to a line")
    tokenizer = _tokenizer(source)
    if tokenizer is not None:
        check_known(vocabulary, tokenizer)
    return vocabulary


def check_known(vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
    """Refuse tokens that the tokenizer does not have.

    Raises:
        UsageError: Names the first, and says how many there are.
    """
    unknown = [token for token in vocabulary.tokens if tokenizer.token_to_id(token) is None]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        what = f"{vocabulary.name} names {unknown[0][:60]!r}{more}, which the model's tokenizer does not have"
        raise UsageError(what, _SPELLING)


def tokens_of(source: ModelSource, texts: Iterable[str]) -> tuple[str, ...]:
    """The tokens that texts need, special ones aside, the most frequent first.

    Raises:
        SourceError: The model's tokenizer cannot be read.
    """
    _, files = read_processor(source, source.config)
    tokenizer = Tokenizer.from_buffer(files[TOKENIZER])
    tokenizer.no_padding()
    tokenizer.no_truncation()
    counts: Counter[int] = Counter()
    batch: list[str] = []
    for text in texts:
        batch.append(text)
        if len(batch) == _BATCH:
            counts.update(_ids(tokenizer, batch))
            batch = []
    counts.update(_ids(tokenizer, batch))
    found = (tokenizer.id_to_token(index) for index, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0])))
    return tuple(token for token in found if token)


def write_vocabulary(tokens: Sequence[str], path: Path) -> None:
    """Write a list that `read_vocabulary` reads: JSON where the file's name ends in .json, else a line each.

    Raises:
        UsageError: A token has a line break in it, and the file is not JSON.
        OutputError: It cannot be written.
    """
    if path.suffix.lower() == ".json":
        text = json.dumps(list(tokens), ensure_ascii=False, indent=1) + "\n"
    elif broken := [token for token in tokens if "\n" in token or "\r" in token]:
        raise UsageError(f"the token {broken[0][:60]!r} has a line break in it", "Write the list to a .json file")
    else:
        text = "".join(f"{token}\n" for token in tokens)
    try:
        path.write_bytes(text.encode())
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror}", "Choose another place") from error


def _ids(tokenizer: Tokenizer, texts: list[str]) -> Iterable[int]:
    for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
        yield from encoding.ids


def _of_json(path: Path, text: str) -> list[str]:
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UsageError(f"the vocabulary {path} is not JSON: {error}", "Write a list of tokens") from error
    tokens = [token for token in content if isinstance(token, str)] if isinstance(content, list | dict) else None
    if tokens is None or len(tokens) < len(content):
        raise UsageError(f"the vocabulary {path} is no JSON list of tokens", 'Write ["the", "cat"]')
    return tokens


def _tokenizer(source: ModelSource | None) -> Tokenizer | None:
    """The tokenizer of a model where it is at hand and whole; what is wrong with it is told when it is needed."""
    path = source.tokenizer / "tokenizer.json" if source is not None and source.tokenizer is not None else None
    if path is None or not path.is_file():
        return None
    try:
        return Tokenizer.from_buffer(path.read_bytes())
    except (OSError, ValueError, TypeError):
        return None
