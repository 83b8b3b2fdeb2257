"""Paged attention of chunks on a GPU: many query tokens per request, behind a context of any length.

A tile of queries is a run of tokens of one request, with all query heads of one KV head: each key is read once for all
of them, and a run is short, so that little is computed only to be masked. Which tile belongs to which request is
planned on the device, once per step; how many tiles there are is known on the host.
Source: FlashAttention-2 (https://arxiv.org/abs/2307.08691).
"""
# Triton's kernels: untyped arguments, constexprs in capitals.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from octavo_kernels.launch import LOG2_E, CompileExample, cdiv, next_power_of_2, variant_of
from octavo_kernels.ops.attention_metadata import AttentionMetadata, Scoring, check_query
from octavo_kernels.ops.paged_tile import (
    argument_types,
    attend_tile,
    check_cache,
    compiled_cache_dtypes,
    load_blocks,
    score_factors,
    tile_tokens,
)

# The planner compares some tiles of queries with all chunks, of no more elements together than registers hold.
PLANNED_TILES, PLANNED_ELEMENTS = 32, 8192
# Rows of a tile of queries: of one warp's multiplication, of one warp group's, and the device's own for long chunks.
SHORT_ROWS, MEDIUM_ROWS = 16, 64


@dataclass(frozen=True, slots=True)
class Launch:
    """How queries and keys are cut.

    block_m:     rows (tokens x heads) of a tile of queries; num_warps: for so many
    tile_bytes:  keys of one tile
    short_warps: for tiles of SHORT_ROWS
    """

    block_m: int
    tile_bytes: int
    num_warps: int
    num_stages: int
    short_warps: int = 2


_LARGE = Launch(128, 16_384, num_warps=8, num_stages=3, short_warps=4)
_SMALL = Launch(64, 8_192, num_warps=4, num_stages=2)
_STAGED = replace(_SMALL, num_stages=3)
# Measured on Hopper alone; elsewhere what the compiler finds registers for.
LAUNCH: Mapping[str, Launch] = {
    "hopper": _LARGE,
    "grace-hopper": _LARGE,
    "blackwell": _LARGE,
    "blackwell-workstation": _STAGED,
    "ampere": Launch(128, 8_192, num_warps=8, num_stages=3, short_warps=4),
    "ada": _SMALL,
    "generic": replace(_STAGED, short_warps=4),
}
# Heads of at most so many dimensions: too little work for eight warps. Measured on an H100: 1.4 times the wide one's.
NARROW_HEAD_DIM = 64
_NARROW = Launch(128, 8_192, num_warps=4, num_stages=3, short_warps=1)
NARROW_LAUNCH: Mapping[str, Launch] = {
    **LAUNCH,
    "hopper": _NARROW,
    "grace-hopper": _NARROW,
    "blackwell": _NARROW,
    "blackwell-workstation": replace(_STAGED, short_warps=1),
}
# Heads of more dimensions than these need more threads to hold their tiles, or smaller ones.
WIDE_HEAD_DIM = 128
_WIDE = Launch(64, 8_192, num_warps=8, num_stages=2, short_warps=4)
WIDE_LAUNCH: Mapping[str, Launch] = {
    **LAUNCH, **dict.fromkeys(("blackwell-workstation", "ampere", "ada", "generic"), _WIDE)
}  # fmt: skip


def launch_for(variant: str, head_dim: int) -> Launch:
    """A variant's launch parameters for heads of this size."""
    if head_dim <= NARROW_HEAD_DIM:
        return NARROW_LAUNCH[variant]
    return (WIDE_LAUNCH if head_dim > WIDE_HEAD_DIM else LAUNCH)[variant]


@dataclass(frozen=True, slots=True, eq=False)
class QueryTiles:
    """seqs: [num_tiles] int32, the chunk of each tile; indices: [num_tiles] int32, the tile's place in its chunk."""

    seqs: torch.Tensor
    indices: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class ChunkPlan:
    """The chunks of a step.

    block_tables, seq_lens: as in `AttentionMetadata`, of the chunks; window: 0 for none
    query_starts, query_ends: [num_chunks], rows of each; an empty one has no tile
    max_query_len: of the longest chunk
    tiles_of:      the tiles of queries for a number of tokens per tile, planned when first asked for
    tile:          tokens of a tile of keys
    """

    block_tables: torch.Tensor
    seq_lens: torch.Tensor
    query_starts: torch.Tensor
    query_ends: torch.Tensor
    window: int
    max_query_len: int
    tiles_of: Callable[[int], QueryTiles]
    tile: int
    launch: Launch


