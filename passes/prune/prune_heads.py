"""prune-heads."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import onnx_ir as ir

from passes.base import Context, Effect, Outcome, Purpose
from passes.quantize.linear import Selection
from passes.splice import Names

from .heads_attention import Attention
from .prune_kv_heads import groups_of, prune_attentions
from .structure_prune import Amount, Structure

WHAT = "heads"


@dataclass(frozen=True)
class PruneHeads:
    """Remove heads of attention, and what makes and reads them.

    | before                                            | after |
    |---------------------------------------------------|-------|
    | MultiHeadAttention(q, k, v), num_heads = H        | fewer columns of the products, fewer rows of the one behind |
    | GroupQueryAttention of several queries a KV head  | equally many query heads of each KV head go; the cache stays |
    | GroupQueryAttention of one query a KV head        | query, key and value go, and so does that part of the cache |

    Those heads go whose loss costs the least error of the product behind them when the others make up for it; that
    product is then the least-squares fit of all heads, and a bias that is there takes the mean of what is left. What
    stands between products and attention is followed: biases, rotary embeddings fused or not, norms of each head.
    Where the last form shrinks the cache, the graph's inputs and outputs state the new number of heads.

    Refused: no calibration data; attention that is not one operator, or packed; what ``prune-neurons`` refuses of
    weights and of what channels run through. Attentions that were pruned are marked in their metadata, and left.

    Attributes:
        ratio: Part of all heads of queries that goes; between 0 and 1.
        repair: Fit what stays; else it stays as it is, and those go whose own part of the product is least.
        uniform: Each attention loses that part; else those lose more whose error is less.
        skip: Module paths of the product behind the attention to leave alone; ``*`` and ``?`` are wildcards.
        only: Module paths to act on, as in ``skip``; empty for all.
    """

    name: ClassVar[str] = "prune-heads"
    effect: ClassVar[Effect] = Effect.LOSSY
    purpose: ClassVar[Purpose] = Purpose.SPEED
    alters_cache: ClassVar[bool] = True

    ratio: float = 0.2
    repair: bool = True
    uniform: bool = False
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        Amount(self.ratio, self.repair, self.uniform)

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Prune the attentions of ``model`` in place; counts them. A second run changes 0."""
        amount = Amount(self.ratio, self.repair, self.uniform)
        return prune_attentions(model, context, Selection(self.skip, self.only), amount, WHAT, _of_heads)


def _of_heads(graph: ir.Graph, names: Names, one: Attention) -> Structure:
    if one.heads == one.kv_heads:
        return groups_of(graph, names, one)
    size, keep = one.head_size * one.kv_heads, partial(one.keep_heads, graph, names)
    return Structure(one.node, one.output, one.heads, one.kv_heads, 1, size, keep)
