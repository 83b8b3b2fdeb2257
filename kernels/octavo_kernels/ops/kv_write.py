"""Write a step's keys and values into the paged KV cache."""

from dataclasses import dataclass

import torch

from octavo_kernels.native import kernels_for


def write_kv(key: torch.Tensor, value: torch.Tensor, kv_cache_layer: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Scatter this step's keys and values into one layer of the KV cache, in place.

    cache[slot // block_size, 0 | 1, slot % block_size] = key | value

    key, value:     [num_tokens, num_kv_heads, head_dim]
    kv_cache_layer: [num_blocks, 2, block_size, num_kv_heads, head_dim], a view into the cache of all layers
    slot_mapping:   [num_tokens] int64, block_id * block_size + offset; -1 = padding, skipped
    Source: the block layout of PagedAttention (https://arxiv.org/abs/2309.06180), section 4.
    """
    write_kv_rows(key, value, kv_cache_layer, locate_rows(slot_mapping, kv_cache_layer))


@dataclass(frozen=True, slots=True, eq=False)
class KvRows:
    """Where a step's keys and values go, the same for every layer, with a layer seen as rows of one token each.

    keys, values: [num_stored] rows; tokens: which of the step's tokens are stored, None for all
    """

    keys: torch.Tensor
    values: torch.Tensor
    tokens: torch.Tensor | None


def locate_rows(slot_mapping: torch.Tensor, kv_cache_layer: torch.Tensor) -> KvRows:
    """The rows of a step's slots; -1 is left out. kv_cache_layer: any layer's."""
    tokens = None
    if bool((slot_mapping < 0).any()):
        tokens = (slot_mapping >= 0).nonzero().squeeze(1)
        slot_mapping = slot_mapping[tokens]
    block_size = kv_cache_layer.shape[2]
    block_ids = torch.div(slot_mapping, block_size, rounding_mode="floor")
    rows_per_block = kv_cache_layer.stride(0) // kv_cache_layer.stride(2)
    keys = block_ids * rows_per_block + (slot_mapping - block_ids * block_size)
    return KvRows(keys, keys + block_size, tokens)


def write_kv_rows(key: torch.Tensor, value: torch.Tensor, kv_cache_layer: torch.Tensor, rows: KvRows) -> None:
    """`write_kv` after `locate_rows`. Heads of a token lie together."""
    kernels = kernels_for(key, value, kv_cache_layer)
    if kernels and rows.tokens is None and key.stride() == value.stride() and key[0].is_contiguous():
        kernels.write_kv(key, value, kv_cache_layer, rows.keys, rows.values)
        return
    if rows.tokens is not None:
        key, value = key[rows.tokens], value[rows.tokens]
    num_blocks, _, block_size, *_ = kv_cache_layer.shape
    width = kv_cache_layer.stride(2)
    num_rows = (num_blocks - 1) * (kv_cache_layer.stride(0) // width) + 2 * block_size
    # As a contiguous matrix, whatever lies between two blocks of this layer: torch copies rows of one much faster.
    matrix = kv_cache_layer.as_strided((num_rows, width), (width, 1))
    matrix.index_copy_(0, rows.keys, key.reshape(-1, width).to(matrix.dtype))
    matrix.index_copy_(0, rows.values, value.reshape(-1, width).to(matrix.dtype))


def example_inputs(
    num_tokens: int, *, num_blocks: int = 64, block_size: int = 16, num_kv_heads: int = 2, head_dim: int = 8
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments of `write_kv`: random keys and values, a cache of NaN, distinct slots, every fifth one padding."""
    key = torch.randn(num_tokens, num_kv_heads, head_dim)
    value = torch.randn(num_tokens, num_kv_heads, head_dim)
    cache = torch.full((num_blocks, 2, block_size, num_kv_heads, head_dim), torch.nan)
    slots = torch.randperm(num_blocks * block_size)[:num_tokens]
    slots[4::5] = -1
    return key, value, cache, slots
