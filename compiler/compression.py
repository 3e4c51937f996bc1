"""What a user asks to take out of a model by name (``--prune``, ``--rank``, ...), as the passes that do it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

from artifacts.errors import UsageError
from artifacts.target import Target
from passes.pipeline import Pipeline, parse
from passes.registry import CLEAN
from passes.surgery import MICROSOFT

from .recipe import Stage
from .tasks import GENERATION

NOTHING = Pipeline()
"""No wish."""
_PATTERN = re.compile(r"\d+:\d+")
_STANDARD = parse("fold-batch-norm; fuse-layer-norm")
_ENCODER = parse("fold-batch-norm; fuse-layer-norm; fuse-gelu; fuse-attention")
_DECODER = parse(
    "raise-opset(minimum=23); unflatten-products; fuse-rms-norm; fuse-layer-norm; fuse-gelu; fuse-silu; fuse-rotary"
)
_SHARE = "Write 30% or 0.3"
_EMBEDDINGS = "*embed*, *wte*, *wpe*"
"""Module paths of embeddings in transformers."""


@dataclass(frozen=True)
class Compression:
    """What is to be taken out of the model; empty texts: nothing. The command line's options of the same names.

    Attributes:
        prune: Weights that become 0: a share (``50%``), or so many of each group of them (``2:4``); and of the rows of
            embeddings, by magnitude (``50%,embeddings=50%``).
        prune_structure: Parts that go: ``ffn=25%,heads=25%``; see `STRUCTURES`.
        rank: Share of the parameters of linear operators that their low-rank factors keep, at most.
        convolutions: How k × k convolutions are split, and the share of their work that is kept: ``tucker=50%``.
        share: Largest relative damage at which one weight stands for several.
        repair: Whether what remains is fitted to what the original computes.
    """

    prune: str = ""
    prune_structure: str = ""
    rank: str = ""
    convolutions: str = ""
    share: str = ""
    repair: bool = True

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) for field in fields(self) if field.name != "repair")

    def pipeline(self) -> Pipeline:
        """The passes, in the order in which they build on each other: structure, factors, sharing, zeros, repair.

        Raises:
            UsageError: An option cannot be read, is out of range, or contradicts another.
        """
        found = [*self._structures(), *self._convolutions()]
        if self.rank:
            found.append(f"factor(ratio={_share('rank', self.rank)})")
        if self.share:
            found.append(f"share-weights(tolerance={_share('share', self.share)})")
        if self.prune:
            found += self._pruned()
        if self.share and self.prune:
            raise UsageError(
                "--share and --prune contradict each other", "Weights that are shared keep their values: give one"
            )
        if not self.repair and not found:
            raise UsageError("--no-repair is for compression, and nothing is taken out", "Leave it out")
        if self.repair and found:
            found.append("repair")
        return parse("; ".join(found))

    @property
    def _unrepaired(self) -> str:
        return "" if self.repair else ", repair=false"

    def _pruned(self) -> list[str]:
        weights, *others = (part.strip() for part in self.prune.split(","))
        tables = _table("prune", ",".join(others))
        if unknown := sorted(tables.keys() - {"embeddings"}):
            raise UsageError(f"--prune knows no {unknown[0]!r}", "Write 50%, 2:4, or 50%,embeddings=50%")
        if _PATTERN.fullmatch(weights):
            found = [f"prune(pattern={weights})"]
        elif ":" in weights:
            raise UsageError(f"--prune {weights!r} is no pattern", "Write 2:4 for two zeros in every four weights")
        else:
            found = [f"prune(ratio={_share('prune', weights)})"]
        shares = [_share("prune", share) for share in tables.values()]
        return found + [f"prune(ratio={share}, method=magnitude, only=[{_EMBEDDINGS}])" for share in shares]

    def _structures(self) -> list[str]:
        given = _table("prune-structure", self.prune_structure)
        if unknown := sorted(given.keys() - STRUCTURES.keys()):
            raise UsageError(f"--prune-structure knows no {unknown[0]!r}", f"Known: {', '.join(STRUCTURES)}")
        return [STRUCTURES[name](given[name]).format(repair=self._unrepaired) for name in STRUCTURES if name in given]

    def _convolutions(self) -> list[str]:
        given = _table("convolutions", self.convolutions)
        if unknown := sorted(given.keys() - set(_CONVOLUTIONS)):
            raise UsageError(f"--convolutions knows no {unknown[0]!r}", f"Known: {', '.join(_CONVOLUTIONS)}")
        if len(given) > 1:
            raise UsageError(f"--convolutions {self.convolutions} names several ways", "Give one of them")
        return [
            f"factor-convolutions(method={name}, flops={_share('convolutions', share)}{self._unrepaired})"
            for name, share in given.items()
        ]


def form(task: str, target: Target) -> Pipeline:
    """What brings a clean graph into the form that compression sees through: operators in as few nodes as may be."""
    if task == GENERATION:
        return _DECODER
    return _ENCODER if MICROSOFT in target.domains else _STANDARD


def split(stages: Sequence[Stage]) -> tuple[tuple[Stage, ...], tuple[Stage, ...]]:
    """The stages up to the one that cleans the graph, and those that follow."""
    clean = [index for index, stage in enumerate(stages) if any(set(CLEAN) <= set(one.passes) for one in stage)]
    end = clean[0] + 1 if clean else 0
    return tuple(stages[:end]), tuple(stages[end:])


def _ratio(name: str, kind: str) -> Callable[[str], str]:
    return lambda text: f"{kind}(ratio={_share(name, text)}{{repair}})"


def _layers(text: str) -> str:
    if text.isdecimal():
        if not int(text):
            raise UsageError("--prune-structure layers=0 removes nothing", "Write how many go, or their share: 25%")
        return f"prune-layers(count={int(text)})"
    return f"prune-layers(ratio={_share('layers', text)})"


STRUCTURES: Mapping[str, Callable[[str], str]] = {
    "layers": _layers,
    "kv-heads": _ratio("kv-heads", "prune-kv-heads"),
    "heads": _ratio("heads", "prune-heads"),
    "ffn": _ratio("ffn", "prune-neurons"),
    "channels": _ratio("channels", "prune-channels"),
}
"""What ``--prune-structure`` knows -> the pass that does it. Layers: a share, or how many."""

_CONVOLUTIONS = ("separable", "tucker", "spatial")


def _table(option: str, text: str) -> dict[str, str]:
    """``a=1,b=2`` as a dictionary."""
    found: dict[str, str] = {}
    for part in text.split(",") if text else ():
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not name or not value:
            raise UsageError(
                f"--{option} {text!r} cannot be read", "Write name=share, with commas between: ffn=25%,heads=25%"
            )
        if name in found:
            raise UsageError(f"--{option} names {name} twice")
        found[name] = value
    return found


def _share(option: str, text: str) -> float:
    """``30%`` or ``0.3``: above 0 and below 1."""
    try:
        share = float(text.removesuffix("%")) / (100.0 if text.endswith("%") else 1.0)
    except ValueError:
        raise UsageError(f"--{option} {text!r} is no share", _SHARE) from None
    if not 0.0 < share < 1.0:
        raise UsageError(f"--{option} {text} is not between 0% and 100%", _SHARE)
    return share
