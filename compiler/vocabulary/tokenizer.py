"""Which tokens a tokenizer must keep for a list of them to work, and its tokenizer.json with nothing else in it.

What is kept besides the list, so that a text that needs only kept tokens gives the same tokens as before:

| model     | besides added tokens, and what the file itself names                               |
|-----------|------------------------------------------------------------------------------------|
| BPE       | what its merges make of each token on the way to it; all bytes                     |
| WordPiece | nothing                                                                            |
| Unigram   | the token of the least score, which the score of unknown text hangs on; all bytes |

And so that other texts are spelled rather than unknown: the characters of each token of the list, at the beginning and
inside of a word, and the space. BPE never merges across the borders of the tokens that come out, and always the first
pair of its list that it finds, so that it does the same where pairs are missing that it did not need. The longest
match (WordPiece) and the likeliest segmentation (Unigram) stay what they are where others are taken out.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel

from artifacts.errors import UnsupportedError

_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
_SPACE = "▁"
"""What a space is to SentencePiece and those after it; spelled in bytes it would not become one again."""
_PAIRS = ("BertProcessing", "RobertaProcessing")
_REMEDY = "Compile without --vocabulary"

Document = dict[str, Any]


@dataclass(frozen=True)
class Kept:
    """A tokenizer with fewer tokens.

    Attributes:
        ids: The old id of each new one, int64 [n]: in the old order, but that added tokens which the model's own
            vocabulary lacks come behind it, and ids without a token last.
        content: tokenizer.json.
    """

    ids: NDArray[np.int64]
    content: bytes


def keep_tokens(content: bytes, tokens: Collection[str], ids: Iterable[int] = ()) -> Kept:
    """The tokenizer with these tokens and what they need.

    Args:
        content: tokenizer.json.
        tokens: That the tokenizer has.
        ids: That must stay, whether or not a token has them.

    Raises:
        UnsupportedError: The tokenizer is of a kind that is not known here.
    """
    document: Document = json.loads(content)
    model = document["model"]
    entries = _entries(model)
    vocabulary = dict(entries)
    added = {item["content"] for item in document.get("added_tokens") or ()}
    stays = {*ids, *_ids_named(document)}
    tokenizer = Tokenizer.from_buffer(content)
    wanted = {*tokens, *added, *(token for index in stays if (token := tokenizer.id_to_token(index)) is not None)}
    wanted |= _needed(document, vocabulary, wanted) | _letters(model, set(tokens) - added).intersection(vocabulary)
    rows = [(token, index) for token, index in entries if token in wanted]
    beyond = sorted((int(tokenizer.token_to_id(token) or 0), token) for token in added - vocabulary.keys())
    old = [index for _, index in rows] + [index for index, _ in beyond]
    kept = np.array([*old, *sorted(stays.difference(old))], np.int64)
    names = [*(token for token, _ in rows), *(token for _, token in beyond)]
    document["added_tokens"] = _renumbered(document.get("added_tokens") or [], names)
    _rewrite_model(model, names[: len(rows)])
    _rewrite_ids(document, renumbering(kept))
    made = json.dumps(document, ensure_ascii=False).encode()
    _check(tokenizer, made, old)
    return Kept(kept, made)


def renumbering(ids: NDArray[np.int64]) -> dict[int, int]:
    """New ids by old ones, of `Kept.ids`."""
    return {int(old): new for new, old in enumerate(ids)}


def _kind(model: Document) -> str:
    """The type of the model, which old files leave out."""
    if "type" in model:
        return str(model["type"])
    if "merges" in model:
        return "BPE"
    if isinstance(model.get("vocab"), list):
        return "Unigram"
    return "WordPiece" if "max_input_chars_per_word" in model else "WordLevel"


def _entries(model: Document) -> list[tuple[str, int]]:
    """The model's own tokens with their ids, in the order of the ids."""
    if _kind(model) not in ("BPE", "WordPiece", "Unigram", "WordLevel"):
        raise UnsupportedError(f"the vocabulary of a {_kind(model)} tokenizer cannot be trimmed", _REMEDY)
    if _kind(model) == "Unigram":
        return [(str(row[0]), index) for index, row in enumerate(model["vocab"])]
    return sorted(((str(token), int(index)) for token, index in model["vocab"].items()), key=lambda item: item[1])


def _needed(document: Document, vocabulary: Mapping[str, int], wanted: Collection[str]) -> set[str]:
    """What must stay besides ``wanted``; see the table of the module."""
    model = document["model"]
    found = {_SPACE, str(model.get("unk_token"))}
    if model.get("byte_fallback"):
        found.update(_BYTES)
    if _kind(model) == "BPE":
        letters = ByteLevel.alphabet() if _is_byte_level(document) else ()
        found.update(form for letter in letters for form in _forms(letter, model))
        ranks = {pair: rank for rank, pair in enumerate(_merges(model))}
        for token in wanted:
            found.update(_path(token, ranks, model) if token in vocabulary else ())
    elif _kind(model) == "Unigram" and model["vocab"]:
        found.add(min(model["vocab"], key=lambda row: float(row[1]))[0])
        found.update(_unknown(model))
    return found.intersection(vocabulary)


def _unknown(model: Document) -> tuple[str, ...]:
    """The token that a Unigram model gives for what it does not know, if it has one."""
    index = model.get("unk_id")
    return (str(model["vocab"][index][0]),) if isinstance(index, int) else ()


