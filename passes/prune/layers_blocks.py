"""The blocks of a transformer: from one value that all hidden states run through to the next of its kind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import onnx_ir as ir

from artifacts.signature import cache_names
from passes.shapes import dims_of, same_dims
from passes.sites import embedding_sites, module_path
from passes.surgery import MICROSOFT, is_operator, remove_dead

from .structure import BlockedError

_ATTENTIONS = ("MultiHeadAttention", "GroupQueryAttention", "Attention")
_TOKENS = "input_ids"
_ORDER = "Run it before fuse-skip-layer-norm"
_UNLIKE = "its block is not of one form with the others"


@dataclass(frozen=True, eq=False)
class Block:
    """One layer of a transformer.

    Attributes:
        attention: Its attention.
        source: The hidden states that it reads, ``[..., hidden]``; nothing else of them goes past it.
        result: What it makes of them, of the same shape.
        path: Module path of its attention.
    """

    attention: ir.Node
    source: ir.Value
    result: ir.Value
    path: str


def blocks_of(model: ir.Model) -> tuple[Block, ...]:
    """The blocks of the main graph, in order.

    A block begins at the last value before an attention that all hidden states run through, and ends as many such
    values later as the next begins; all have as many.

    Raises:
        BlockedError: There are no two attentions, or their blocks cannot be told apart.
    """
    nodes = list(model.graph)
    flow = _hidden_flow(model, nodes)
    attentions = [
        node for node in nodes if is_operator(node, *_ATTENTIONS, domain=MICROSOFT) and node.outputs[0] in flow
    ]
    if len(attentions) < 2:
        raise BlockedError(None, f"there are {len(attentions)} attention operators", "Run fuse-attention before")
    index = {node: place for place, node in enumerate(nodes)}
    necks = list(_necks(nodes, flow))
    starts = [_before(necks, attention, index[attention]) for attention in attentions]
    steps = {after - before for before, after in pairwise(starts)}
    if len(steps) != 1 or 0 in steps or starts[-1] + min(steps) >= len(necks):
        raise BlockedError(attentions[-1], _UNLIKE, _ORDER)
    starts.append(starts[-1] + steps.pop())
    found = [
        Block(attention, necks[start][0], necks[stop][0], module_path(attention))
        for attention, (start, stop) in zip(attentions, pairwise(starts), strict=True)
    ]
    for block in found:
        if not same_dims(dims_of(block.source), dims_of(block.result)):
            reason = "the shapes of the hidden states are not known"
            raise BlockedError(block.attention, reason, "Run infer-shapes before")
    if len({sum(is_operator(node, "MatMul", "Gemm") for node in _inside(block)) for block in found}) > 1:
        raise BlockedError(attentions[-1], _UNLIKE, _ORDER)
    return tuple(found)


def _before(necks: list[tuple[ir.Value, int]], attention: ir.Node, place: int) -> int:
    """Index of the last neck before an attention, the node at ``place``."""
    before = [number for number, (_, made) in enumerate(necks) if made < place]
    if not before:
        raise BlockedError(attention, "hidden states run past it", _ORDER)
    return before[-1]


def take_out(model: ir.Model, block: Block) -> None:
    """Let what follows a block read what it reads; the block's KV cache goes, and those behind it are renumbered.

    Raises:
        BlockedError: Something else reads what is computed in it. The graph is as it was.
    """
    graph, source, result = model.graph, block.source, block.result
    inside, cache = _inside(block), _cache_of(block.attention)
    for node in inside:
        for output in node.outputs:
            elsewhere = any(use.node not in inside for use in output.uses())
            shown = output.is_graph_output() and not any(output is present for _, present in cache)
            if output is not result and (elsewhere or shown):
                raise BlockedError(node, "what it makes is read outside of its block", "Run hoist-shapes before")
    numbers = _numbered(model)
    presents = [present for _, present in cache]
    graph.outputs[:] = [value for value in graph.outputs if value not in presents]
    name, shown = result.name, result.is_graph_output()
    result.replace_all_uses_with(source, replace_graph_outputs=True)
    if shown:
        result.name, source.name = None, name
    remove_dead([result])
    pasts = [past for past, _ in cache]
    graph.inputs[:] = [value for value in graph.inputs if value not in pasts]
    _renumber([pair for pair in numbers if pair[0] not in pasts])


def _hidden_flow(model: ir.Model, nodes: list[ir.Node]) -> set[ir.Value]:
    """Float values that are made of the tokens looked up, or of float inputs; present KV caches are none."""
    pasts = {past for node in nodes for past, _ in _cache_of(node)}
    looked = [site for site in embedding_sites(model) if site.indices.is_graph_input()]
    tokens = [site for site in looked if site.indices.name == _TOKENS] or looked
    flow = {site.output for site in tokens}
    flow |= {value for value in model.graph.inputs if _is_float(value) and value not in pasts}
    for node in nodes:
        if is_operator(node, "Shape") or not any(value in flow for value in node.inputs):
            continue
        made = node.outputs[:1] if _cache_of(node) else node.outputs
        flow.update(value for value in made if _is_float(value))
    return flow


def _is_float(value: ir.Value) -> bool:
    return value.dtype is None or value.dtype.is_floating_point()


def _necks(nodes: list[ir.Node], flow: set[ir.Value]) -> Iterator[tuple[ir.Value, int]]:
    """Values that all that is in flow runs through, each with the index of the node that makes it, in order."""
    end = len(nodes)
    last: dict[ir.Value, int] = {value: end for value in flow if value.is_graph_output()}
    for place, node in enumerate(nodes):
        if not is_operator(node, "Shape"):
            for value in node.inputs:
                if value in flow and value is not None:
                    last[value] = max(last.get(value, place), place)
    live: dict[ir.Value, None] = {}
    for place, node in enumerate(nodes):
        for value in node.inputs:
            if value is not None and last.get(value) == place:
                live.pop(value, None)
        live |= {value: None for value in node.outputs if value in last}
        if len(live) == 1 and node.outputs[0] in live:
            yield node.outputs[0], place


def _inside(block: Block) -> set[ir.Node]:
    """The nodes of a block: what its result is made of and depends on its source."""
    source, result = block.source, block.result
    below: set[ir.Node] = set()
    pending = [source]
    while pending:
        for user in pending.pop().consumers():
            if user not in below:
                below.add(user)
                if result not in user.outputs:
                    pending.extend(user.outputs)
    found: set[ir.Node] = set()
    pending = [result]
    while pending:
        node = pending.pop().producer()
        if node is not None and node in below and node not in found:
            found.add(node)
            pending.extend(value for value in node.inputs if value is not None and value is not source)
    return found


def _cache_of(node: ir.Node) -> list[tuple[ir.Value, ir.Value]]:
    """(past, present) of the keys and of the values of an attention that keeps them."""
    if not is_operator(node, "GroupQueryAttention", domain=MICROSOFT) or len(node.outputs) < 3:
        return []
    pairs = zip(node.inputs[3:5], node.outputs[1:3], strict=True)
    return [(past, present) for past, present in pairs if past is not None]


def _numbered(model: ir.Model) -> list[tuple[ir.Value, ir.Value]]:
    """(past, present) of all caches in the order of their numbers; of those alone that are named as a decoder's are."""
    pairs = {str(past.name): (past, present) for node in model.graph for past, present in _cache_of(node)}
    names = [old for layer in range(len(pairs)) for old, _ in cache_names(layer)]
    return [pairs[name] for name in names if name in pairs]


def _renumber(pairs: list[tuple[ir.Value, ir.Value]]) -> None:
    names = [pair for layer in range(len(pairs) // 2) for pair in cache_names(layer)]
    for (past, present), (old, new) in zip(pairs, names, strict=False):
        past.name, present.name = old, new
