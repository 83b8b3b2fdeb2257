"""What the attention kernels for GPUs share: one tile of keys and values, read through the block table."""
# Triton's kernels: untyped arguments, constexprs in capitals.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from octavo_kernels.launch import FLOAT8_VARIANTS, LOG2_E, next_power_of_2
from octavo_kernels.ops.attention_metadata import Scoring
from octavo_kernels.pdl import prefetch_l2

MIN_BLOCK_SIZE = 8
MIN_TILE, MAX_TILE = 16, 128
_TRITON_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8e4nv",
}
CACHE_DTYPES = frozenset(_TRITON_TYPES)
QUERY_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def tile_tokens(head_dim: int, cache_dtype: torch.dtype, tile_bytes: int) -> int:
    """Tokens of a tile whose keys of one head take about `tile_bytes`, 8-bit ones once widened; a power of two."""
    bytes_per_token: int = next_power_of_2(head_dim) * max(cache_dtype.itemsize, 2)
    return min(max(tile_bytes // bytes_per_token, MIN_TILE), MAX_TILE)


def score_factors(scoring: Scoring) -> tuple[float, float]:
    """(score_scale, softcap) as `attend_tile` takes them: they include the change from exp to exp2."""
    scale = scoring.scale * scoring.k_scale
    to_exp2 = LOG2_E.value
    return (scale / scoring.softcap, scoring.softcap * to_exp2) if scoring.softcap else (scale * to_exp2, 0.0)


def check_cache(kv_cache_layer: torch.Tensor, dtype: torch.dtype) -> None:
    """What the kernels ask of a cache layer and of the queries' type. Raises ValueError."""
    if kv_cache_layer.ndim != 5 or kv_cache_layer.shape[1] != 2 or kv_cache_layer.stride(4) != 1:
        raise ValueError(
            "attention takes a cache [num_blocks, 2, block_size, num_kv_heads, head_dim] with contiguous heads, not "
            f"{tuple(kv_cache_layer.shape)} with strides {kv_cache_layer.stride()}"
        )
    block_size = kv_cache_layer.shape[2]
    if block_size < MIN_BLOCK_SIZE or block_size & (block_size - 1):
        raise ValueError(f"block size {block_size} is not a power of two from {MIN_BLOCK_SIZE} on")
    if kv_cache_layer.dtype not in CACHE_DTYPES or dtype not in QUERY_DTYPES:
        raise ValueError(f"attention has no kernel for {dtype} queries over a {kv_cache_layer.dtype} cache")


def argument_types(names: Sequence[str], query_dtype: torch.dtype, cache_dtype: torch.dtype) -> dict[str, str]:
    """The types of a kernel's arguments by their names, as Triton writes them; constexprs may be among them."""
    query_ptr, cache_ptr = f"*{_TRITON_TYPES[query_dtype]}", f"*{_TRITON_TYPES[cache_dtype]}"
    known = {"output_ptr": query_ptr, "query_ptr": query_ptr, "kv_ptr": cache_ptr}
    known |= dict.fromkeys(("query_starts_ptr", "query_ends_ptr"), "*i64")
    known |= dict.fromkeys(("slopes_ptr", "partials_ptr", "partial_sums_ptr"), "*fp32")
    known |= dict.fromkeys(("score_scale", "softcap", "v_scale"), "fp32")
    return {name: known.get(name, "*i32" if name.endswith("_ptr") else "i32") for name in names}


def compiled_cache_dtypes(variant: str) -> list[torch.dtype]:
    """Types of the cache to show to a compiler."""
    return [torch.bfloat16, torch.float8_e4m3fn] if variant in FLOAT8_VARIANTS else [torch.bfloat16]


@triton.jit
def load_blocks(table_ptr, tile, first_token, end_token, TILE: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """[TILE] the block of each token of a tile, 0 for tokens outside.

    Loops load the blocks of the next tile before they attend to this one: keys could not be fetched ahead of their use
    if their addresses were not known before.
    """
    tokens = tile * TILE + tl.arange(0, TILE)
    return tl.load(table_ptr + tokens // BLOCK_SIZE, (tokens >= first_token) & (tokens < end_token), other=0)


@triton.jit
def prefetch_tile(
    kv_ptr, blocks, kv_block_stride, kv_value_stride, kv_token_stride,
    HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Call a tile's keys and values into the L2 cache, without waiting. Arguments as for `attend_tile`."""
    row_bytes: tl.constexpr = HEAD_DIM * kv_ptr.dtype.element_ty.primitive_bitwidth // 8
    if row_bytes % 16 == 0:
        slots = tl.arange(0, TILE) % BLOCK_SIZE
        key_ptrs = kv_ptr + blocks.to(tl.int64) * kv_block_stride + slots * kv_token_stride  # [TILE]
        prefetch_l2(tl.join(key_ptrs, key_ptrs + kv_value_stride), row_bytes)


@triton.jit
def attend_tile(
    accumulator, row_sum, row_max, query, positions, slopes,
    kv_ptr, blocks, tile, first_token, end_token,
    kv_block_stride, kv_value_stride, kv_token_stride,
    score_scale, softcap, window,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    IS_MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Add the keys and values of one tile to a running softmax in base 2; returns (accumulator, row_sum, row_max).

    accumulator [BLOCK_M, BLOCK_D], row_sum and row_max [BLOCK_M]: float32; row_max is -inf before the first key
    query: [BLOCK_M, BLOCK_D]; positions, slopes: [BLOCK_M], of the query tokens and their heads
    kv_ptr: of the KV head; blocks: [TILE], from `load_blocks`
    first_token, end_token: tokens outside may lie in slots that were never written, even if no query token sees them
    IS_MASKED: whether some query token may not see some key of the tile, or the tile exceeds first_token or end_token
    Source: online softmax of FlashAttention-2 (https://arxiv.org/abs/2307.08691), algorithm 1.
    """
    tokens = tile * TILE + tl.arange(0, TILE)  # [TILE]
    columns = tl.arange(0, BLOCK_D)
    if IS_MASKED:
        is_stored = (tokens >= first_token) & (tokens < end_token)
        mask = is_stored[:, None] & (columns < HEAD_DIM)[None, :]
    else:
        mask = (columns < HEAD_DIM)[None, :]
    rows = blocks.to(tl.int64) * kv_block_stride + (tokens % BLOCK_SIZE) * kv_token_stride
    key_ptrs = kv_ptr + rows[:, None] + columns[None, :]  # [TILE, BLOCK_D]
    if IS_MASKED or HEAD_DIM != BLOCK_D:
        # Values of hidden keys are set to zero, not only weighted with it: a slot that was never written may hold NaN.
        keys = tl.load(key_ptrs, mask, other=0.0).to(query.dtype)
        values = tl.load(key_ptrs + kv_value_stride, mask, other=0.0).to(query.dtype)
    else:
        keys = tl.load(key_ptrs).to(query.dtype)
        values = tl.load(key_ptrs + kv_value_stride).to(query.dtype)

    scores = tl.dot(query, tl.trans(keys), input_precision="ieee")  # [BLOCK_M, TILE]
    # Where scores are only scaled, which keeps their order, the scale becomes part of the exponent's multiply-add.
    unit = score_scale
    if HAS_SOFTCAP:
        scores = softcap * (1.0 - 2.0 / (1.0 + tl.exp2(scores * (score_scale * (2 * LOG2_E)))))  # softcap * tanh
        unit = 1.0
    elif HAS_ALIBI:
        scores *= score_scale
        unit = 1.0
    if HAS_ALIBI:
        scores += slopes[:, None] * (tokens[None, :] - positions[:, None]).to(tl.float32)
    if IS_MASKED:
        is_seen = (tokens[None, :] <= positions[:, None]) & is_stored[None, :]
        if HAS_WINDOW:
            is_seen &= tokens[None, :] > positions[:, None] - window
        scores = tl.where(is_seen, scores, float("-inf"))

    new_max = tl.maximum(row_max, tl.max(scores, axis=1) * unit)
    shift = new_max
    if IS_MASKED:
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # a row that has seen no key yet
    weights = tl.exp2(scores * unit - shift[:, None])
    correction = tl.exp2(row_max - shift)
    row_sum = row_sum * correction + tl.sum(weights, axis=1)
    accumulator = accumulator * correction[:, None]
    accumulator = tl.dot(weights.to(query.dtype), values, accumulator, input_precision="ieee")
    return accumulator, row_sum, new_max
