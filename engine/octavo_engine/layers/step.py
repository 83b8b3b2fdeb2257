"""What all layers of one step share: rotary tables, KV slots and the attention plan, made once per forward pass."""

from dataclasses import dataclass

import torch
from octavo_kernels.ops.attention_metadata import AttentionMetadata
from octavo_kernels.ops.kv_write import locate_slots
from octavo_kernels.ops.paged_attention import AttentionPlan, plan_attention


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """cos, sin: [num_tokens, 1, rotary_dim]; kv_rows: tokens to store, None for all; block_ids, offsets: where to."""

    cos: torch.Tensor
    sin: torch.Tensor
    kv_rows: torch.Tensor | None
    block_ids: torch.Tensor
    offsets: torch.Tensor
    plan: AttentionPlan


def prepare_step(
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv_cache: torch.Tensor,
    metadata: AttentionMetadata,
    sliding_window: int | None,
) -> Step:
    """kv_cache: [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]."""
    block_size = kv_cache.shape[3]
    slots, kv_rows = metadata.slot_mapping, None
    if bool((slots < 0).any()):
        kv_rows = (slots >= 0).nonzero().squeeze(1)
        slots = slots[kv_rows]
    block_ids, offsets = locate_slots(slots, block_size)
    plan = plan_attention(metadata, block_size, cos.dtype, sliding_window)
    return Step(cos, sin, kv_rows, block_ids, offsets, plan)
