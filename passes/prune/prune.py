"""Zeros in the weights of linear operators, anywhere or in a pattern."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from passes.affine import is_float32, matrix_of, put_matrix, read_only_by, refill
from passes.base import Context, Effect, Outcome, Purpose, Refusal
from passes.quantize.linear import Selection, choose_sites
from passes.second_order import Doubles
from passes.sites import EmbeddingSite, LinearSite, constant_of, embedding_sites
from passes.splice import label
from passes.statistics import Moments
from passes.surgery import is_operator, only_user

from .amounts import Amount, Pattern, Share
from .methods import Method, prune_weight
from .scores import prune_rows

_AFTER_A_HEAD = ("Add", "Mul", "Div", "Tanh", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Slice", "Identity")


@dataclass(frozen=True)
class Prune:
    """Set elements of the weights of linear operators to 0; shapes and operators stay.

    | before | after |
    |--------|-------|
    | MatMul(x, W), Gemm(x, W, b) | the same on a W of which ``ratio`` is 0, or of each M elements along K all but N |
    | Gather(table) named in ``only`` | the same on a table with so many zeros in each row, by magnitude |

    ONNX Runtime computes zeros as any number: this makes a packed bundle smaller, and no target faster. Integers keep
    the zeros (all symmetric forms, and blocks, whose zero is a code), so prune before quantizing.

    | method       | what goes, and what becomes of the rest |
    |--------------|-----------------------------------------|
    | magnitude    | the least ``abs(w)`` of the matrix; the rest stays |
    | wanda *      | the least ``abs(w_kn) sqrt(H_kk)`` of each column; the rest stays (Sun et al., 2023) |
    | sparsegpt *  | what the product misses least, row by row; the rest makes up for it (Frantar & Alistarh, 2023) |
    | alps *       | the same for all rows at once, by ADMM (Meng et al., 2024) |

    Methods with a * need calibration data: ``H = E[x x^T]`` of the graph before anything in it is pruned. sparsegpt and
    alps then put the rest at its least squares, and sparsegpt lets elements change places where that gains. A weight
    that several sites share is pruned once, for the mean of what they read.

    As in the papers, the head and the embeddings of a model stay as they are: a product that makes an output of the
    graph and has as many columns as an embedding has rows, and the tables themselves. Name them in ``only`` to prune
    them too.

    Refused: a method that needs calibration data without them; a weight that other operators read too; K that is no
    multiple of M; what ``dynamic-int8`` refuses of weights, sites and patterns. Told: fewer rows seen than the weight
    has.

    Attributes:
        ratio: Part of the elements that become 0; between 0 and 1.
        pattern: N:M, N of each M elements along K stay at most (``2:4``); instead of ``ratio``. Empty for none.
        method: See above.
        skip: Module paths to leave alone; ``*`` and ``?`` are wildcards, and ``*`` also spans dots.
        only: Module paths to act on, as in ``skip``; empty for all.
    """

    name: ClassVar[str] = "prune"
    effect: ClassVar[Effect] = Effect.LOSSY
    purpose: ClassVar[Purpose] = Purpose.SIZE

    ratio: float = 0.5
    pattern: str = ""
    method: str = "sparsegpt"
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        methods = [str(method) for method in Method]
        if self.method not in methods:
            raise ValueError(f"method is {self.method!r}, not one of {', '.join(methods)}")
        amount = self._amount()
        if isinstance(amount, Pattern) and self.ratio != type(self).ratio:
            raise ValueError(f"pattern {amount} says how much is pruned: leave ratio out")

    def run(self, model: ir.Model, context: Context) -> Outcome:
        """Prune the weights of ``model`` in place; counts them. Those that have the zeros already are left."""
        method, amount = Method(self.method), self._amount()
        selection = Selection(self.skip, self.only)
        tables = [site for site in embedding_sites(model) if self.only and selection.candidate(site.path)]
        weights, refused = _weights(model, selection, amount, tables)
        changed, unfit = _prune_tables(tables, selection, amount, method)
        refused += unfit
        if not weights:
            return Outcome(changed, tuple(refused))
        if not method.calibrated:
            for weight in weights:
                put_matrix(weight[0], prune_weight(matrix_of(weight[0]), amount, method))
            return Outcome(changed + len(weights), tuple(refused))
        if context.moments is None:
            remedy = "Compile with data, or choose magnitude"
            return Outcome(changed, (*refused, Refusal("", f"{method} needs calibration data", remedy)))
        inputs = [[str(site.input.name) for site in weight] for weight in weights]
        seen = context.moments(model, list(dict.fromkeys(site.input for weight in weights for site in weight)))
        for weight, names in zip(weights, inputs, strict=True):
            rows, second = _second(seen, names)
            put_matrix(weight[0], prune_weight(matrix_of(weight[0]), amount, method, second))
            refused += _scarce(weight[0], rows)
        return Outcome(changed + len(weights), tuple(refused))

    def _amount(self) -> Amount:
        return Pattern.parse(self.pattern) if self.pattern else Share(self.ratio)


def _weights(
    model: ir.Model, selection: Selection, amount: Amount, tables: Sequence[EmbeddingSite]
) -> tuple[list[list[LinearSite]], list[Refusal]]:
    """The sites to prune, those of one weight together, in graph order, and why not the others."""
    chosen, refused = choose_sites(model, selection)
    paths = [table.path for table in tables]
    refused = [one for one in refused if not any(fnmatchcase(path, one.node) for path in paths)]
    vocabularies = {site.shape[0] for site in embedding_sites(model)}
    by_weight: dict[ir.Value, list[LinearSite]] = {}
    for site in chosen:
        if not selection.only and _is_head(site, vocabularies):
            refused.append(Refusal(label(site.node), f"{site.path} is the head", "name it in only to prune it"))
        else:
            by_weight.setdefault(site.weight, []).append(site)
    weights = []
    for sites in by_weight.values():
        refusal = _unfit(sites, amount)
        if refusal is not None:
            refused.append(refusal)
        elif not amount.kept_by(matrix_of(sites[0])):
            weights.append(sites)
    return weights, refused


def _unfit(sites: Sequence[LinearSite], amount: Amount) -> Refusal | None:
    """Why the weight of these sites, all that were chosen of it, cannot be pruned."""
    site = sites[0]
    if not read_only_by(site.weight, [(one.node, 1) for one in sites]):
        return Refusal(label(site.node), f"the weight of {site.path} is read elsewhere too", "untie it")
    if len({one.transposed for one in sites}) > 1:
        return Refusal(label(site.node), f"the weight of {site.path} is read in both orientations", "untie it")
    if isinstance(amount, Pattern) and site.shape[0] % amount.group:
        reason = f"{site.shape[0]} rows are no multiple of {amount.group}"
        return Refusal(label(site.node), reason, "choose another pattern, or a ratio")
    return None


def _is_head(site: LinearSite, vocabularies: Collection[int]) -> bool:
    """Whether the site makes the logits of a vocabulary: one column a token, and an output of the graph."""
    value = site.output
    while not value.is_graph_output():
        node = only_user(value)
        if node is None or not is_operator(node, *_AFTER_A_HEAD):
            return False
        value = node.outputs[0]
    return site.shape[1] in vocabularies


def _second(seen: Mapping[str, Moments], names: Sequence[str]) -> tuple[int, Doubles]:
    """Rows and second moment of what the sites of one weight read, each value's by its rows; one read at a time."""
    rows, second = 0, np.zeros((0, 0))
    for name in dict.fromkeys(names):
        moments = seen[name]
        second = moments.second if not rows else (rows * second + moments.rows * moments.second) / (rows + moments.rows)
        rows += moments.rows
    return rows, second


