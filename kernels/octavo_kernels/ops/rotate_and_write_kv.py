"""What happens to queries, keys and values between their projection and attention, in one pass over them.

The heads of queries and keys are normalised where a model does that, then rotated, and keys and values are written to
the paged KV cache.
"""
# Triton's kernels: untyped arguments, constexprs in capitals.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import functools
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
from octavo_kernels.ops.kv_write import FLOAT8_MAX, KvRows, check_cache, write_kv_rows
from octavo_kernels.ops.rms_norm import rms_norm
from octavo_kernels.ops.rotary import RopeScaling, apply_rotary_, rotary_cos_sin, rotary_frequencies
from octavo_kernels.pdl import PDL_VARIANTS, begin, pdl_options


@dataclass(frozen=True, slots=True)
class Launch:
    """block_heads: heads of one token that one program handles."""

    block_heads: int = 8
    num_warps: int = 2


LAUNCH: Mapping[str, Launch] = dict.fromkeys(VARIANTS, Launch())

_FLOAT8_MAX = tl.constexpr(FLOAT8_MAX)


def rotate_and_write_kv(
    heads: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    kv_cache_layer: torch.Tensor,
    kv_rows: KvRows,
    *,
    q_norm_weight: torch.Tensor | None = None,
    k_norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    interleaved: bool = False,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Normalise and rotate queries and keys in place, then write keys and values to their slots of the cache.

    heads:          [num_tokens, num_heads + 2 * num_kv_heads, head_dim], contiguous: queries, keys and values as one
                    projection makes them
    cos, sin:       [num_tokens, 1, rotary_dim] from `rotary_cos_sin`, rotary_dim <= head_dim; None: no rotation
    kv_cache_layer: [num_blocks, 2, block_size, num_kv_heads, head_dim], a view into the cache of all layers
    kv_rows:        from `locate_rows`; padding is not written
    q_norm_weight, k_norm_weight: [head_dim], both or neither: RMS normalisation of each head, as in Qwen3
    interleaved:    rotated pairs are neighbours (GPT-J), not half a head apart (GPT-NeoX)
    k_scale, v_scale: what keys and values are divided by, where the cache is float8_e4m3fn
    Raises ValueError if the arguments do not fit and, on a GPU, if head_dim is odd.
    Sources: RoFormer (https://arxiv.org/abs/2104.09864); Qwen3 (https://arxiv.org/abs/2505.09388), QK-Norm.
    """
    if runs_triton(heads):
        rotate_and_write_kv_triton(
            heads, num_heads, num_kv_heads, cos, sin, kv_cache_layer, kv_rows.slots,
            q_norm_weight=q_norm_weight, k_norm_weight=k_norm_weight, eps=eps, interleaved=interleaved,
            k_scale=k_scale, v_scale=v_scale,
        )  # fmt: skip
        return
    _check(heads, num_heads, num_kv_heads, cos, sin, q_norm_weight, k_norm_weight)
    num_rotated = num_heads + num_kv_heads
    query, key, value = heads[:, :num_heads], heads[:, num_heads:num_rotated], heads[:, num_rotated:]
    if q_norm_weight is not None and k_norm_weight is not None:
        query.copy_(rms_norm(query, q_norm_weight, eps))
        key.copy_(rms_norm(key, k_norm_weight, eps))
    if cos is not None and sin is not None:
        apply_rotary_(heads, num_rotated, cos, sin, interleaved=interleaved)
    write_kv_rows(key, value, kv_cache_layer, kv_rows, k_scale=k_scale, v_scale=v_scale)


@triton.jit
def _rotate_and_write_kv_kernel(
    heads_ptr, cos_ptr, sin_ptr, q_norm_weight_ptr, k_norm_weight_ptr, cache_ptr, slots_ptr, eps, k_scale, v_scale,
    cache_block_stride, cache_kind_stride, cache_slot_stride, cache_head_stride,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    NUM_PAIRS: tl.constexpr, NUM_REST: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_PAIRS: tl.constexpr, BLOCK_REST: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """One program per token and BLOCK_HEADS of its heads of any kind, in float32.

    A head is NUM_PAIRS first halves of pairs, as many second halves, and NUM_REST dimensions that are not rotated.
    """
    begin(USE_PDL)
    token = tl.program_id(0).to(tl.int64)
    heads = (tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[:, None]  # [BLOCK_HEADS, 1]
    is_head = heads < NUM_HEADS + 2 * NUM_KV_HEADS
    is_query = heads < NUM_HEADS
    is_value = heads >= NUM_HEADS + NUM_KV_HEADS
    head_ptrs = heads_ptr + (token * (NUM_HEADS + 2 * NUM_KV_HEADS) + heads) * HEAD_DIM

    pairs = tl.arange(0, BLOCK_PAIRS)[None, :]  # [1, BLOCK_PAIRS]
    pair_mask = is_head & (pairs < NUM_PAIRS)
    if INTERLEAVED:
        first_dims, second_dims = 2 * pairs, 2 * pairs + 1
    else:
        first_dims, second_dims = pairs, pairs + NUM_PAIRS
    first = tl.load(head_ptrs + first_dims, pair_mask, other=0.0).to(tl.float32)  # [BLOCK_HEADS, BLOCK_PAIRS]
    second = tl.load(head_ptrs + second_dims, pair_mask, other=0.0).to(tl.float32)  # [BLOCK_HEADS, BLOCK_PAIRS]
    if NUM_REST > 0:
        rest_dims = 2 * NUM_PAIRS + tl.arange(0, BLOCK_REST)[None, :]  # [1, BLOCK_REST]
        rest_mask = is_head & (rest_dims < HEAD_DIM)
        rest = tl.load(head_ptrs + rest_dims, rest_mask, other=0.0).to(tl.float32)  # [BLOCK_HEADS, BLOCK_REST]
    # Several threads hold the same element of a small tile: none may overwrite what another has yet to load.
    tl.debug_barrier()

    if HAS_NORM:
        squares = tl.sum(first * first + second * second, axis=1, keep_dims=True)  # [BLOCK_HEADS, 1]
        if NUM_REST > 0:
            squares += tl.sum(rest * rest, axis=1, keep_dims=True)
        scale = tl.where(is_value, 1.0, tl.rsqrt(squares / HEAD_DIM + eps))
        first *= scale * _norm_weight(q_norm_weight_ptr, k_norm_weight_ptr, first_dims, is_query, is_value, HEAD_DIM)
        second *= scale * _norm_weight(q_norm_weight_ptr, k_norm_weight_ptr, second_dims, is_query, is_value, HEAD_DIM)
        if NUM_REST > 0:
            rest *= scale * _norm_weight(q_norm_weight_ptr, k_norm_weight_ptr, rest_dims, is_query, is_value, HEAD_DIM)

    if HAS_ROTARY:
        angles = token * 2 * NUM_PAIRS + pairs
        cos = tl.load(cos_ptr + angles, pairs < NUM_PAIRS, other=1.0).to(tl.float32)  # [1, BLOCK_PAIRS]
        # The first half of the sine is negated.
        sin = tl.load(sin_ptr + angles + NUM_PAIRS, pairs < NUM_PAIRS, other=0.0).to(tl.float32)  # [1, BLOCK_PAIRS]
        cos, sin = tl.where(is_value, 1.0, cos), tl.where(is_value, 0.0, sin)
        first, second = first * cos - second * sin, second * cos + first * sin

    if HAS_NORM or HAS_ROTARY:
        changed = pair_mask & (heads < NUM_HEADS + NUM_KV_HEADS)
        tl.store(head_ptrs + first_dims, first.to(heads_ptr.dtype.element_ty), changed)
        tl.store(head_ptrs + second_dims, second.to(heads_ptr.dtype.element_ty), changed)
    if HAS_NORM and NUM_REST > 0:
        changed = rest_mask & (heads < NUM_HEADS + NUM_KV_HEADS)
        tl.store(head_ptrs + rest_dims, rest.to(heads_ptr.dtype.element_ty), changed)

    slot = tl.load(slots_ptr + token).to(tl.int64)
    is_stored = (slot >= 0) & (heads >= NUM_HEADS)
    row_ptr = cache_ptr + slot // BLOCK_SIZE * cache_block_stride + slot % BLOCK_SIZE * cache_slot_stride
    kv_heads = heads - NUM_HEADS - tl.where(is_value, NUM_KV_HEADS, 0)
    cache_ptrs = row_ptr + tl.where(is_value, cache_kind_stride, 0) + kv_heads.to(tl.int64) * cache_head_stride
    kv_scale = tl.where(is_value, v_scale, k_scale)
    tl.store(cache_ptrs + first_dims, _cached(first, kv_scale, cache_ptr), pair_mask & is_stored)
    tl.store(cache_ptrs + second_dims, _cached(second, kv_scale, cache_ptr), pair_mask & is_stored)
    if NUM_REST > 0:
        tl.store(cache_ptrs + rest_dims, _cached(rest, kv_scale, cache_ptr), rest_mask & is_stored)


@triton.jit
def _cached(x, scale, cache_ptr):
    """float32 `x` as the cache stores it: rounded to its type, and for float8 divided by `scale` and clamped first."""
    if cache_ptr.dtype.element_ty == tl.float8e4nv:
        x = tl.clamp(x / scale, -_FLOAT8_MAX, _FLOAT8_MAX, propagate_nan=tl.PropagateNan.ALL)
    return x.to(cache_ptr.dtype.element_ty)


@triton.jit
def _norm_weight(q_norm_weight_ptr, k_norm_weight_ptr, dims, is_query, is_value, HEAD_DIM: tl.constexpr):
    """What each head's dimensions are multiplied by: the queries' weight, the keys', or 1 for values."""
    query_weight = tl.load(q_norm_weight_ptr + dims, dims < HEAD_DIM, other=0.0).to(tl.float32)
    key_weight = tl.load(k_norm_weight_ptr + dims, dims < HEAD_DIM, other=0.0).to(tl.float32)
    return tl.where(is_query, query_weight, tl.where(is_value, 1.0, key_weight))  # [BLOCK_HEADS, dims]


def rotate_and_write_kv_triton(
    heads: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    kv_cache_layer: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    q_norm_weight: torch.Tensor | None = None,
    k_norm_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    interleaved: bool = False,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """`rotate_and_write_kv` by the Triton kernel, in one launch."""
    _check(heads, num_heads, num_kv_heads, cos, sin, q_norm_weight, k_norm_weight)
    num_tokens, _, head_dim = heads.shape
    if head_dim % 2:
        raise ValueError(f"the kernel takes heads of an even size, not {head_dim}")
    check_cache(kv_cache_layer, slot_mapping, num_tokens, num_kv_heads, head_dim)
    launch = LAUNCH[variant_of(heads.device)]
    grid = (num_tokens, cdiv(num_heads + 2 * num_kv_heads, launch.block_heads))
    _rotate_and_write_kv_kernel[grid](
        heads, _or(cos, heads), _or(sin, heads), _or(q_norm_weight, heads), _or(k_norm_weight, heads),
        kv_cache_layer, slot_mapping, eps, k_scale, v_scale, *kv_cache_layer.stride()[:4],
        NUM_HEADS=num_heads, NUM_KV_HEADS=num_kv_heads, BLOCK_SIZE=kv_cache_layer.shape[2],
        HAS_NORM=q_norm_weight is not None, HAS_ROTARY=cos is not None, INTERLEAVED=interleaved,
        BLOCK_HEADS=launch.block_heads, **_split_head(head_dim, head_dim if cos is None else cos.shape[-1]),
        num_warps=launch.num_warps, num_stages=1, **pdl_options(heads.device),
    )  # fmt: skip


def _or(tensor: torch.Tensor | None, stand_in: torch.Tensor) -> torch.Tensor:
    """A kernel takes no None; the stand-in is not read."""
    return stand_in if tensor is None else tensor


@functools.cache
def _split_head(head_dim: int, rotary_dim: int) -> dict[str, int]:
    """The constexprs that say which dimensions of a head form pairs."""
    num_pairs, num_rest = rotary_dim // 2, head_dim - rotary_dim
    return {
        "HEAD_DIM": head_dim,
        "NUM_PAIRS": num_pairs,
        "NUM_REST": num_rest,
        "BLOCK_PAIRS": next_power_of_2(num_pairs),
        "BLOCK_REST": next_power_of_2(num_rest) if num_rest else 1,
    }


def _check(
    heads: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    q_norm_weight: torch.Tensor | None,
    k_norm_weight: torch.Tensor | None,
) -> None:
    num_tokens, num_all, head_dim = heads.shape
    if num_all != num_heads + 2 * num_kv_heads or not heads.is_contiguous():
        raise ValueError(f"heads {tuple(heads.shape)} are not {num_heads} + 2 * {num_kv_heads} contiguous ones")
    if (cos is None) != (sin is None) or (q_norm_weight is None) != (k_norm_weight is None):
        raise ValueError("cosine and sine come together, and so do the two norms' weights")
    for table in (cos, sin):
        if table is not None and not (table.is_contiguous() and _is_table(table, num_tokens, head_dim)):
            raise ValueError(f"rotary table {tuple(table.shape)} does not fit {tuple(heads.shape)}")
    if cos is not None and sin is not None and cos.shape != sin.shape:
        raise ValueError(f"rotary table {tuple(sin.shape)} does not fit {tuple(cos.shape)}")
    for weight in (q_norm_weight, k_norm_weight):
        if weight is not None and (weight.shape != (head_dim,) or not weight.is_contiguous()):
            raise ValueError(f"norm weight {tuple(weight.shape)} does not fit {tuple(heads.shape)}")


def _is_table(table: torch.Tensor, num_tokens: int, head_dim: int) -> bool:
    rotary_dim = table.shape[-1]
    return table.shape == (num_tokens, 1, rotary_dim) and rotary_dim % 2 == 0 and 0 < rotary_dim <= head_dim


def example_inputs(
    num_tokens: int,
    *,
    num_heads: int = 6,
    num_kv_heads: int = 2,
    head_dim: int = 16,
    rotary_dim: int = 16,
    block_size: int = 4,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Heads, cosine, sine, one layer of a cache of NaN with two layers, and slots, every fifth one padding."""
    heads = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim)
    frequencies, factor = rotary_frequencies(rotary_dim, 10_000.0, RopeScaling())
    cos, sin = rotary_cos_sin(torch.arange(num_tokens) * 17, frequencies, factor, torch.float32)
    num_blocks = -(-num_tokens // block_size) + 1
    cache = torch.full((num_blocks, 2, 2, block_size, num_kv_heads, head_dim), torch.nan)
    slots = torch.randperm(num_blocks * block_size)[:num_tokens]
    slots[4::5] = -1
    return heads, cos, sin, cache[:, 1], slots


def compile_examples(variant: str) -> list[CompileExample]:
    """Llama's heads, Qwen3's with norms, Phi's of 80 rotated in part, and a cache of float8 where the GPU has it."""
    examples = [
        _compile_example(variant, "Llama", 32, 8, 128, 128, norm=False),
        _compile_example(variant, "Qwen3", 32, 8, 128, 128, norm=True),
        _compile_example(variant, "Phi", 32, 32, 80, 32, norm=False),
        _compile_example(variant, "Gemma", 8, 4, 256, 256, norm=True),
        _compile_example(variant, "GPT-J", 16, 16, 256, 64, norm=False, interleaved=True),
    ]
    if variant in FLOAT8_VARIANTS:
        examples.append(_compile_example(variant, "Qwen3", 32, 8, 128, 128, norm=True, cache_type="fp8e4nv"))
    return examples


def _compile_example(
    variant: str,
    model: str,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    *,
    norm: bool,
    interleaved: bool = False,
    cache_type: str = "bf16",
) -> CompileExample:
    launch = LAUNCH[variant]
    pointers = {
        "heads_ptr": "*bf16",
        "cos_ptr": "*fp32",
        "sin_ptr": "*fp32",
        "q_norm_weight_ptr": "*bf16",
        "k_norm_weight_ptr": "*bf16",
        "cache_ptr": f"*{cache_type}",
        "slots_ptr": "*i64",
    }
    strides = ("cache_block_stride", "cache_kind_stride", "cache_slot_stride", "cache_head_stride")
    scalars = dict.fromkeys(("eps", "k_scale", "v_scale"), "fp32") | dict.fromkeys(strides, "i32")
    return CompileExample(
        name=f"rotate_and_write_kv {model} heads={num_heads}/{num_kv_heads} head_dim={head_dim} cache={cache_type}",
        function=_rotate_and_write_kv_kernel,
        signature=pointers | scalars,
        constexprs={
            "NUM_HEADS": num_heads,
            "NUM_KV_HEADS": num_kv_heads,
            "BLOCK_SIZE": 16,
            "HAS_NORM": norm,
            "HAS_ROTARY": True,
            "INTERLEAVED": interleaved,
            "BLOCK_HEADS": launch.block_heads,
            **_split_head(head_dim, rotary_dim),
            "USE_PDL": variant in PDL_VARIANTS,
        },
        num_warps=launch.num_warps,
        num_stages=1,
    )