def plan_chunks(
    metadata: AttentionMetadata,
    kv_cache_layer: torch.Tensor,
    dtype: torch.dtype,
    sliding_window: int | None = None,
    launch: Launch | None = None,
    num_done: Sequence[int] | None = None,
) -> ChunkPlan:
    """Plan the requests of a step after its decodes, of which there is at least one.

    kv_cache_layer: any layer's; dtype: the query's; launch: instead of the device's own
    num_done: rows at the beginning of each chunk that are left out
    Raises ValueError for a cache or a type that the kernels do not take.
    """
    check_cache(kv_cache_layer, dtype)
    launch = launch or launch_for(variant_of(kv_cache_layer.device), kv_cache_layer.shape[-1])
    if dtype == torch.float32:
        launch = _launch_float32(launch)
    starts = metadata.query_start_loc[metadata.num_decodes : -1]
    ends = metadata.query_start_loc[metadata.num_decodes + 1 :]
    query_lens = metadata.query_lens[metadata.num_decodes :]
    max_tokens = metadata.max_chunk_tokens
    if num_done is not None:
        # From memory that is not page-locked, the host might wait for the device.
        host = torch.tensor(num_done, dtype=starts.dtype, pin_memory=starts.is_cuda)
        starts = starts + host.to(starts.device, non_blocking=True)
        query_lens = tuple(query_len - done for query_len, done in zip(query_lens, num_done, strict=True))

    def plan_tiles(tokens_per_tile: int) -> QueryTiles:
        if max_tokens is None:
            num_tiles = sum(-(-query_len // tokens_per_tile) for query_len in query_lens)
        else:
            num_tiles = max_tokens // tokens_per_tile + len(starts)
        return _plan_tiles(starts, ends, num_tiles, tokens_per_tile)

    return ChunkPlan(
        metadata.block_tables[metadata.num_decodes :],
        metadata.seq_lens[metadata.num_decodes :],
        starts,
        ends,
        sliding_window or 0,
        max(query_lens) if max_tokens is None else max_tokens,
        functools.cache(plan_tiles),
        tile_tokens(kv_cache_layer.shape[4], kv_cache_layer.dtype, launch.tile_bytes),
        launch,
    )


def _launch_float32(launch: Launch) -> Launch:
    """Without tensor cores a product of large tiles would not fit into registers."""
    return Launch(min(launch.block_m, 32), launch.tile_bytes // 2, num_warps=4, num_stages=1)


def _plan_tiles(starts: torch.Tensor, ends: torch.Tensor, num_tiles: int, tokens_per_tile: int) -> QueryTiles:
    seqs, indices = torch.empty(2, num_tiles, dtype=torch.int32, device=starts.device)
    block_seqs = next_power_of_2(max(len(starts), 32))
    block_tiles = min(PLANNED_TILES, max(1, PLANNED_ELEMENTS // block_seqs))
    _plan_chunks_kernel[(cdiv(num_tiles, block_tiles),)](
        seqs, indices, starts, ends, len(starts), num_tiles, tokens_per_tile,
        BLOCK_SEQS=block_seqs, BLOCK_TILES=block_tiles, num_warps=4, num_stages=1,
    )  # fmt: skip
    return QueryTiles(seqs, indices)


def run_chunks(
    output: torch.Tensor, query: torch.Tensor, kv_cache_layer: torch.Tensor, plan: ChunkPlan, scoring: Scoring
) -> None:
    """Attention of the rows of the plan's chunks, into the same rows of `output`.

    output, query:  [num_tokens, num_heads, head_dim], each token of the output contiguous
    kv_cache_layer: [num_blocks, 2, block_size, num_kv_heads, head_dim]
    Raises ValueError if the shapes do not fit.
    """
    check_query(query, kv_cache_layer, scoring)
    _, _, block_size, num_kv_heads, head_dim = kv_cache_layer.shape
    group_size = query.shape[1] // num_kv_heads
    block_m, num_warps = _rows(plan, group_size, head_dim)
    tokens_per_tile = block_m // group_size
    tiles = plan.tiles_of(tokens_per_tile)
    score_scale, softcap = score_factors(scoring)
    _chunk_kernel[(num_kv_heads, len(tiles.seqs))](
        output, query, kv_cache_layer, plan.block_tables, plan.seq_lens, plan.query_starts, plan.query_ends,
        tiles.seqs, tiles.indices, query if scoring.alibi_slopes is None else scoring.alibi_slopes,
        output.stride(0), query.stride(0), query.stride(1), kv_cache_layer.stride(0), kv_cache_layer.stride(1),
        kv_cache_layer.stride(2), kv_cache_layer.stride(3), plan.block_tables.stride(0),
        len(plan.seq_lens), plan.window, score_scale, softcap, scoring.v_scale,
        **_constexprs(group_size, head_dim, block_size, plan.tile, block_m),
        HAS_WINDOW=plan.window > 0, HAS_ALIBI=scoring.alibi_slopes is not None, HAS_SOFTCAP=scoring.softcap > 0,
        num_warps=num_warps, num_stages=plan.launch.num_stages,
    )  # fmt: skip


def _rows(plan: ChunkPlan, group_size: int, head_dim: int) -> tuple[int, int]:
    """(BLOCK_M, warps): the smallest tile of queries that holds the longest chunk, or else the device's own."""
    at_least = next_power_of_2(group_size)
    needed = plan.max_query_len * group_size
    if needed <= SHORT_ROWS:
        return SHORT_ROWS, plan.launch.short_warps
    if needed <= MEDIUM_ROWS and plan.launch.block_m > MEDIUM_ROWS:
        return MEDIUM_ROWS, 4
    return max(plan.launch.block_m, at_least), plan.launch.num_warps


@functools.cache
def _constexprs(group_size: int, head_dim: int, block_size: int, tile: int, block_m: int) -> dict[str, object]:
    return {
        "GROUP_SIZE": group_size,
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": block_size,
        "TILE": tile,
        "BLOCK_M": block_m,
        "BLOCK_D": max(16, next_power_of_2(head_dim)),
    }


@triton.jit(
    do_not_specialize=["num_seqs", "num_tiles", "tokens_per_tile"],
    do_not_specialize_on_alignment=["indices_ptr", "query_starts_ptr", "query_ends_ptr"],
)
def _plan_chunks_kernel(
    seqs_ptr, indices_ptr, query_starts_ptr, query_ends_ptr, num_seqs, num_tiles, tokens_per_tile,
    BLOCK_SEQS: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_TILES tiles, each going through all chunks. Tiles that are too many belong to no chunk."""
    seqs = tl.arange(0, BLOCK_SEQS)
    is_seq = seqs < num_seqs
    starts = tl.load(query_starts_ptr + seqs, is_seq, other=0)
    ends = tl.load(query_ends_ptr + seqs, is_seq, other=0)
    num_tiles_of = tl.cdiv((ends - starts).to(tl.int32), tokens_per_tile)  # [BLOCK_SEQS]
    tile_ends = tl.cumsum(num_tiles_of, axis=0)
    tiles = tl.program_id(0) * BLOCK_TILES + tl.arange(0, BLOCK_TILES)
    is_before = (tile_ends[None, :] <= tiles[:, None]) & is_seq[None, :]  # [BLOCK_TILES, BLOCK_SEQS]
    first_tiles = tl.sum(tl.where(is_before, num_tiles_of[None, :], 0), axis=1)
    tl.store(seqs_ptr + tiles, tl.sum(is_before.to(tl.int32), axis=1), tiles < num_tiles)
    tl.store(indices_ptr + tiles, tiles - first_tiles, tiles < num_tiles)


@triton.jit(
    do_not_specialize=["table_stride", "num_seqs", "window"],
    do_not_specialize_on_alignment=[
        "block_tables_ptr",
        "seq_lens_ptr",
        "query_starts_ptr",
        "query_ends_ptr",
        "tile_indices_ptr",
    ],
)
def _chunk_kernel(
    output_ptr, query_ptr, kv_ptr, block_tables_ptr, seq_lens_ptr, query_starts_ptr, query_ends_ptr,
    tile_seqs_ptr, tile_indices_ptr, slopes_ptr,
    output_token_stride, query_token_stride, query_head_stride, kv_block_stride, kv_value_stride,
    kv_token_stride, kv_head_stride, table_stride,
    num_seqs, window, score_scale, softcap, v_scale,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One program per (KV head, tile of queries), last tiles first, since they see the most; float32 accumulation."""
    kv_head = tl.program_id(0)
    query_tile = tl.num_programs(1) - 1 - tl.program_id(1)
    seq = tl.load(tile_seqs_ptr + query_tile)
    if seq >= num_seqs:
        return
    first_query = tl.load(tile_indices_ptr + query_tile) * (BLOCK_M // GROUP_SIZE)
    first_row = tl.load(query_starts_ptr + seq).to(tl.int32)
    query_len = tl.load(query_ends_ptr + seq).to(tl.int32) - first_row
    seq_len = tl.load(seq_lens_ptr + seq).to(tl.int32)

    members = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    tokens_per_tile: tl.constexpr = BLOCK_M // GROUP_SIZE
    last_query = tl.minimum(first_query + tokens_per_tile, query_len) - 1
    queries = first_query + members // GROUP_SIZE
    is_row = (queries <= last_query) & (members < tokens_per_tile * GROUP_SIZE)
    mask = is_row[:, None] & (columns < HEAD_DIM)[None, :]
    heads = kv_head * GROUP_SIZE + members % GROUP_SIZE
    rows = first_row + queries
    query_ptrs = (
        query_ptr + (rows.to(tl.int64) * query_token_stride + heads * query_head_stride)[:, None] + columns[None, :]
    )
    query = tl.load(query_ptrs, mask, other=0.0)  # [BLOCK_M, BLOCK_D]
    slopes = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if HAS_ALIBI:
        slopes = tl.load(slopes_ptr + heads) * LOG2_E

    # Rows beyond the tile's last query repeat its position: they cost no tile, and see something.
    first_position = seq_len - query_len + first_query
    last_position = seq_len - query_len + last_query
    positions = tl.minimum(seq_len - query_len + queries, last_position)  # [BLOCK_M]
    first_token = 0
    if HAS_WINDOW:
        first_token = tl.maximum(first_position - window + 1, 0)
    # Tiles of keys: 0, those that the window cuts off for some queries; 1, those that all see, without a mask; 2, those
    # in some query's future.
    first_tile = first_token // TILE
    end_tile = last_position // TILE + 1
    whole_tile = first_tile
    if HAS_WINDOW:
        whole_tile = tl.minimum(tl.cdiv(tl.maximum(last_position - window + 1, 0), TILE), end_tile)
    cut_tile = tl.maximum((first_position + 1) // TILE, whole_tile)

    kv_ptr += kv_head.to(tl.int64) * kv_head_stride
    table_ptr = block_tables_ptr + seq.to(tl.int64) * table_stride
    end_token = last_position + 1
    accumulator = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
    row_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    row_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    blocks = load_blocks(table_ptr, first_tile, first_token, end_token, TILE, BLOCK_SIZE)
    for part in tl.static_range(0 if HAS_WINDOW else 1, 3):
        first = first_tile if part == 0 else whole_tile if part == 1 else cut_tile
        end = whole_tile if part == 0 else cut_tile if part == 1 else end_tile
        for tile in range(first, end):
            next_blocks = load_blocks(table_ptr, tile + 1, first_token, end_token, TILE, BLOCK_SIZE)
            accumulator, row_sum, row_max = attend_tile(
                accumulator, row_sum, row_max, query, positions, slopes, kv_ptr, blocks, tile, first_token, end_token,
                kv_block_stride, kv_value_stride, kv_token_stride, score_scale, softcap, window,
                HEAD_DIM, BLOCK_D, BLOCK_SIZE, TILE,
                IS_MASKED=part != 1, HAS_WINDOW=HAS_WINDOW and part != 1, HAS_ALIBI=HAS_ALIBI, HAS_SOFTCAP=HAS_SOFTCAP,
            )  # fmt: skip
            blocks = next_blocks

    result = accumulator * (v_scale / row_sum)[:, None]
    output_ptrs = output_ptr + (rows.to(tl.int64) * output_token_stride + heads * HEAD_DIM)[:, None] + columns[None, :]
    tl.store(output_ptrs, result.to(output_ptr.dtype.element_ty), mask)


def compile_examples(variant: str) -> list[CompileExample]:
    """Heads of every usual size, over each type of cache, for long chunks and short ones."""
    return [
        _compile_example(launch_for(variant, head_dim), head_dim, cache_dtype, block_m)
        for head_dim in (64, 80, 128, 256)
        for cache_dtype in compiled_cache_dtypes(variant)
        for block_m in (SHORT_ROWS, launch_for(variant, head_dim).block_m)
    ]


def _compile_example(launch: Launch, head_dim: int, cache_dtype: torch.dtype, block_m: int) -> CompileExample:
    tile = tile_tokens(head_dim, cache_dtype, launch.tile_bytes)
    flags = {"HAS_WINDOW": False, "HAS_ALIBI": False, "HAS_SOFTCAP": False}
    return CompileExample(
        name=f"paged_prefill rows={block_m} head_dim={head_dim} {cache_dtype}",
        function=_chunk_kernel,
        signature=argument_types(_chunk_kernel.arg_names, torch.bfloat16, cache_dtype),
        constexprs=_constexprs(4, head_dim, 16, tile, block_m) | flags,
        num_warps=launch.num_warps if block_m == launch.block_m else launch.short_warps,
        num_stages=launch.num_stages,
    )