def _scarce(site: LinearSite, rows: int) -> Iterator[Refusal]:
    if rows < site.shape[0]:
        reason = f"pruned, but calibration saw {rows} rows for {site.shape[0]} channels"
        yield Refusal(label(site.node), reason, "give more calibration data")


def _prune_tables(
    tables: Sequence[EmbeddingSite], selection: Selection, amount: Amount, method: Method
) -> tuple[int, list[Refusal]]:
    """Prune the rows of embeddings: how many were, and why not the others."""
    changed, refused = 0, []
    for site in {site.table: site for site in tables}.values():
        refusal = selection.refusal(site.node, site.path) or _unfit_table(site, amount, method)
        tensor = constant_of(site.table)
        if refusal is not None:
            refused.append(refusal)
        elif tensor is not None and not amount.kept_by(tensor.numpy().T):
            refill(site.table, prune_rows(tensor.numpy(), amount))
            changed += 1
    return changed, refused


def _unfit_table(site: EmbeddingSite, amount: Amount, method: Method) -> Refusal | None:
    name, readers = label(site.node), {use.node.op_type for use in site.table.uses()}
    if method is not Method.MAGNITUDE:
        return Refusal(name, f"{site.path} is looked up: there is no product for {method}", "use method=magnitude")
    if not is_float32(site.table):
        return Refusal(name, "the table is not float32", "prune before the precision is changed")
    if readers != {"Gather"} or site.table.is_graph_output():
        return Refusal(name, f"the table of {site.path} is read elsewhere too", "untie it")
    if isinstance(amount, Pattern) and site.shape[1] % amount.group:
        return Refusal(name, f"{site.shape[1]} columns are no multiple of {amount.group}", "choose another pattern")
    return None
