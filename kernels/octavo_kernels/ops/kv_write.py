"""Write a step's keys and values into the paged KV cache."""
# Triton's kernels: untyped arguments, constexprs in capitals.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from octavo_kernels.launch import (
    FLOAT8_VARIANTS,
    VARIANTS,
    CompileExample,
    cdiv,
    next_power_of_2,
    runs_triton,
    variant_of,
)
from octavo_kernels.native import kernels_for

# The largest number of float8_e4m3fn, the one type of cache whose values are divided by a scale and clamped.
FLOAT8_MAX = tl.constexpr(448.0)


@dataclass(frozen=True, slots=True)
class Launch:
    """block_heads: KV heads of one token that one program writes."""

    block_heads: int = 8
    num_warps: int = 4


LAUNCH: Mapping[str, Launch] = dict.fromkeys(VARIANTS, Launch())


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
    tokens = None
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
    """`write_kv` after `locate_rows`. Heads of a token lie together.

    k_scale, v_scale: what keys and values are divided by, where the cache is float8_e4m3fn
    """
    if rows.cpu is None:
        write_kv_triton(key, value, kv_cache_layer, rows.slots, k_scale=k_scale, v_scale=v_scale)
        return
    kernels = kernels_for(key, value, kv_cache_layer)
    if kernels and rows.cpu.tokens is None and key.stride() == value.stride() and key[0].is_contiguous():
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
    stored = (heads.float() / scale).clamp(-FLOAT8_MAX.value, FLOAT8_MAX.value).to(matrix.dtype)
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
                stored = (stored / scale).clamp(-FLOAT8_MAX.value, FLOAT8_MAX.value)
            kv_cache_layer[slot // block_size, kind, slot % block_size] = stored.to(kv_cache_layer.dtype)


@triton.jit
def cached(x, scale, cache_ptr):
    """float32 `x` as the cache stores it: rounded to its type, and for float8 divided by `scale` and clamped first."""
    if cache_ptr.dtype.element_ty == tl.float8e4nv:
        x = tl.clamp(x / scale, -FLOAT8_MAX, FLOAT8_MAX, propagate_nan=tl.PropagateNan.ALL)
    return x.to(cache_ptr.dtype.element_ty)


@triton.jit
def _write_kv_kernel(
    key_ptr, value_ptr, cache_ptr, slots_ptr, k_scale, v_scale,
    key_token_stride, key_head_stride, value_token_stride, value_head_stride,
    cache_block_stride, cache_kind_stride, cache_slot_stride, cache_head_stride,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """One program per token and BLOCK_HEADS of its KV heads."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    if slot < 0:
        return
    heads = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)).to(tl.int64)[:, None]
    dims = tl.arange(0, BLOCK_DIM)[None, :]
    mask = (heads < NUM_HEADS) & (dims < HEAD_DIM)
    key_ptrs = key_ptr + token * key_token_stride + heads * key_head_stride + dims
    value_ptrs = value_ptr + token * value_token_stride + heads * value_head_stride + dims
    key = tl.load(key_ptrs, mask).to(tl.float32)  # [BLOCK_HEADS, BLOCK_DIM]
    value = tl.load(value_ptrs, mask).to(tl.float32)  # [BLOCK_HEADS, BLOCK_DIM]
    row_ptr = cache_ptr + slot // BLOCK_SIZE * cache_block_stride + slot % BLOCK_SIZE * cache_slot_stride
    cache_ptrs = row_ptr + heads * cache_head_stride + dims
    tl.store(cache_ptrs, cached(key, k_scale, cache_ptr), mask)
    tl.store(cache_ptrs + cache_kind_stride, cached(value, v_scale, cache_ptr), mask)


def write_kv_triton(
    key: torch.Tensor,
    value: torch.Tensor,
    kv_cache_layer: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """`write_kv` by the Triton kernel. Raises ValueError if the arguments do not fit."""
    num_tokens, num_heads, head_dim = key.shape
    if value.shape != key.shape or key.stride(2) != 1 or value.stride(2) != 1:
        raise ValueError(f"keys {tuple(key.shape)} and values {tuple(value.shape)} differ, or their heads are strided")
    check_cache(kv_cache_layer, slot_mapping, num_tokens, num_heads, head_dim)
    launch = LAUNCH[variant_of(key.device)]
    block_heads = min(launch.block_heads, next_power_of_2(num_heads))
    _write_kv_kernel[(num_tokens, cdiv(num_heads, block_heads))](
        key, value, kv_cache_layer, slot_mapping, k_scale, v_scale,
        *key.stride()[:2], *value.stride()[:2], *kv_cache_layer.stride()[:4],
        NUM_HEADS=num_heads, HEAD_DIM=head_dim, BLOCK_SIZE=kv_cache_layer.shape[2],
        BLOCK_HEADS=block_heads, BLOCK_DIM=next_power_of_2(head_dim),
        num_warps=launch.num_warps, num_stages=1,
    )  # fmt: skip


def check_cache(
    kv_cache_layer: torch.Tensor, slot_mapping: torch.Tensor, num_tokens: int, num_kv_heads: int, head_dim: int
) -> None:
    """What every kernel that writes to the cache asks of it. Raises ValueError."""
    num_blocks, kinds, block_size, *head_shape = kv_cache_layer.shape
    if kinds != 2 or head_shape != [num_kv_heads, head_dim] or kv_cache_layer.stride(4) != 1:
        raise ValueError(
            f"a cache of {num_blocks} blocks of {block_size} slots for heads [{num_kv_heads}, {head_dim}] is "
            f"[{num_blocks}, 2, {block_size}, {num_kv_heads}, {head_dim}], not {tuple(kv_cache_layer.shape)}"
        )
    if slot_mapping.shape != (num_tokens,) or not slot_mapping.is_contiguous():
        raise ValueError(f"slot mapping {tuple(slot_mapping.shape)} does not fit {num_tokens} tokens")


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


CACHE_STRIDES = ("cache_block_stride", "cache_kind_stride", "cache_slot_stride", "cache_head_stride")


def compile_examples(variant: str) -> list[CompileExample]:
    """Usual heads in bfloat16, into a cache of the same type and, where the GPU has it, of float8."""
    types = ("bf16", "fp8e4nv") if variant in FLOAT8_VARIANTS else ("bf16",)
    return [_compile_example(variant, 8, 128, cache_type) for cache_type in types] + [
        _compile_example(variant, 32, 80, "bf16")
    ]


def _compile_example(variant: str, num_heads: int, head_dim: int, cache_type: str) -> CompileExample:
    launch = LAUNCH[variant]
    pointers = {"key_ptr": "*bf16", "value_ptr": "*bf16", "cache_ptr": f"*{cache_type}", "slots_ptr": "*i64"}
    strides = ("key_token_stride", "key_head_stride", "value_token_stride", "value_head_stride", *CACHE_STRIDES)
    return CompileExample(
        name=f"write_kv num_kv_heads={num_heads} head_dim={head_dim} cache={cache_type}",
        function=_write_kv_kernel,
        signature=pointers | {"k_scale": "fp32", "v_scale": "fp32"} | dict.fromkeys(strides, "i32"),
        constexprs={
            "NUM_HEADS": num_heads,
            "HEAD_DIM": head_dim,
            "BLOCK_SIZE": 16,
            "BLOCK_HEADS": min(launch.block_heads, next_power_of_2(num_heads)),
            "BLOCK_DIM": next_power_of_2(head_dim),
        },
        num_warps=launch.num_warps,
        num_stages=1,
    )
