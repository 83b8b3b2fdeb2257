"""Attention over a paged KV cache. Which requests, which tiles of which blocks and which mask is the same for every
layer, so it is planned once per step: for torch and the CPU in `paged_attention_torch.py`, which is the reference, and
for NVIDIA GPUs in `paged_attention_triton.py`.
"""

from collections.abc import Sequence
from itertools import takewhile

import torch

from octavo_kernels.launch import runs_triton
from octavo_kernels.ops.attention_metadata import AttentionMetadata, AttentionPlan, Scoring
from octavo_kernels.ops.paged_attention_torch import plan_torch_attention

__all__ = ["AttentionPlan", "example_inputs", "paged_attention", "plan_attention", "run_attention"]


def paged_attention(
    query: torch.Tensor,
    kv_cache_layer: torch.Tensor,
    metadata: AttentionMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float = 0.0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    """softmax(scale * q K^T) V of each token over the context of its request, itself included.

    query:          [num_tokens, num_heads, head_dim]
    kv_cache_layer: [num_blocks, 2, block_size, num_kv_heads, head_dim], holding this step's keys and values already
    sliding_window: a token sees itself and the `sliding_window - 1` tokens before it
    alibi_slopes, softcap, k_scale, v_scale: as in `Scoring`
    Returns         [num_tokens, num_heads, head_dim] in the query's type; query head h reads KV head
                    h // (num_heads / num_kv_heads)
    Source: PagedAttention (https://arxiv.org/abs/2309.06180).
    """
    plan = plan_attention(metadata, kv_cache_layer, query.dtype, sliding_window)
    return plan.run(query, kv_cache_layer, Scoring(scale, alibi_slopes, softcap, k_scale, v_scale))


def plan_attention(
    metadata: AttentionMetadata,
    kv_cache_layer: torch.Tensor,
    dtype: torch.dtype,
    sliding_window: int | None = None,
) -> AttentionPlan:
    """What `run_attention` needs to know of a step, for every layer with this window.

    kv_cache_layer: any layer's; dtype: the query's
    On a GPU a batch of decodes can be captured in a CUDA graph, this call included: it only launches kernels.
    """
    if runs_triton(kv_cache_layer):
        # Triton comes with torch's CUDA builds only.
        from octavo_kernels.ops.paged_attention_triton import plan_triton_attention

        return plan_triton_attention(metadata, kv_cache_layer, dtype, sliding_window)
    return plan_torch_attention(metadata, kv_cache_layer, dtype, sliding_window)


def run_attention(
    query: torch.Tensor,
    kv_cache_layer: torch.Tensor,
    plan: AttentionPlan,
    *,
    scale: float,
    alibi_slopes: torch.Tensor | None = None,
    softcap: float = 0.0,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
    new_kv: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """`paged_attention` after `plan_attention`. new_kv: as in `AttentionPlan.run`."""
    return plan.run(query, kv_cache_layer, Scoring(scale, alibi_slopes, softcap, k_scale, v_scale), new_kv)


def example_inputs(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    *,
    num_heads: int = 6,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    block_size: int = 4,
) -> tuple[torch.Tensor, torch.Tensor, AttentionMetadata]:
    """Query, cache layer and metadata for requests whose blocks lie scattered; slots of nobody hold NaN.

    The cache layer is a view into a cache of two layers, as an engine passes it.
    """
    num_blocks_of = [-(-context // block_size) for context in context_lens]
    num_blocks = sum(num_blocks_of) + 1
    free = (torch.randperm(num_blocks - 1) + 1).tolist()
    tables = torch.zeros(len(context_lens), max(num_blocks_of), dtype=torch.int64)
    cache = torch.full((num_blocks, 2, 2, block_size, num_kv_heads, head_dim), torch.nan)
    slots: list[int] = []
    for seq, (query_len, context) in enumerate(zip(query_lens, context_lens, strict=True)):
        blocks = [free.pop() for _ in range(num_blocks_of[seq])]
        tables[seq, : len(blocks)] = torch.tensor(blocks)
        own = [blocks[token // block_size] * block_size + token % block_size for token in range(context)]
        slots += own[context - query_len :]
        block_ids, offsets = torch.tensor(own) // block_size, torch.tensor(own) % block_size
        cache[block_ids, 1, :, offsets] = torch.randn(context, 2, num_kv_heads, head_dim)
    metadata = AttentionMetadata(
        block_tables=tables,
        seq_lens=torch.tensor(context_lens),
        query_start_loc=torch.tensor([0, *query_lens]).cumsum(0),
        slot_mapping=torch.tensor(slots),
        num_decodes=len(list(takewhile(lambda query_len: query_len == 1, query_lens))),
        query_lens=tuple(query_lens),
        context_lens=tuple(context_lens),
    )
    return torch.randn(sum(query_lens), num_heads, head_dim), cache[:, 1], metadata
