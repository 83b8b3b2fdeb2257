"""Write a step's keys and values into the paged KV cache on a CPU; on a GPU `rotate_and_write_kv` does it itself."""

from dataclasses import dataclass
from typing import Final

import torch

from octavo_kernels.launch import runs_triton
from octavo_kernels.native import kernels_for

# The largest number of float8_e4m3fn, the one type of cache whose values are divided by a scale and clamped.
FLOAT8_MAX: Final = 448.0


def write_kv(key: torch.Tensor, value: torch.Tensor, kv_cache_layer: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """Scatter this step's keys and values into one layer of the KV cache, in place.

    cache[slot // block_size, 0 | 1, slot % block_size] = key | value

    key, value:     [num_tokens, num_kv_heads, head_dim]
    kv_cache_layer: [num_blocks, 2, block_size, num_kv_heads, head_dim], a view into the cache of all layers
    slot_mapping:   [num_tokens] int64, block_id * block_size + offset; -1 = padding, skipped
    Raises ValueError if the arguments do not fit.
    Source: the block layout of PagedAttention (https://arxiv.org/abs/2309.06180), section 4.
    """
    write_kv_rows(key, value, kv_cache_layer, locate_rows(slot_mapping, kv_cache_layer))


@dataclass(frozen=True, slots=True, eq=False)
class CpuRows:
    """A step's slots as rows of one token each of a layer.

    keys, values: [num_stored] rows; tokens: which of the step's tokens are stored, None for all
    """

    keys: torch.Tensor
    values: torch.Tensor
    tokens: torch.Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class KvRows:
    """Where a step's keys and values go, the same for every layer.

    slots: the step's slot mapping; cpu: None on a GPU, whose kernels read the slots themselves
    """

    slots: torch.Tensor
    cpu: CpuRows | None


def locate_rows(slot_mapping: torch.Tensor, kv_cache_layer: torch.Tensor) -> KvRows:
    """The rows of a step's slots; -1 is left out. kv_cache_layer: any layer's. Never waits for a GPU."""
    return KvRows(slot_mapping, None if runs_triton(slot_mapping) else _locate_cpu_rows(slot_mapping, kv_cache_layer))


def _locate_cpu_rows(slot_mapping: torch.Tensor, kv_cache_layer: torch.Tensor) -> CpuRows:
    tokens, slot_mapping = None, slot_mapping.long()
    if bool((slot_mapping < 0).any()):
        tokens = (slot_mapping >= 0).nonzero().squeeze(1)
        slot_mapping = slot_mapping[tokens]
    block_size = kv_cache_layer.shape[2]
    block_ids = torch.div(slot_mapping, block_size, rounding_mode="floor")
    rows_per_block = kv_cache_layer.stride(0) // kv_cache_layer.stride(2)
    keys = block_ids * rows_per_block + (slot_mapping - block_ids * block_size)
    return CpuRows(keys, keys + block_size, tokens)


def write_kv_rows(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache_layer: torch.Tensor,
    rows: KvRows,
    *,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """`write_kv` after `locate_rows`, on a CPU.

    k_scale, v_scale: what keys and values are divided by, where the cache is float8_e4m3fn
    """
    assert rows.cpu is not None, "a GPU's kernels write keys and values themselves"
    if key.shape != value.shape:
        raise ValueError(f"keys {tuple(key.shape)} and values {tuple(value.shape)} differ")
    check_cache(kv_cache_layer, rows.slots, *key.shape)
    check_blocks(kv_cache_layer)
    kernels = kernels_for(key, value, kv_cache_layer)
    is_dense = key.stride() == value.stride() and key[:1].is_contiguous()
    if kernels and is_dense and rows.cpu.tokens is None:
        kernels.write_kv(key, value, kv_cache_layer, rows.cpu.keys, rows.cpu.values)
        return
    if rows.cpu.tokens is not None:
        key, value = key[rows.cpu.tokens], value[rows.cpu.tokens]
    num_blocks, _, block_size, *_ = kv_cache_layer.shape
    width = kv_cache_layer.stride(2)
    num_rows = (num_blocks - 1) * (kv_cache_layer.stride(0) // width) + 2 * block_size
    # As a contiguous matrix, whatever lies between two blocks of this layer: torch copies rows of one much faster.
    matrix = kv_cache_layer.as_strided((num_rows, width), (width, 1))
    _copy_rows(matrix, rows.cpu.keys, key.reshape(-1, width), k_scale)
    _copy_rows(matrix, rows.cpu.values, value.reshape(-1, width), v_scale)


def _copy_rows(matrix: torch.Tensor, rows: torch.Tensor, heads: torch.Tensor, scale: float) -> None:
    if matrix.dtype != torch.float8_e4m3fn:
        matrix.index_copy_(0, rows, heads.to(matrix.dtype))
        return
    stored = (heads.float() / scale).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(matrix.dtype)
    # As bytes, since torch copies no rows of this type.
    matrix.view(torch.uint8).index_copy_(0, rows, stored.view(torch.uint8))


def reference(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache_layer: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """`write_kv`, one token after the other."""
    is_float8, block_size = kv_cache_layer.dtype == torch.float8_e4m3fn, kv_cache_layer.shape[2]
    for token, slot in enumerate(slot_mapping.tolist()):
        if slot < 0:
            continue
        for kind, heads, scale in ((0, key, k_scale), (1, value, v_scale)):
            stored = heads[token].float()
            if is_float8:
                stored = (stored / scale).clamp(-FLOAT8_MAX, FLOAT8_MAX)
            kv_cache_layer[slot // block_size, kind, slot % block_size] = stored.to(kv_cache_layer.dtype)


def check_cache(
    kv_cache_layer: torch.Tensor, slot_mapping: torch.Tensor, num_tokens: int, num_kv_heads: int, head_dim: int
) -> None:
    """What whoever writes to the cache asks of it. Raises ValueError."""
    num_blocks, kinds, block_size, *head_shape = kv_cache_layer.shape
    if kinds != 2 or head_shape != [num_kv_heads, head_dim] or kv_cache_layer.stride(4) != 1:
        raise ValueError(
            f"a cache of {num_blocks} blocks of {block_size} slots for heads [{num_kv_heads}, {head_dim}] is "
            f"[{num_blocks}, 2, {block_size}, {num_kv_heads}, {head_dim}], not {tuple(kv_cache_layer.shape)}"
        )
    if slot_mapping.shape != (num_tokens,) or not slot_mapping.is_contiguous():
        raise ValueError(f"slot mapping {tuple(slot_mapping.shape)} does not fit {num_tokens} tokens")


def check_blocks(kv_cache_layer: torch.Tensor) -> None:
    """What a CPU asks of the cache: the keys of a block, then its values, without gaps. Raises ValueError."""
    if not kv_cache_layer[:1].is_contiguous() or kv_cache_layer.stride(0) % kv_cache_layer.stride(1):
        raise ValueError(
            f"each block is one piece on a CPU, not {tuple(kv_cache_layer.shape)} with strides "
            f"{kv_cache_layer.stride()}"
        )


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
