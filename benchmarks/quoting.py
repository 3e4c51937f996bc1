"""Texts that quote their prompts, and a way to hold a model to a text.

pystories_lm does not quote: of the 159 modules of Python's standard library that have 400 tokens, given twice up to
the middle of the second copy (200 + 100 tokens, 300 + 150, 200 + 24), it goes on with 8 tokens in a row of the prompt
for one tenth of its text at best. So it is held to a text that does. Guesses know nothing of that: they are looked up
and checked as ever, each token is chosen from the model's masked logits, and all that differs is what it says.
"""

from __future__ import annotations

import keyword
import re
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from runtimes.generate.results import Generated
    from runtimes.tasks.generate import Generator

_EDITED = 300
_SUMMARIZED = 600
_MOST = 200
_LEAST = 24
_NAME = re.compile(r"[A-Za-z_]\w{3,}")


@dataclass(frozen=True)
class Quoting:
    """A prompt and the text behind it, in tokens."""

    name: str
    prompt: tuple[int, ...]
    text: tuple[int, ...]


class Said:
    """A constraint that leaves one token, and does not say so to those who guess.

    Args:
        text: Token ids.
    """

    finish = None

    def __init__(self, text: Sequence[int]) -> None:
        self._text = text
        self._at = 0

    def start(self) -> Said:
        """See `runtimes.generate.rows.Constraint`."""
        return Said(self._text)

    def mask(self, logits: NDArray[np.float32]) -> None:
        """See `runtimes.generate.rows.Matcher`, as all of these."""
        wanted = self._text[self._at]
        kept = logits[wanted]
        logits.fill(-np.inf)
        logits[wanted] = kept

    def accept(self, token: int) -> None:
        """The next token comes."""
        self._at += token == self._text[self._at]

    def forced(self) -> list[int]:
        """Nothing is said of what has to follow."""
        return []

    def admissible(self, tokens: Sequence[int]) -> int:
        """Any guess may be checked."""
        return len(tokens)

    def foresee(self, tokens: Sequence[int]) -> None:
        """Masks take no time."""


def modules(every: int) -> list[Path]:
    """Sources of the standard library of 4,000 characters or more, by name, one of so many."""
    found = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return [path for path in found if path.stat().st_size >= 4000][every // 2 :: every]


def edited(source: str) -> tuple[str, str]:
    """The source with a line behind it, and the same with its commonest name renamed wherever it stands."""
    names = Counter(name for name in _NAME.findall(source) if not keyword.iskeyword(name))
    name = names.most_common(1)[0][0]
    return f"{source}\n# the same, {name} renamed:\n", re.sub(rf"\b{name}\b", f"renamed_{name}", source)


def summarized(source: str) -> tuple[str, str]:
    """The source with a line behind it, and its lines that import or define something."""
    lines = [line for line in source.splitlines(keepends=True) if re.match(r"\s*(def|class|import|from) ", line)]
    return f"{source}\n# what it has:\n", "".join(lines)


def quotings(model: Generator, every: int) -> Iterator[Quoting]:
    """Edits and summaries of the beginnings of modules, at most 200 tokens each."""
    for path in modules(every):
        source = path.read_text(encoding="utf-8")
        for kind, make, count in (("edit", edited, _EDITED), ("summary", summarized, _SUMMARIZED)):
            begin = model.encoder.plain.decode(list(model.encoder.encode(source))[:count])
            prompt, text = make(begin[: begin.rfind("\n") + 1])
            ids = model.encoder.encode(text)[:_MOST]
            if len(ids) >= _LEAST:
                yield Quoting(f"{kind} of {path.stem}", model.encoder.encode(prompt), ids)


def held(model: Generator, one: Quoting, *, speculate: bool) -> tuple[float, Generated]:
    """Seconds of the text, its prompt included, and the text."""
    from runtimes.generate.loop import Job, Request
    from runtimes.generate.sampling import Sampling

    limit = 16 if speculate else 0
    job = Job(Sampling(), end=frozenset(), constraint=Said(one.text), speculate=limit)
    begin = time.perf_counter()
    loop = model.loop(1, len(one.prompt) + len(one.text))
    pieces = loop.run([Request(one.prompt, len(one.text), job)])
    (result,) = (piece.result for piece in pieces if piece.result is not None)
    seconds = time.perf_counter() - begin
    if result.tokens != one.text:
        raise RuntimeError(f"{one.name}: the text is another one")
    return seconds, result
