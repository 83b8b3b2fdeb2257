"""Write a step's keys and values into the paged KV cache."""

import torch


def write_kv(
    key: torch.Tensor, value: torch.Tensor, kv_cache_layer: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Scatter this step's keys and values into one layer of the KV cache, in place.

    cache[slot // block_size, 0 | 1, slot % block_size] = key | value

    key, value:     [num_tokens, num_kv_heads, head_dim]
    kv_cache_layer: [num_blocks, 2, block_size, num_kv_heads, head_dim], a view into the cache of all layers
    slot_mapping:   [num_tokens] int64, block_id * block_size + offset; -1 = padding, skipped
    Source: the block layout of PagedAttention (https://arxiv.org/abs/2309.06180), section 4.
    """
    rows = (slot_mapping >= 0).nonzero().squeeze(1)
    if len(rows) < len(slot_mapping):
        slot_mapping, key, value = slot_mapping[rows], key[rows], value[rows]
    write_kv_rows(key, value, kv_cache_layer, *locate_slots(slot_mapping, kv_cache_layer.shape[2]))


def locate_slots(slot_mapping: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Block ids and offsets of slots without padding, both [num_tokens]: the same for every layer of a step."""
    block_ids = torch.div(slot_mapping, block_size, rounding_mode="floor")
    return block_ids, slot_mapping - block_ids * block_size


def write_kv_rows(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache_layer: torch.Tensor,
    block_ids: torch.Tensor,
    offsets: torch.Tensor,
) -> None:
    """`write_kv` after `locate_slots`."""
    kv_cache_layer[:, 0].index_put_((block_ids, offsets), key.to(kv_cache_layer.dtype))
    kv_cache_layer[:, 1].index_put_((block_ids, offsets), value.to(kv_cache_layer.dtype))


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
