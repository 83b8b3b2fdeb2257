"""Linear layers for one to four tokens on a GPU, where nothing but the speed of reading the weight counts.

Each thread keeps several independent 16-byte loads of the weight in flight and multiplies in ordinary float32
arithmetic: a matrix unit would leave all but a few of its rows empty. `small_m_linear` takes over for more tokens.
"""
# Triton's kernels: untyped arguments, constexprs in capitals.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment"
# ruff: noqa: N806

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from octavo_kernels.launch import CompileExample, cdiv
from octavo_kernels.pdl import PDL_VARIANTS, launch_next, pdl_options, wait_for_previous

MAX_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Launch:
    """How the weight is cut; `linear_choice` holds what was measured for each.

    block_n, block_k: rows of the weight for a program, even, and columns that it takes at a time, both powers of two.
                      A thread keeps block_n * block_k / (32 num_warps) elements in flight while it multiplies as many;
                      with fewer than 16 bytes of each row, the hidden states take a detour through shared memory
    """

    block_n: int
    block_k: int
    num_warps: int


def reference(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, is_gated: bool = False
) -> torch.Tensor:
    """`gemv` and `small_m_linear` in float32, by their formula."""
    output = hidden.float() @ weight.float().T
    if bias is not None:
        output += bias.float()
    if not is_gated:
        return output
    gate, up = output.chunk(2, dim=1)
    return gate * torch.sigmoid(gate) * up


@triton.jit
def weight_rows(block, out_features, BLOCK_N: tl.constexpr, IS_GATED: tl.constexpr):
    """[BLOCK_N] int64, the rows of the weight that a block of programs reads.

    Gated, rows of the gate and of the projection beside it alternate, so that both of a pair are at hand. Past the end
    stand rows near it: they are read again instead of masking each load, and what they give is not stored.
    """
    index = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    index = tl.minimum(index, out_features - 1)
    if IS_GATED:
        index = index // 2 + (index % 2) * (out_features // 2)
    return index


