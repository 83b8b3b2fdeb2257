"""Causal attention of prompts from their first token on, by cuDNN, which is faster there than `paged_prefill`.

Nothing that such a token sees lies outside its step, so keys and values are read as they were just computed, not from
the paged cache. cuDNN builds a plan for each length, which takes a tenth of a second, so that only whole granules of a
prompt go this way; the rest of it is a chunk behind a context. Measured on an H100 in bfloat16, 32 heads and 8 KV heads
of 128: 594 TFLOP/s against 428 at 8192 tokens, 402 at 2048. Below that the difference is not worth a plan, and finer
granules of long prompts gained nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from octavo_kernels.launch import variant_of

GRANULE: Final = 1024
MAX_HEAD_DIM: Final = 128
# Where it was measured to be faster.
VARIANTS: Final = frozenset({"hopper", "grace-hopper"})


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Rows of a step that begin a prompt, whole granules."""

    first_row: int
    num_tokens: int


def find_prompts(
    kv_cache_layer: torch.Tensor, dtype: torch.dtype, query_lens: Sequence[int], context_lens: Sequence[int]
) -> list[PromptRows | None]:
    """For each request of a step, what of it cuDNN takes.

    dtype: the queries'. Keys and values that the cache holds in another type are read from there by everyone, so that a
    prompt's result does not depend on how it is cut into chunks.
    """
    is_suited = (
        variant_of(kv_cache_layer.device) in VARIANTS
        and dtype in (torch.bfloat16, torch.float16)
        and kv_cache_layer.dtype == dtype
        and kv_cache_layer.shape[-1] <= MAX_HEAD_DIM
        and kv_cache_layer.shape[-1] % 8 == 0
    )
    found: list[PromptRows | None] = []
    first_row = 0
    for query_len, context_len in zip(query_lens, context_lens, strict=True):
        num_tokens = query_len // GRANULE * GRANULE
        is_prompt = is_suited and query_len == context_len and num_tokens > 0
        found.append(PromptRows(first_row, num_tokens) if is_prompt else None)
        first_row += query_len
    return found


def attend_prompt(
    output: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rows: PromptRows,
    scale: float,
) -> None:
    """Attention of the rows of one prompt over themselves, into the same rows of `output`.

    output, query: [num_tokens, num_heads, head_dim]; key, value: [num_tokens, num_kv_heads, head_dim]
    """
    window = slice(rows.first_row, rows.first_row + rows.num_tokens)
    queries, keys, values = (tensor[window].transpose(0, 1)[None] for tensor in (query, key, value))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        attended = functional.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=scale, enable_gqa=True
        )
    output[window].copy_(attended[0].transpose(0, 1))


def warm_up(heads: torch.Tensor, num_heads: int, num_kv_heads: int, kv_cache_layer: torch.Tensor) -> None:
    """Have cuDNN build its plans for prompts of up to len(heads) tokens.

    heads: [num_tokens, num_heads + 2 * num_kv_heads, head_dim], of any content; kv_cache_layer: any layer's
    """
    query, key, value = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    output = torch.empty_like(query)
    for num_tokens in range(GRANULE, len(heads) + 1, GRANULE):
        lens = (num_tokens,)
        for rows in find_prompts(kv_cache_layer, heads.dtype, lens, lens):
            if rows:
                attend_prompt(output, query, key, value, rows, scale=1.0)
