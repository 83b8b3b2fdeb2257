"""What all layers of one step share: rotary tables, KV slots and the attention plans, made once per forward pass."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from octavo_kernels.ops.attention_metadata import AttentionMetadata
from octavo_kernels.ops.kv_write import KvRows, locate_rows
from octavo_kernels.ops.paged_attention import AttentionPlan, plan_attention

# Cosine and sine of each token's angles, both [num_tokens, 1, rotary_dim].
RotaryTables = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """What layers need of a step beside their input.

    rotary:  None for a model that does not rotate
    kv_rows: where keys and values go
    plans:   what attention reads, for each sliding window that a layer of the model has; None: the whole context
    """

    rotary: RotaryTables | None
    kv_rows: KvRows
    plans: Mapping[int | None, AttentionPlan]


def prepare_step(
    rotary: RotaryTables | None,
    kv_cache: torch.Tensor,
    metadata: AttentionMetadata,
    dtype: torch.dtype,
    sliding_windows: Iterable[int | None],
) -> Step:
    """kv_cache: [num_blocks, num_layers, 2, block_size, num_kv_heads, head_dim]; dtype: that of queries."""
    layer = kv_cache[:, 0]
    kv_rows = locate_rows(metadata.slot_mapping, layer)
    return Step(rotary, kv_rows, {window: plan_attention(metadata, layer, dtype, window) for window in sliding_windows})