@triton.jit
def silu_times(gate, up):
    """silu(gate) * up in float32."""
    return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def _dot_rows(weight, hidden, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, VECTOR: tl.constexpr):
    """[BLOCK_N, BLOCK_K] times [BLOCK_K], summed over the columns of one load only: within a thread."""
    products = weight.to(tl.float32) * hidden.to(tl.float32)[None, :]
    return tl.sum(tl.reshape(products, [BLOCK_N, BLOCK_K // VECTOR, VECTOR]), axis=2)  # [BLOCK_N, BLOCK_K / VECTOR]


@triton.jit
def _gemv_kernel(
    output_ptr,
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    out_features,
    in_features,
    hidden_row_stride,
    weight_row_stride,
    NUM_TOKENS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One program per BLOCK_N rows of the weight, for all tokens, accumulating in float32.

    The tile after the one being multiplied is already on its way, the first one before the kernels ahead have ended. To
    fetch more of the weight by then, into the L2 cache, takes more from those kernels than it gives.
    """
    VECTOR: tl.constexpr = 128 // weight_ptr.dtype.element_ty.primitive_bitwidth
    launch_next(USE_PDL)
    block = tl.program_id(0)
    rows = weight_rows(block, out_features, BLOCK_N, IS_GATED)
    columns = tl.arange(0, BLOCK_K)
    weight_ptrs = weight_ptr + rows[:, None] * weight_row_stride + columns[None, :]  # [BLOCK_N, BLOCK_K]
    if IS_EVEN_K:
        weight = tl.load(weight_ptrs, eviction_policy="evict_first")
    else:
        weight = tl.load(weight_ptrs, mask=columns[None, :] < in_features, other=0.0, eviction_policy="evict_first")
    wait_for_previous(USE_PDL)
    sums = ()
    for _ in tl.static_range(NUM_TOKENS):
        sums = sums + (tl.zeros([BLOCK_N, BLOCK_K // VECTOR], tl.float32),)
    for start in range(0, in_features, BLOCK_K):
        following = start + BLOCK_K
        next_mask = (columns < in_features - following)[None, :]
        if IS_EVEN_K:
            next_mask = following < in_features
        next_weight = tl.load(weight_ptrs + following, mask=next_mask, other=0.0, eviction_policy="evict_first")
        next_sums = ()
        for token in tl.static_range(NUM_TOKENS):
            hidden_ptrs = hidden_ptr + token * hidden_row_stride + start + columns
            if IS_EVEN_K:
                hidden = tl.load(hidden_ptrs, eviction_policy="evict_last")
            else:
                hidden_mask = columns < in_features - start
                hidden = tl.load(hidden_ptrs, mask=hidden_mask, other=0.0, eviction_policy="evict_last")
            next_sums = next_sums + (sums[token] + _dot_rows(weight, hidden, BLOCK_N, BLOCK_K, VECTOR),)
        sums = next_sums
        weight = next_weight
    outputs = block.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    for token in tl.static_range(NUM_TOKENS):
        result = tl.sum(sums[token], axis=1)  # [BLOCK_N]
        if HAS_BIAS:
            result += tl.load(bias_ptr + rows).to(tl.float32)
        if IS_GATED:
            gate, up = tl.split(tl.reshape(result, [BLOCK_N // 2, 2]))
            pairs = block.to(tl.int64) * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
            half = out_features // 2
            gated = silu_times(gate, up).to(output_ptr.dtype.element_ty)
            tl.store(output_ptr + token * half + pairs, gated, mask=pairs < half)
        else:
            result = result.to(output_ptr.dtype.element_ty)
            tl.store(output_ptr + token * out_features + outputs, result, mask=outputs < out_features)


def gemv(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, launch: Launch, *, is_gated: bool = False
) -> torch.Tensor:
    """y = x W^T + b, or silu(gate) * up where y holds both side by side, for at most MAX_TOKENS tokens.

    hidden: [num_tokens, in_features], rows contiguous
    weight: [out_features, in_features], contiguous, of the type of `hidden`
    bias:   [out_features], contiguous, of the same type, or None
    Returns [num_tokens, out_features], gated [num_tokens, out_features / 2], contiguous, in the type of `hidden`.
    Raises ValueError if the arguments do not fit or there are too many tokens.
    """
    check_linear_arguments(hidden, weight, bias, MAX_TOKENS, is_gated=is_gated)
    (num_tokens, in_features), out_features = hidden.shape, weight.shape[0]
    output = hidden.new_empty(num_tokens, out_features // 2 if is_gated else out_features)
    _gemv_kernel[(cdiv(out_features, launch.block_n),)](
        output,
        hidden,
        weight,
        weight if bias is None else bias,
        out_features,
        in_features,
        hidden.stride(0),
        weight.stride(0),
        NUM_TOKENS=num_tokens,
        HAS_BIAS=bias is not None,
        IS_GATED=is_gated,
        IS_EVEN_K=in_features % launch.block_k == 0,
        BLOCK_N=launch.block_n,
        BLOCK_K=launch.block_k,
        num_warps=launch.num_warps,
        num_stages=1,
        **pdl_options(hidden.device),
    )
    return output


def check_linear_arguments(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, max_tokens: int, *, is_gated: bool
) -> None:
    """What a linear layer for few tokens asks of its arguments, see `gemv`. Raises ValueError."""
    if hidden.ndim != 2 or hidden.stride(1) != 1 or not 0 < hidden.shape[0] <= max_tokens:
        raise ValueError(f"{tuple(hidden.shape)} with strides {hidden.stride()} is not 1 to {max_tokens} rows")
    if not weight.is_contiguous() or weight.shape[1:] != hidden.shape[1:] or weight.dtype != hidden.dtype:
        raise ValueError(
            f"weight {tuple(weight.shape)} {weight.dtype} does not fit hidden {tuple(hidden.shape)} {hidden.dtype}"
        )
    if is_gated and weight.shape[0] % 2:
        raise ValueError(f"a gate and a projection do not make {weight.shape[0]} rows")
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != weight.dtype or not bias.is_contiguous()):
        raise ValueError(
            f"bias {tuple(bias.shape)} {bias.dtype} does not fit weight {tuple(weight.shape)} {weight.dtype}"
        )


def compile_example(
    variant: str, launch: Launch, num_tokens: int, *, is_gated: bool, is_even_k: bool, has_bias: bool
) -> CompileExample:
    """The kernel of one launch, see `linear.compile_examples`. is_even_k: no tile of columns is a partial one"""
    pointers = dict.fromkeys(("output_ptr", "hidden_ptr", "weight_ptr", "bias_ptr"), "*bf16")
    numbers = dict.fromkeys(("out_features", "in_features", "hidden_row_stride", "weight_row_stride"), "i32")
    words = [f"gemv n{launch.block_n} k{launch.block_k} {launch.num_warps} warps {num_tokens} tokens"]
    words += [*["gated"] * is_gated, *["partial"] * (not is_even_k), *["with bias"] * has_bias]
    return CompileExample(
        name=" ".join(words),
        function=_gemv_kernel,
        signature=pointers | numbers,
        constexprs={
            "NUM_TOKENS": num_tokens,
            "HAS_BIAS": has_bias,
            "IS_GATED": is_gated,
            "IS_EVEN_K": is_even_k,
            "BLOCK_N": launch.block_n,
            "BLOCK_K": launch.block_k,
            "USE_PDL": variant in PDL_VARIANTS,
        },
        num_warps=launch.num_warps,
        num_stages=1,
    )
