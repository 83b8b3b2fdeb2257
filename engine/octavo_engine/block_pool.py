"""The pool of KV cache blocks: which are free, which are in use and by how many, which are kept for prefix hits.

It counts references and knows nothing of tokens, requests or tensors. A block is in exactly one of three states:

    free    nobody references it and nothing remembers it
    used    at least one request references it
    cached  nobody references it, but the prefix cache retains its content; it can be taken back at any time
"""

from collections import deque
from collections.abc import Iterable


class BlockPool:
    """Reference counts over `num_blocks` blocks, numbered from 0."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._free = deque(range(num_blocks))
        self._num_references = [0] * num_blocks
        self._is_retained = [False] * num_blocks
        self._num_cached = 0

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out now."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks that only the prefix cache holds."""
        return self._num_cached

    @property
    def num_used(self) -> int:
        """Blocks that requests reference."""
        return self.num_blocks - self.num_free - self.num_cached

    def num_references(self, block_id: int) -> int:
        """How many requests hold the block."""
        return self._num_references[block_id]

    def allocate(self, num_blocks: int) -> list[int]:
        """Take free blocks, each with one reference. The caller has made sure that there are enough."""
        assert num_blocks <= self.num_free, f"{num_blocks} blocks wanted, {self.num_free} free"
        block_ids = [self._free.popleft() for _ in range(num_blocks)]
        for block_id in block_ids:
            self._num_references[block_id] = 1
        return block_ids

    def share(self, block_ids: Iterable[int]) -> None:
        """Add a reference to blocks that are used or cached."""
        for block_id in block_ids:
            if not self._num_references[block_id]:
                assert self._is_retained[block_id], f"block {block_id} is free"
                self._num_cached -= 1
            self._num_references[block_id] += 1

    def release(self, block_ids: Iterable[int]) -> None:
        """Drop a reference to each block. The last one frees it, unless the prefix cache retains it."""
        for block_id in block_ids:
            assert self._num_references[block_id] > 0, f"block {block_id} is released twice"
            self._num_references[block_id] -= 1
            if self._num_references[block_id]:
                continue
            if self._is_retained[block_id]:
                self._num_cached += 1
            else:
                self._free.append(block_id)

    def retain(self, block_id: int) -> None:
        """Keep a used block's content after its last reference is gone."""
        assert self._num_references[block_id] > 0, f"block {block_id} is not in use"
        assert not self._is_retained[block_id], f"block {block_id} is retained twice"
        self._is_retained[block_id] = True

    def forget(self, block_id: int) -> None:
        """Stop retaining a block; it becomes free at once if nobody references it."""
        assert self._is_retained[block_id], f"block {block_id} is not retained"
        self._is_retained[block_id] = False
        if not self._num_references[block_id]:
            self._num_cached -= 1
            self._free.append(block_id)
