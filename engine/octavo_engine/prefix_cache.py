"""The prefix cache: a radix tree over full blocks, so that requests with equal prefixes share KV.

Its alphabet is the full block: an edge is the tuple of the block's tokens, a node is the block that holds their KV in
the context of all tokens above it. Requests hold references on blocks in the pool; the tree only retains them. Leaves
that nobody references are evicted, least recently used first. Source of the idea: SGLang's RadixAttention
(arXiv:2312.07104), here at the granularity of PagedAttention's blocks (arXiv:2309.06180).
"""

import heapq
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Final

from octavo_engine.block_pool import BlockPool

BlockTokens = tuple[int, ...]
# The root's.
NO_BLOCK: Final = -1


class Node:
    """One full block in the tree. The root has none."""

    __slots__ = ("block_id", "children", "last_used", "parent", "tokens")

    def __init__(self, parent: "Node | None", tokens: BlockTokens, block_id: int) -> None:
        self.parent = parent
        self.tokens = tokens
        self.block_id = block_id
        self.children: dict[BlockTokens, Node] = {}
        self.last_used = 0


class PrefixCache:
    """Remembers which full blocks hold the KV of which tokens. With `is_enabled` False it remembers nothing."""

    def __init__(self, pool: BlockPool, block_size: int, *, is_enabled: bool = True) -> None:
        self._pool = pool
        self._block_size = block_size
        self._is_enabled = is_enabled
        self.root = Node(None, (), NO_BLOCK)
        self._num_nodes = 0
        self._clock = count(1)
        # Candidates for eviction as (last_used, tie-breaker, node), offered where their block may have become nobody's.
        # An entry whose node was used since, or gained a child, is stale and skipped: cheaper than searching the heap
        # at every use.
        self._leaves: list[tuple[int, int, Node]] = []

    def match(self, token_ids: Sequence[int]) -> list[Node]:
        """The nodes of the longest known prefix, from the root down, root left out.

        At least one token always stays unmatched, since its logits are wanted.
        """
        if not self._is_enabled:
            return []
        now = next(self._clock)
        nodes: list[Node] = []
        node = self.root
        for tokens in self._full_blocks(token_ids, end=len(token_ids) - 1):
            child = node.children.get(tokens)
            if child is None:
                break
            child.last_used = now
            nodes.append(child)
            node = child
        if nodes:
            self._offer_leaf(nodes[-1])
        return nodes

    def extend(self, node: Node, tokens: BlockTokens, block_id: int) -> Node:
        """Publish a block that was just filled, as a child of `node`; return the node that now stands for it.

        The caller holds the block of `node`. If another request published the same tokens first, its node is returned.
        """
        if not self._is_enabled:
            return node
        child = node.children.get(tokens)
        if child is not None:
            child.last_used = next(self._clock)
            self._offer_leaf(child)
            return child
        child = Node(node, tokens, block_id)
        child.last_used = next(self._clock)
        node.children[tokens] = child
        self._num_nodes += 1
        self._pool.retain(block_id)
        return child

    def release(self, node: Node) -> None:
        """Tell of a request that published or matched as far as `node` and has dropped its blocks."""
        self._offer_leaf(node)

    def evict(self, num_blocks: int) -> int:
        """Free up to `num_blocks` cached blocks, oldest leaves first; return how many were freed."""
        num_evicted = 0
        kept: list[tuple[int, int, Node]] = []
        while num_evicted < num_blocks and self._leaves:
            entry = heapq.heappop(self._leaves)
            last_used, _, node = entry
            if self._is_stale(node, last_used):
                continue  # it is offered again when its last child goes, or was at its latest use
            if self._pool.num_references(node.block_id):
                kept.append(entry)
                continue
            parent = self._remove(node)
            num_evicted += 1
            if not parent.children:
                self._offer_leaf(parent)
        for entry in kept:
            heapq.heappush(self._leaves, entry)
        return num_evicted

    def candidates(self) -> Iterator[Node]:
        """The leaves that `evict` knows of, some of which requests may hold."""
        return (node for last_used, _, node in self._leaves if not self._is_stale(node, last_used))

    def nodes(self) -> Iterator[Node]:
        """Every node but the root, parents before children."""
        pending = list(self.root.children.values())
        while pending:
            node = pending.pop()
            yield node
            pending.extend(node.children.values())

    def _remove(self, node: Node) -> Node:
        parent = node.parent
        assert parent is not None
        del parent.children[node.tokens]
        node.parent = None
        self._num_nodes -= 1
        self._pool.forget(node.block_id)
        return parent

    def _is_stale(self, node: Node, last_used: int) -> bool:
        return bool(node.children) or node.last_used != last_used or node.parent is None

    def _offer_leaf(self, node: Node) -> None:
        if node is self.root or node.children:
            return
        heapq.heappush(self._leaves, (node.last_used, next(self._clock), node))
        if len(self._leaves) > 4 * self._num_nodes + 64:
            self._drop_stale_entries()

    def _drop_stale_entries(self) -> None:
        leaves = (node for node in self.nodes() if not node.children)
        self._leaves = [(node.last_used, next(self._clock), node) for node in leaves]
        heapq.heapify(self._leaves)

    def _full_blocks(self, token_ids: Sequence[int], end: int) -> Iterator[BlockTokens]:
        for start in range(0, end - self._block_size + 1, self._block_size):
            yield tuple(token_ids[start : start + self._block_size])
