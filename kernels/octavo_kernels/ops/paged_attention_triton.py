"""Paged attention on a GPU: decodes and chunks, each by its own kernel, into one output."""

from dataclasses import dataclass

import torch

from octavo_kernels.ops.attention_metadata import AttentionMetadata, Scoring
from octavo_kernels.ops.paged_decode import DecodePlan, plan_decodes, run_decodes
from octavo_kernels.ops.paged_prefill import ChunkPlan, plan_chunks, run_chunks
from octavo_kernels.ops.prompt_attention import PromptRows, attend_prompt, find_prompts


@dataclass(frozen=True, slots=True, eq=False)
class PromptPlan:
    """Prompts that cuDNN takes. rest: what is left of the step's chunks, None for nothing."""

    rows: tuple[PromptRows, ...]
    rest: ChunkPlan | None


@dataclass(frozen=True, slots=True, eq=False)
class TritonPlan:
    """One step's attention; None for what the step has none of.

    prompts:   instead of `chunks`, where they may be
    is_padded: some rows may belong to no request; they get zeros, which no later kernel stumbles over
    """

    decodes: DecodePlan | None
    chunks: ChunkPlan | None
    prompts: PromptPlan | None
    is_padded: bool

    def run(
        self,
        query: torch.Tensor,
        kv_cache_layer: torch.Tensor,
        scoring: Scoring,
        new_kv: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """As `AttentionPlan.run`."""
        output = (torch.zeros if self.is_padded else torch.empty)(query.shape, dtype=query.dtype, device=query.device)
        if self.decodes:
            run_decodes(output, query, kv_cache_layer, self.decodes, scoring)
        chunks = self.chunks
        if self.prompts and new_kv and scoring.is_plain:
            for rows in self.prompts.rows:
                attend_prompt(output, query, *new_kv, rows, scoring.scale)
            chunks = self.prompts.rest
        if chunks:
            run_chunks(output, query, kv_cache_layer, chunks, scoring)
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
        _plan_prompts(metadata, kv_cache_layer, dtype) if has_chunks and sliding_window is None else None,
        is_padded=metadata.max_chunk_tokens is not None,
    )


def _plan_prompts(metadata: AttentionMetadata, kv_cache_layer: torch.Tensor, dtype: torch.dtype) -> PromptPlan | None:
    if metadata.max_chunk_tokens is not None:
        return None
    found = find_prompts(kv_cache_layer, dtype, metadata.query_lens, metadata.context_lens)
    rows = tuple(prompt for prompt in found if prompt)
    if not rows:
        return None
    num_done = [prompt.num_tokens if prompt else 0 for prompt in found[metadata.num_decodes :]]
    is_all = num_done == list(metadata.query_lens[metadata.num_decodes :])
    return PromptPlan(rows, None if is_all else plan_chunks(metadata, kv_cache_layer, dtype, num_done=num_done))
