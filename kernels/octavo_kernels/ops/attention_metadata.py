"""What every attention kernel is told: about a step, which tokens belong to which request and where their KV lives;
about a layer, how queries and keys become weights."""

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True, eq=False)
class AttentionMetadata:
    """One step's batch, requests in order: first those with one query token (decodes), then the longer chunks.

    block_tables:    [num_seqs, max_blocks] int64 or int32, block ids; entries past a request's length are 0
    seq_lens:        [num_seqs] int64 or int32, tokens of context including this step's. 0 = padding of a decode batch,
                     whose output is finite and means nothing; -1 = no decode, the row may be a chunk's
    query_start_loc: [num_seqs + 1] int64 or int32, first row of each request in the flattened tokens
    slot_mapping:    [num_tokens] int64, block_id * block_size + offset; -1 = padding, skipped
    num_decodes:     requests at the front that have exactly one query token
    query_lens, context_lens: the same as host integers, so that no kernel choice waits for the device; on a GPU only
                     the query lengths of the chunks are read, so that a captured batch of decodes may change
    max_chunk_tokens: for a captured step, the most tokens that its chunks have together; their lengths are then read on
                     the device alone, and an empty chunk is none
    """

    block_tables: torch.Tensor
    seq_lens: torch.Tensor
    query_start_loc: torch.Tensor
    slot_mapping: torch.Tensor
    num_decodes: int
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    max_chunk_tokens: int | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Scoring:
    """How a layer scores keys and reads its cache.

    score = cap(scale * k_scale * q.k) + alibi_slope * (key position - query position)
    cap(x) = softcap * tanh(x / softcap), or x if softcap is 0
    output = v_scale * softmax(scores) V

    scale:        positive
    alibi_slopes: [num_heads] float32 (https://arxiv.org/abs/2108.12409, up to a constant per query token)
    k_scale, v_scale: what the cache's keys and values were divided by when they were written
    """

    scale: float
    alibi_slopes: torch.Tensor | None = None
    softcap: float = 0.0
    k_scale: float = 1.0
    v_scale: float = 1.0

    @property
    def is_plain(self) -> bool:
        """Whether scores are scale * q.k and nothing else, as fused attention computes them."""
        return self.alibi_slopes is None and not self.softcap and self.k_scale == self.v_scale == 1.0


def check_query(query: torch.Tensor, kv_cache_layer: torch.Tensor, scoring: Scoring) -> None:
    """What every kernel asks of the queries and the slopes. Raises ValueError."""
    _, _, _, num_kv_heads, head_dim = kv_cache_layer.shape
    if query.ndim != 3 or query.shape[2] != head_dim or query.stride(2) != 1 or query.shape[1] % num_kv_heads:
        raise ValueError(
            f"queries {tuple(query.shape)} with strides {query.stride()} do not fit {num_kv_heads} KV heads of "
            f"{head_dim} elements"
        )
    slopes = scoring.alibi_slopes
    if slopes is not None and (
        slopes.shape != query.shape[1:2] or slopes.dtype != torch.float32 or not slopes.is_contiguous()
    ):
        raise ValueError(f"ALiBi takes [{query.shape[1]}] contiguous float32 slopes, not {slopes.shape} {slopes.dtype}")


class AttentionPlan(Protocol):
    """What one step's attention consists of, for every layer with the window that it was planned for."""

    def run(
        self,
        query: torch.Tensor,
        kv_cache_layer: torch.Tensor,
        scoring: Scoring,
        new_kv: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Attention of one layer, [num_tokens, num_heads, head_dim] in the query's type.

        new_kv: this step's keys and values, both [num_tokens, num_kv_heads, head_dim], which the cache holds, too
        """
