"""KV of prompt prefixes that are likely to come again: system prompts, documents, turns of a chat.

A radix tree over token ids whose digits are blocks of `BLOCK` tokens: a path from the root spells a prefix, and each
node holds the keys and values of its block, which depend on all tokens before it too. Blocks are copied out of slots
and into slots, so that a text never reads memory that another one writes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from artifacts.errors import UsageError

from .cache import CacheLayout, KVCache

BLOCK = 32
"""Tokens of a block: what is less is read again."""
_LEFT = 2
"""Tokens of a prompt that are always read: the logits of the last one are wanted; see `piece_end` for the other."""


class _Node:
    """A block, by the path of blocks that leads to it."""

    __slots__ = ("children", "data", "key", "parent")

    def __init__(self, parent: _Node | None, key: tuple[int, ...], data: NDArray[Any]) -> None:
        self.parent = parent
        self.key = key
        self.data = data
        self.children: dict[tuple[int, ...], _Node] = {}


class PrefixCache:
    """The prefixes that were read lately. Not to be used by two threads at once.

    Args:
        layout: Of the graph's KV cache.
        limit: Most bytes of keys and values to keep; what was not used for longest goes first.

    Attributes:
        asked: Prompts that were looked up.
        hits: Those of them of which something was there.
        saved: Tokens that were not read again.

    Raises:
        UsageError: The limit is negative.
    """

    def __init__(self, layout: CacheLayout, limit: int) -> None:
        if limit < 0:
            raise UsageError(f"a prefix cache of {limit} bytes", "Pass 0 or more")
        self.limit = limit
        self.asked = self.hits = self.saved = 0
        self._block_bytes = BLOCK * layout.token_bytes
        self._most = limit // self._block_bytes
        self._root = _Node(None, (), np.empty(0, np.uint8))
        # What an adapter makes of a prefix is something else: each has a tree of its own.
        self._trees = {"": self._root}
        # From the longest unused to the last used. A block is used whenever one below it is, and noted after it, so
        # that the first of all is always a leaf.
        self._used: OrderedDict[_Node, None] = OrderedDict()

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values that are kept."""
        return len(self._used) * self._block_bytes

    def longest(self, prompt: Sequence[int], *, adapter: str = "") -> int:
        """How many of the first tokens of a prompt :meth:`restore` would find. Nothing counts as used."""
        return len(self._path(prompt, len(prompt) - _LEFT, adapter)) * BLOCK

    def restore(self, prompt: Sequence[int], cache: KVCache, slot: int, *, adapter: str = "") -> int:
        """Put what is there of a prompt into a slot.

        Returns:
            How many of its first tokens the slot holds now; the last two are never among them.
        """
        path = self._path(prompt, len(prompt) - _LEFT, adapter)
        for index, node in enumerate(path):
            cache.write(slot, index * BLOCK, node.data)
        self._touch(path)
        self.asked += 1
        self.hits += bool(path)
        self.saved += len(path) * BLOCK
        return len(path) * BLOCK

    def keep(self, tokens: Sequence[int], cache: KVCache, slot: int, *, adapter: str = "") -> None:
        """Remember what a slot holds: the keys and values of these tokens, from the first one on."""
        path = self._path(tokens, len(tokens), adapter)
        self._touch(path)
        wanted = min(len(tokens) // BLOCK, self._most)
        parent = path[-1] if path else self._tree(adapter)
        added: list[_Node] = []
        for index in range(len(path), wanted):
            if len(self._used) + len(added) >= self._most:
                self._evict()
            start = index * BLOCK
            key = tuple(tokens[start : start + BLOCK])
            node = _Node(parent, key, cache.read(slot, start, start + BLOCK))
            parent.children[key] = node
            added.append(node)
            parent = node
        self._touch([*path, *added])

    def clear(self) -> None:
        """Forget all prefixes; the counts stay."""
        self._root.children.clear()
        self._trees = {"": self._root}
        self._used.clear()

    def _tree(self, adapter: str) -> _Node:
        return self._trees.setdefault(adapter, _Node(None, (), np.empty(0, np.uint8)))

    def _path(self, tokens: Sequence[int], most: int, adapter: str) -> list[_Node]:
        """The blocks that are there of the first ``most`` tokens, from the first one on."""
        node, path = self._tree(adapter), []
        for start in range(0, most - BLOCK + 1, BLOCK):
            found = node.children.get(tuple(tokens[start : start + BLOCK]))
            if found is None:
                break
            path.append(found)
            node = found
        return path

    def _touch(self, path: Sequence[_Node]) -> None:
        for node in reversed(path):
            self._used[node] = None
            self._used.move_to_end(node)

    def _evict(self) -> None:
        node, _ = self._used.popitem(last=False)
        if node.parent is not None:
            del node.parent.children[node.key]
