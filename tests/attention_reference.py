"""Attention written from its definition, in float64 and one request at a time: what every implementation is held to."""

from dataclasses import replace

import torch
from octavo_kernels.ops.attention_metadata import AttentionMetadata, Scoring


def dense_attention(
    query: torch.Tensor, cache: torch.Tensor, metadata: AttentionMetadata, scoring: Scoring, window: int | None = None
) -> torch.Tensor:
    """[num_tokens, num_heads, head_dim] float64 on the CPU; rows of padding requests (no context) are 0."""
    query, cache, tables = query.cpu().double(), cache.cpu().double(), metadata.block_tables.cpu().long()
    group_size = query.shape[1] // cache.shape[3]
    output, row = torch.zeros_like(query), 0
    for seq, (query_len, context) in enumerate(zip(metadata.query_lens, metadata.context_lens, strict=True)):
        if context:
            rows = slice(row, row + query_len)
            tokens = torch.arange(context)
            own = cache[tables[seq, tokens // cache.shape[2]], :, tokens % cache.shape[2]]
            keys, values = own.repeat_interleave(group_size, dim=2).permute(1, 2, 0, 3)
            output[rows] = _attend(query[rows].transpose(0, 1), keys, values, scoring, window).transpose(0, 1)
        row += query_len
    return output


def _attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scoring: Scoring, window: int | None
) -> torch.Tensor:
    """[num_heads, query_len, head_dim]; keys and values: [num_heads, context, head_dim]."""
    query_len, context = query.shape[1], keys.shape[1]
    distances = torch.arange(context) - torch.arange(context - query_len, context)[:, None]
    scores = query @ keys.mT * (scoring.scale * scoring.k_scale)
    if scoring.softcap:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    if scoring.alibi_slopes is not None:
        scores = scores + scoring.alibi_slopes.cpu().double()[:, None, None] * distances
    hidden = distances > 0 if window is None else (distances > 0) | (distances <= -window)
    weights = torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1)
    return weights @ values * scoring.v_scale


def move_attention(
    device: torch.device, query: torch.Tensor, cache: torch.Tensor, metadata: AttentionMetadata, scoring: Scoring
) -> tuple[torch.Tensor, torch.Tensor, AttentionMetadata, Scoring]:
    """The arguments of attention on another device; the cache keeps its strides, between which other layers lie."""
    moved_cache = torch.empty_strided(cache.shape, cache.stride(), dtype=cache.dtype, device=device)
    moved_cache.copy_(cache)
    moved_metadata = replace(
        metadata,
        block_tables=metadata.block_tables.to(device),
        seq_lens=metadata.seq_lens.to(device),
        query_start_loc=metadata.query_start_loc.to(device),
        slot_mapping=metadata.slot_mapping.to(device),
    )
    slopes = None if scoring.alibi_slopes is None else scoring.alibi_slopes.to(device)
    return query.to(device), moved_cache, moved_metadata, replace(scoring, alibi_slopes=slopes)
