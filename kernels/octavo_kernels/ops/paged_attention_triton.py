"""Paged attention on a GPU: decodes and chunks, each by its own kernel, into one output."""

from dataclasses import dataclass

import torch

from octavo_kernels.ops.attention_metadata import AttentionMetadata, Scoring
from octavo_kernels.ops.paged_decode import DecodePlan, plan_decodes, run_decodes
from octavo_kernels.ops.paged_prefill import ChunkPlan, plan_chunks, run_chunks


@dataclass(frozen=True, slots=True, eq=False)
class TritonPlan:
    """One step's attention; None for what the step has none of."""

    decodes: DecodePlan | None
    chunks: ChunkPlan | None

    def run(self, query: torch.Tensor, kv_cache_layer: torch.Tensor, scoring: Scoring) -> torch.Tensor:
        """Attention of one layer, [num_tokens, num_heads, head_dim] in the query's type."""
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if self.decodes:
            run_decodes(output, query, kv_cache_layer, self.decodes, scoring)
        if self.chunks:
            run_chunks(output, query, kv_cache_layer, self.chunks, scoring)
        return output


def plan_triton_attention(
    metadata: AttentionMetadata,
    kv_cache_layer: torch.Tensor,
    dtype: torch.dtype,
    sliding_window: int | None = None,
) -> TritonPlan:
    """What one step needs, for every layer with this window; nothing here waits for the device.

    kv_cache_layer: any layer's; dtype: the query's
    Raises ValueError for a cache or a type that the kernels do not take.
    """
    has_chunks = len(metadata.query_lens) > metadata.num_decodes
    return TritonPlan(
        plan_decodes(metadata, kv_cache_layer, dtype, sliding_window) if metadata.num_decodes else None,
        plan_chunks(metadata, kv_cache_layer, dtype, sliding_window) if has_chunks else None,
    )
