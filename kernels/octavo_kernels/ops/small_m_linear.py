"""Linear layers for up to 64 tokens on a GPU: matrix units fed by a pipeline that reads the weight once.

The weight's rows stand where a matrix multiplication usually has its many rows, and the tokens are its few columns.
Where the weight has too few rows to give every multiprocessor work, several programs share a block of rows, each with a
part of the columns (split-K). The last of them to finish adds the parts up in their order, so that the result does not
depend on which one that was.
"""
# Triton's kernels: untyped arguments, constexprs in capitals.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from octavo_kernels.launch import CompileExample, cdiv, next_power_of_2
from octavo_kernels.ops.gemv import check_linear_arguments, silu_times, weight_rows
from octavo_kernels.pdl import PDL_VARIANTS, launch_next, pdl_options, prefetch_l2, wait_for_previous

MAX_TOKENS = 64
# A matrix unit takes no fewer.
_MIN_BLOCK_M = 16


@dataclass(frozen=True, slots=True)
class Launch:
    """How the weight is cut; `linear_choice` holds what was measured for each.

    block_n, block_k: rows of the weight for a program, even, and columns of a stage of its pipeline, powers of two
    num_splits:       programs that share a block of rows
    num_stages:       tiles of the weight in shared memory, all but one of them on their way
    """

    block_n: int
    block_k: int
    num_splits: int
    num_warps: int
    num_stages: int

    def num_arrivals(self, out_features: int) -> int:
        """Counters that the programs of a launch need, see `small_m_linear`."""
        return -(-out_features // self.block_n) if self.num_splits > 1 else 0


@triton.jit
def _add_splits(partials_ptr, tile, num_tiles, NUM_SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """[BLOCK_N, BLOCK_M], the parts of a tile added in their order, read past the L1 cache."""
    offsets = (tl.arange(0, BLOCK_N) * BLOCK_M)[:, None] + tl.arange(0, BLOCK_M)[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for split in range(NUM_SPLITS):
        part_ptr = partials_ptr + (split * num_tiles + tile).to(tl.int64) * (BLOCK_N * BLOCK_M)
        total += tl.load(part_ptr + offsets, cache_modifier=".cg")
    return total


@triton.jit
def _store_outputs(
    output_ptr,
    bias_ptr,
    sums,
    tile,
    num_tokens,
    out_features,
    HAS_BIAS: tl.constexpr,
    IS_GATED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Add the bias to sums [BLOCK_N, BLOCK_M], apply the gate, and write them."""
    if HAS_BIAS:
        rows = weight_rows(tile, out_features, BLOCK_N, IS_GATED)
        sums += tl.load(bias_ptr + rows).to(tl.float32)[:, None]
    result = tl.trans(sums)  # [BLOCK_M, BLOCK_N]
    width = out_features
    num_columns: tl.constexpr = BLOCK_N // 2 if IS_GATED else BLOCK_N
    if IS_GATED:
        gate, up = tl.split(tl.reshape(result, [BLOCK_M, BLOCK_N // 2, 2]))
        result = silu_times(gate, up)  # [BLOCK_M, BLOCK_N / 2]
        width = out_features // 2
    tokens = tl.arange(0, BLOCK_M).to(tl.int64)[:, None]
    columns = (tile.to(tl.int64) * num_columns + tl.arange(0, num_columns))[None, :]
    mask = (tokens < num_tokens) & (columns < width)
    tl.store(output_ptr + tokens * width + columns, result.to(output_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _small_m_linear_kernel(
    output_ptr,
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    partials_ptr,
    arrivals_ptr,
    num_tokens,
    out_features,
    in_features,
    hidden_row_stride,
    weight_row_stride,
    HAS_BIAS: tl.constexpr,
    IS_GATED: tl.constexpr,
    IS_EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NUM_SPLITS: tl.constexpr,
    PREFETCHED_BYTES: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """One program per (part of the columns, BLOCK_N rows of the weight), for all tokens, accumulating in float32.

    IS_EVEN_K: each part is a whole number of tiles. PREFETCHED_BYTES: of each row, while the kernel before runs
    """
    split = tl.program_id(0)
    tile = tl.program_id(1)
    steps = tl.cdiv(tl.cdiv(in_features, BLOCK_K), NUM_SPLITS)
    first = split * steps * BLOCK_K
    last = tl.minimum(first + steps * BLOCK_K, in_features)
    rows = weight_rows(tile, out_features, BLOCK_N, IS_GATED)
    tokens = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_K)
    is_token = (tokens < num_tokens)[:, None]
    weight_ptrs = weight_ptr + rows[:, None] * weight_row_stride + columns[None, :]  # [BLOCK_N, BLOCK_K]
    hidden_ptrs = hidden_ptr + tokens.to(tl.int64)[:, None] * hidden_row_stride + columns[None, :]  # [BLOCK_M, BLOCK_K]
    launch_next(USE_PDL)
    if PREFETCHED_BYTES > 0:
        prefetch_l2(weight_ptr + rows * weight_row_stride + first, PREFETCHED_BYTES)
    wait_for_previous(USE_PDL)
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for start in range(first, last, BLOCK_K):
        if IS_EVEN_K:
            weight = tl.load(weight_ptrs + start, eviction_policy="evict_first")
            hidden = tl.load(hidden_ptrs + start, mask=is_token, other=0.0, eviction_policy="evict_last")
        else:
            is_column = (columns < in_features - start)[None, :]
            weight = tl.load(weight_ptrs + start, mask=is_column, other=0.0, eviction_policy="evict_first")
            hidden = tl.load(hidden_ptrs + start, mask=is_token & is_column, other=0.0, eviction_policy="evict_last")
        sums = tl.dot(weight, tl.trans(hidden), sums, input_precision="ieee")
    if NUM_SPLITS == 1:
        _store_outputs(output_ptr, bias_ptr, sums, tile, num_tokens, out_features, HAS_BIAS, IS_GATED, BLOCK_N, BLOCK_M)
    else:
        num_tiles = tl.num_programs(1)
        offsets = (tl.arange(0, BLOCK_N) * BLOCK_M)[:, None] + tokens[None, :]
        tl.store(partials_ptr + (split * num_tiles + tile).to(tl.int64) * (BLOCK_N * BLOCK_M) + offsets, sums)
        # Every thread's part is written before the program's arrival shows.
        tl.debug_barrier()
        if tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") == NUM_SPLITS - 1:
            sums = _add_splits(partials_ptr, tile, num_tiles, NUM_SPLITS, BLOCK_N, BLOCK_M)
            _store_outputs(
                output_ptr, bias_ptr, sums, tile, num_tokens, out_features, HAS_BIAS, IS_GATED, BLOCK_N, BLOCK_M
            )
            tl.store(arrivals_ptr + tile, 0)


def small_m_linear(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    launch: Launch,
    arrivals: torch.Tensor | None = None,
    *,
    is_gated: bool = False,
) -> torch.Tensor:
    """y = x W^T + b, or silu(gate) * up where y holds both side by side, for at most MAX_TOKENS tokens.

    hidden:   [num_tokens, in_features], rows contiguous
    weight:   [out_features, in_features], contiguous, of the type of `hidden`
    bias:     [out_features], contiguous, of the same type, or None
    arrivals: int32 on the device, at least `launch.num_arrivals(out_features)`, zeros, and zeros again afterwards.
              Launches that share it must not overlap. Only with several splits
    Returns   [num_tokens, out_features], gated [num_tokens, out_features / 2], contiguous, in the type of `hidden`.
    Raises ValueError if the arguments do not fit or there are too many tokens.
    """
    check_linear_arguments(hidden, weight, bias, MAX_TOKENS, is_gated=is_gated)
    (num_tokens, in_features), out_features = hidden.shape, weight.shape[0]
    num_tiles = cdiv(out_features, launch.block_n)
    block_m = _block_m(num_tokens)
    output = hidden.new_empty(num_tokens, out_features // 2 if is_gated else out_features)
    partials = output
    if launch.num_splits > 1:
        if arrivals is None or arrivals.numel() < num_tiles or arrivals.dtype != torch.int32:
            raise ValueError(f"{launch.num_splits} splits need {num_tiles} int32 counters")
        partials = hidden.new_empty(launch.num_splits * num_tiles * launch.block_n * block_m, dtype=torch.float32)
    pdl = pdl_options(hidden.device)
    _small_m_linear_kernel[(launch.num_splits, num_tiles)](
        output,
        hidden,
        weight,
        weight if bias is None else bias,
        partials,
        partials if arrivals is None else arrivals,
        num_tokens,
        out_features,
        in_features,
        hidden.stride(0),
        weight.stride(0),
        HAS_BIAS=bias is not None,
        IS_GATED=is_gated,
        IS_EVEN_K=in_features % (launch.block_k * launch.num_splits) == 0,
        BLOCK_M=block_m,
        BLOCK_N=launch.block_n,
        BLOCK_K=launch.block_k,
        NUM_SPLITS=launch.num_splits,
        PREFETCHED_BYTES=_prefetched_bytes(weight, launch) if pdl["USE_PDL"] else 0,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        **pdl,
    )
    return output


def _block_m(num_tokens: int) -> int:
    """Columns of a matrix unit that the tokens are."""
    return max(_MIN_BLOCK_M, next_power_of_2(num_tokens))


def _prefetched_bytes(weight: torch.Tensor, launch: Launch) -> int:
    """What each part of a row has at least and a pipeline fetches before it first waits; 0 if rows are not aligned."""
    in_features = weight.shape[1]
    if in_features * weight.itemsize % 16 or weight.data_ptr() % 16:
        return 0
    num_tiles = -(-in_features // launch.block_k)
    part = -(-num_tiles // launch.num_splits) * launch.block_k
    last_part = max(in_features - (launch.num_splits - 1) * part, 0)
    return min((launch.num_stages - 1) * launch.block_k, last_part) * weight.itemsize


def compile_example(
    variant: str, launch: Launch, num_tokens: int, *, is_gated: bool, is_even_k: bool, has_bias: bool
) -> CompileExample:
    """The kernel of one launch, see `linear.compile_examples`. is_even_k: no tile of columns is a partial one"""
    pointers = dict.fromkeys(("output_ptr", "hidden_ptr", "weight_ptr", "bias_ptr"), "*bf16")
    workspace = {"partials_ptr": "*fp32", "arrivals_ptr": "*i32"}
    numbers = ("num_tokens", "out_features", "in_features", "hidden_row_stride", "weight_row_stride")
    block_m = _block_m(num_tokens)
    words = [f"small_m_linear n{launch.block_n} k{launch.block_k} x{launch.num_splits} {launch.num_warps} warps"]
    words += [f"{launch.num_stages} stages {block_m} tokens"]
    words += [*["gated"] * is_gated, *["partial"] * (not is_even_k), *["with bias"] * has_bias]
    return CompileExample(
        name=" ".join(words),
        function=_small_m_linear_kernel,
        signature=pointers | workspace | dict.fromkeys(numbers, "i32"),
        constexprs={
            "HAS_BIAS": has_bias,
            "IS_GATED": is_gated,
            "IS_EVEN_K": is_even_k,
            "BLOCK_M": block_m,
            "BLOCK_N": launch.block_n,
            "BLOCK_K": launch.block_k,
            "NUM_SPLITS": launch.num_splits,
            "PREFETCHED_BYTES": 2 * (launch.num_stages - 1) * launch.block_k if variant in PDL_VARIANTS else 0,
            "USE_PDL": variant in PDL_VARIANTS,
        },
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
