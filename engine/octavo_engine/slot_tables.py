"""What a GPU knows of the running sequences: block tables and last tokens, a row for each of the scheduler's slots.

The host only sends what changed. A decode step then needs no more than its slots and positions, and a token that was
just sampled is there for the next step before the host has seen it.
"""

from collections.abc import Sequence
from itertools import chain, repeat

import numpy as np
import torch

from octavo_engine.request import Request
from octavo_engine.staging import upload


class SlotTables:
    """block_tables: [max_num_seqs + 1, max_blocks] int32; last_tokens: [max_num_seqs + 1] int64.

    The last row belongs to nobody: padding of a batch points there.
    """

    def __init__(self, max_num_seqs: int, max_blocks: int, device: torch.device) -> None:
        self.block_tables = torch.zeros(max_num_seqs + 1, max_blocks, dtype=torch.int32, device=device)
        self.last_tokens = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=device)
        self.padding_slot = max_num_seqs

    def update(self, requests: Sequence[Request]) -> None:
        """Send the blocks that these requests have got since the last call."""
        changed = [request for request in requests if request.num_table_blocks < len(request.block_ids)]
        if not changed:
            return
        news = [request.block_ids[request.num_table_blocks :] for request in changed]
        num_new = sum(map(len, news))
        host = np.empty((3, num_new), np.int64)
        host[0] = np.fromiter(
            chain.from_iterable(repeat(each.slot, len(new)) for each, new in zip(changed, news, strict=True)),
            np.int64, num_new,
        )  # fmt: skip
        host[1] = np.fromiter(
            chain.from_iterable(range(each.num_table_blocks, len(each.block_ids)) for each in changed),
            np.int64, num_new,
        )  # fmt: skip
        host[2] = np.fromiter(chain.from_iterable(news), np.int64, num_new)
        slots, columns, block_ids = upload(host, self.block_tables.device)
        self.block_tables[slots, columns] = block_ids.int()
        for request in changed:
            request.num_table_blocks = len(request.block_ids)
