"""What all layers of one step share: rotary tables, KV slots and the attention plan, made once per forward pass."""

from dataclasses import dataclass

import torch
from octavo_kernels.ops.attention_metadata import AttentionMetadata
from octavo_kernels.ops.kv_write import KvRows, locate_rows
from octavo_kernels.ops.paged_attention import AttentionPlan, plan_attention


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """cos, sin: [num_tokens, 1, rotary_dim]; kv_rows: where keys and values go; plan: what attention reads."""

    cos: torch.Tensor
    sin: torch.Tensor
    kv_rows: KvRows
    plan: AttentionPlan


def prepare_step(
    cos: torch.Tensor,
    sin: torch.Tensor,
    kv_cache: torch.Tensor,
    metadata: AttentionMetadata,
    sliding_window: int | None,
) -> Step:
    """kv_cache: [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]."""
    layer = kv_cache[:, 0]
    kv_rows = locate_rows(metadata.slot_mapping, layer)
    return Step(cos, sin, kv_rows, plan_attention(metadata, layer, cos.dtype, sliding_window))
