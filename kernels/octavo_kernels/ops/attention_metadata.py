"""What every attention kernel is told about a step: which tokens belong to which request, and where their KV lives."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class AttentionMetadata:
    """One step's batch, requests in order: first those with one query token (decodes), then the longer chunks.

    block_tables:    [num_seqs, max_blocks] int64, block ids; entries past a request's length are 0
    seq_lens:        [num_seqs] int64, tokens of context including this step's
    query_start_loc: [num_seqs + 1] int64, first row of each request in the flattened tokens
    slot_mapping:    [num_tokens] int64, block_id * block_size + offset; -1 = padding, skipped
    num_decodes:     requests at the front that have exactly one query token
    query_lens, context_lens: the same as host integers, so that no kernel choice waits for the device
    """

    block_tables: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    slot_mapping: torch.Tensor
    num_decodes: int
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