def _letters(model: Document, tokens: Collection[str]) -> set[str]:
    """Characters of tokens, as tokens may spell them."""
    if _kind(model) == "WordLevel":
        return set()
    return {form for character in set("".join(tokens)) for form in _forms(character, model)}


def _forms(character: str, model: Document) -> Iterator[str]:
    """A character as a token at the beginning, inside and at the end of a word."""
    prefix, suffix = _marks(model)
    yield from dict.fromkeys(f"{before}{character}{after}" for before in ("", prefix) for after in ("", suffix))


def _marks(model: Document) -> tuple[str, str]:
    """What stands before a token inside of a word, and behind one that ends it."""
    return model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""


def _path(token: str, ranks: Mapping[tuple[str, str], int], model: Document) -> Iterator[str]:
    """What BPE makes on the way from the characters of a token to it; nothing where it does not arrive there."""
    prefix, suffix = _marks(model)
    inside = bool(prefix) and token.startswith(prefix)
    ends = bool(suffix) and token.endswith(suffix)
    body = token[len(prefix) if inside else 0 : len(token) - (len(suffix) if ends else 0)]
    symbols = [character if place == 0 and not inside else prefix + character for place, character in enumerate(body)]
    if ends and symbols:
        symbols[-1] += suffix
    seen = list(symbols)
    while found := [(ranks[pair], place) for place, pair in enumerate(pairwise(symbols)) if pair in ranks]:
        _, place = min(found)
        symbols[place : place + 2] = [symbols[place] + symbols[place + 1][len(prefix) :]]
        seen.append(symbols[place])
    yield from seen if symbols == [token] else ()


def _merges(model: Document) -> list[tuple[str, str]]:
    """Pairs of a BPE model, first come first; old files write each as one text."""
    pairs = (item.split(" ") if isinstance(item, str) else item for item in model.get("merges") or ())
    return [(left, right) for left, right in pairs]


def _is_byte_level(document: Document) -> bool:
    """Whether texts reach the model as the 256 letters of ByteLevel."""
    parts = [document.get(name) for name in ("normalizer", "pre_tokenizer")]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            if part.get("type") == "ByteLevel":
                return True
            parts += [*(part.get("normalizers") or ()), *(part.get("pretokenizers") or ())]
    return False


def _ids_named(document: Document) -> Iterator[int]:
    """Ids that the padding and the post-processor name."""
    padding = document.get("padding")
    if isinstance(padding, dict):
        yield int(padding["pad_id"])
    for processor in _processors(document):
        if processor["type"] == "TemplateProcessing":
            for special in processor["special_tokens"].values():
                yield from special["ids"]
        elif processor["type"] in _PAIRS:
            yield from (processor["sep"][1], processor["cls"][1])


def _processors(document: Document) -> list[Document]:
    """The post-processors, those of a sequence one by one."""
    top = document.get("post_processor")
    if not isinstance(top, dict):
        return []
    found: list[Document] = list(top["processors"]) if top["type"] == "Sequence" else [top]
    for processor in found:
        if processor["type"] not in ("TemplateProcessing", "ByteLevel", *_PAIRS):
            what = f"the vocabulary of a tokenizer with {processor['type']} behind it cannot be trimmed"
            raise UnsupportedError(what, _REMEDY)
    return found


def _renumbered(added: list[Document], names: list[str]) -> list[Document]:
    """The added tokens with their new ids, in their order: what the vocabulary lacks is numbered as it is read."""
    place = {token: new for new, token in enumerate(names)}
    return sorted(({**item, "id": place[item["content"]]} for item in added), key=lambda item: int(item["id"]))


def _rewrite_model(model: Document, tokens: list[str]) -> None:
    """Leave only these of the model's own tokens, in place."""
    kept = set(tokens)
    if _kind(model) == "Unigram":
        unknown = _unknown(model)
        model["vocab"] = [row for row in model["vocab"] if row[0] in kept]
        model["unk_id"] = tokens.index(unknown[0]) if unknown else None
        return
    if _kind(model) == "BPE":
        length = len(_marks(model)[0])
        pairs = zip(model.get("merges") or (), _merges(model), strict=True)
        model["merges"] = [item for item, (left, right) in pairs if {left, right, left + right[length:]} <= kept]
    model["vocab"] = {token: index for index, token in enumerate(tokens)}


def _rewrite_ids(document: Document, new: Mapping[int, int]) -> None:
    padding = document.get("padding")
    if isinstance(padding, dict):
        padding["pad_id"] = new[padding["pad_id"]]
    for processor in _processors(document):
        if processor["type"] == "TemplateProcessing":
            for special in processor["special_tokens"].values():
                special["ids"] = [new[index] for index in special["ids"]]
        elif processor["type"] in _PAIRS:
            processor |= {role: [processor[role][0], new[processor[role][1]]] for role in ("sep", "cls")}


def _check(before: Tokenizer, content: bytes, old: list[int]) -> None:
    """Hold what was written against what it was made of: each new id stands for the token of the old one.

    Raises:
        UnsupportedError: It does not: two tokens had the same id.
    """
    after = Tokenizer.from_buffer(content)
    wrong = [index for new, index in enumerate(old) if after.id_to_token(new) != before.id_to_token(index)]
    if wrong or after.id_to_token(len(old)) is not None:
        what = f"the vocabulary cannot be trimmed: tokens share the id {wrong[0] if wrong else len(old)}"
        raise UnsupportedError(what, _REMEDY)
