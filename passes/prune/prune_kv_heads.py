"""prune-kv-heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import onnx_ir as ir

from passes.base import Context, Effect, Outcome, Purpose
from passes.quantize.linear import Selection
from passes.splice import Names

from .heads_attention import Attention, attentions, check_cache
from .structure import BlockedError, is_marked
from .structure_prune import Amount, Structure, prune_structures

WHAT = "kv-heads"


@dataclass(frozen=True)
class PruneKvHeads:
    """Remove heads of keys and values of GroupQueryAttention, with all heads of queries that read them.

    ``GQA(q, k, v, past)`` of G KV heads -> of fewer: columns of the three products, rows of the one behind, fitted anew
    as ``prune-heads`` does, and the KV cache, whose inputs and outputs of the graph state the new number of heads. What
    a decoder keeps of each token shrinks with it; layers may keep different numbers.

    Refused: as ``prune-heads``; attentions with one KV head; caches that are read elsewhere too.

    Attributes:
        ratio: Part of all KV heads that goes; between 0 and 1.
        repair: Fit what stays; else it stays as it is, and those go whose own part of the product is least.
        uniform: Each attention loses that part; else those lose more whose error is less.
        skip: Module paths of the product behind the attention to leave alone; ``*`` and ``?`` are wildcards.
        only: Module paths to act on, as in ``skip``; empty for all.
    """

    name: ClassVar[str] = "prune-kv-heads"
    effect: ClassVar[Effect] = Effect.LOSSY
    purpose: ClassVar[Purpose] = Purpose.SPEED
    alters_cache: ClassVar[bool] = True

    ratio: float = 0.5
    repair: bool = True
    uniform: bool = False
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        Amount(self.ratio, self.repair, self.uniform)

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Prune the attentions of ``model`` in place; counts them. A second run changes 0."""
        amount = Amount(self.ratio, self.repair, self.uniform)
        return prune_attentions(model, context, Selection(self.skip, self.only), amount, WHAT, _of_kv_heads)


def _of_kv_heads(graph: ir.Graph, names: Names, one: Attention) -> Structure | None:
    if one.node.op_type != "GroupQueryAttention":
        return None
    if one.kv_heads == 1:
        raise BlockedError(one.node, "it has one KV head")
    return groups_of(graph, names, one)


def prune_attentions(
    model: ir.Model,
    context: Context,
    selection: Selection,
    amount: Amount,
    what: str,
    form: Callable[[ir.Graph, Names, Attention], Structure | None],
) -> Outcome:
    """Prune, in place, what ``form`` sees in the attentions that are not marked ``what`` yet; None is left alone."""
    found, refused = attentions(model, selection)
    names = Names(model.graph)
    structures = []
    for one in found:
        if is_marked(one.node, what):
            continue
        try:
            structures.append(form(model.graph, names, one))
        except BlockedError as error:
            refused.append(error.refusal)
    seen = [structure for structure in structures if structure is not None]
    outcome = prune_structures(model, context, seen, amount, what, names)
    return Outcome(outcome.changed, (*refused, *outcome.refused))


def groups_of(graph: ir.Graph, names: Names, one: Attention) -> Structure:
    """The groups of an attention: a head of keys and values each, with those of queries that read it."""
    check_cache(one.node)
    keep = partial(one.keep_groups, graph, names)
    return Structure(one.node, one.output, one.kv_heads, 1, 1, one.group_size, keep)
