"""Paged attention of decodes on a GPU: one query token per request, the context split evenly among all multiprocessors.

Tiles of all requests, one after another, form a line that is cut into equal parts, one for each worker; every KV head
has the same workers. A worker attends to the part of each request that lies in its part. Where a request was cut, each
worker leaves a partial result, and the last of them to arrive combines them. Who attends to what is planned on the
device, once per step, so that a captured step serves any context lengths.
Sources: flash decoding (https://pytorch.org/blog/flash-decoding/), stream-K (https://arxiv.org/abs/2301.03598).
"""
# Triton's kernels: untyped arguments, constexprs in capitals.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import functools
from collections.abc import Mapping
from dataclasses import dataclass

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
    prefetch_tile,
    score_factors,
    tile_tokens,
)
from octavo_kernels.pdl import PDL_VARIANTS, begin, launch_next, pdl_options, wait_for_previous

# The planner compares a tile of workers with all requests, of no more elements than registers hold.
PLANNED_WORKERS, PLANNED_ELEMENTS = 32, 8192
# Partial results that are combined at a time, at least.
MIN_COMBINED_PARTS = 4


@dataclass(frozen=True, slots=True)
class Launch:
    """How the contexts are cut.

    tile_bytes:    keys of one tile
    min_tiles:     what a worker gets at least
    workers_per_multiprocessor: at once
    combined_elements: of partial results that are combined at a time
    holds_next_query:  whether registers are left for the query of the next request
    """

    tile_bytes: int
    min_tiles: int
    workers_per_multiprocessor: int
    num_warps: int
    num_stages: int
    combined_elements: int = 2048
    holds_next_query: bool = True


# Shared memory of a worker: 2 * tile_bytes * (num_stages - 1) and little else.
_SMALL = Launch(8_192, 2, 2, num_warps=4, num_stages=3)
LAUNCH: Mapping[str, Launch] = {
    "hopper": _SMALL,
    "grace-hopper": _SMALL,
    "blackwell": Launch(16_384, 1, 2, num_warps=4, num_stages=4),
    "blackwell-workstation": _SMALL,
    "ampere": Launch(16_384, 1, 2, num_warps=4, num_stages=3),
    "ada": _SMALL,
    "generic": _SMALL,
}
# From so many decodes on a worker has several, and each begins with a chain of reads that other workers have to hide:
# four of two warps, with tiles of 64 tokens. By the widest head that they are for.
MANY_DECODES = 64
_HOPPER_MANY = {
    64: Launch(8_192, 2, 4, num_warps=2, num_stages=3),
    128: Launch(16_384, 1, 4, num_warps=2, num_stages=2, holds_next_query=False),
}
MANY_LAUNCH: Mapping[str, Mapping[int, Launch]] = {"hopper": _HOPPER_MANY, "grace-hopper": _HOPPER_MANY}


def launch_for(variant: str, head_dim: int, cache_dtype: torch.dtype, num_decodes: int) -> Launch:
    """A variant's launch parameters for a batch of this size, whatever the contexts: a captured step serves all.

    Wide heads, and 8-bit ones that are widened, need the registers of all warps.
    """
    if num_decodes >= MANY_DECODES and cache_dtype.itemsize > 1:
        for widest, launch in MANY_LAUNCH.get(variant, {}).items():
            if head_dim <= widest:
                return launch
    return LAUNCH[variant]


@dataclass(frozen=True, slots=True, eq=False)
class DecodePlan:
    """Who attends to what in a batch of decodes.

    block_tables, seq_lens: as in `AttentionMetadata`, of the decodes; window: 0 for none
    tile_starts: [num_decodes + 1] int32, where each request's tiles begin among those of all
    first_seqs:  [num_workers] int32, the request where each worker begins
    arrivals:    [num_decodes, num_kv_heads] int32, zero between two launches
    tile:        tokens
    """

    block_tables: torch.Tensor
    seq_lens: torch.Tensor
    window: int
    tile_starts: torch.Tensor
    first_seqs: torch.Tensor
    arrivals: torch.Tensor
    tile: int
    launch: Launch


def plan_decodes(
    metadata: AttentionMetadata,
    kv_cache_layer: torch.Tensor,
    dtype: torch.dtype,
    sliding_window: int | None = None,
    launch: Launch | None = None,
) -> DecodePlan:
    """Plan the decodes of a step, by one kernel that reads the lengths on the device.

    kv_cache_layer: any layer's; dtype: the query's; launch: instead of the device's own
    Raises ValueError for a cache or a type that the kernels do not take.
    """
    check_cache(kv_cache_layer, dtype)
    device, num_decodes, num_kv_heads = kv_cache_layer.device, metadata.num_decodes, kv_cache_layer.shape[3]
    launch = launch or launch_for(variant_of(device), kv_cache_layer.shape[4], kv_cache_layer.dtype, num_decodes)
    num_workers = max(1, num_multiprocessors(device) * launch.workers_per_multiprocessor // num_kv_heads)
    seq_lens, window = metadata.seq_lens[:num_decodes], sliding_window or 0
    tile = tile_tokens(kv_cache_layer.shape[4], kv_cache_layer.dtype, launch.tile_bytes)
    tile_starts = torch.empty(num_decodes + 1, dtype=torch.int32, device=device)
    first_seqs = torch.empty(num_workers, dtype=torch.int32, device=device)
    block_seqs = next_power_of_2(max(num_decodes, 32))
    block_workers = min(PLANNED_WORKERS, max(1, PLANNED_ELEMENTS // block_seqs))
    _plan_decodes_kernel[(cdiv(num_workers, block_workers),)](
        tile_starts, first_seqs, seq_lens, num_decodes, num_workers, window, launch.min_tiles,
        TILE=tile, BLOCK_SEQS=block_seqs, BLOCK_WORKERS=block_workers, num_warps=4, num_stages=1,
        **pdl_options(device),
    )  # fmt: skip
    # Behind the plan, since it takes no part in programmatic dependent launch: it begins when the plan is written, and
    # whoever comes after it may read the plan before waiting.
    arrivals = torch.zeros(num_decodes, num_kv_heads, dtype=torch.int32, device=device)
    block_tables = metadata.block_tables[:num_decodes]
    return DecodePlan(block_tables, seq_lens, window, tile_starts, first_seqs, arrivals, tile, launch)


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Of a GPU; the interpreter, on a CPU, pretends to few, so that small examples are split."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def run_decodes(
    output: torch.Tensor, query: torch.Tensor, kv_cache_layer: torch.Tensor, plan: DecodePlan, scoring: Scoring
) -> None:
    """Attention of the first rows of a step, one per request of the plan, into the same rows of `output`.

    output, query:  [num_tokens, num_heads, head_dim], each token of the output contiguous
    kv_cache_layer: [num_blocks, 2, block_size, num_kv_heads, head_dim]
    Raises ValueError if the shapes do not fit.
    """
    check_query(query, kv_cache_layer, scoring)
    _, _, block_size, num_kv_heads, head_dim = kv_cache_layer.shape
    num_heads, num_workers = query.shape[1], len(plan.first_seqs)
    score_scale, softcap = score_factors(scoring)
    partials = torch.empty(2 * num_workers, num_heads, head_dim, dtype=torch.float32, device=query.device)
    partial_sums = torch.empty(2 * num_workers, num_heads, dtype=torch.float32, device=query.device)
    _decode_kernel[(num_kv_heads, num_workers)](
        output, query, kv_cache_layer, plan.block_tables, plan.seq_lens,
        plan.tile_starts, plan.first_seqs, plan.arrivals, partials, partial_sums,
        query if scoring.alibi_slopes is None else scoring.alibi_slopes,
        output.stride(0), query.stride(0), query.stride(1), kv_cache_layer.stride(0), kv_cache_layer.stride(1),
        kv_cache_layer.stride(2), kv_cache_layer.stride(3), plan.block_tables.stride(0),
        len(plan.seq_lens), plan.window, plan.launch.min_tiles, score_scale, softcap, scoring.v_scale,
        **_constexprs(num_heads // num_kv_heads, head_dim, block_size, plan.tile, plan.launch),
        HAS_WINDOW=plan.window > 0, HAS_ALIBI=scoring.alibi_slopes is not None, HAS_SOFTCAP=scoring.softcap > 0,
        num_warps=plan.launch.num_warps, num_stages=plan.launch.num_stages,
        **pdl_options(query.device),
    )  # fmt: skip


@functools.cache
def _constexprs(group_size: int, head_dim: int, block_size: int, tile: int, launch: Launch) -> dict[str, object]:
    block_group = min(next_power_of_2(group_size * head_dim), launch.combined_elements // MIN_COMBINED_PARTS)
    return {
        "GROUP_SIZE": group_size,
        "HEAD_DIM": head_dim,
        "BLOCK_SIZE": block_size,
        "TILE": tile,
        "BLOCK_M": max(16, next_power_of_2(group_size)),
        "BLOCK_D": max(16, next_power_of_2(head_dim)),
        "BLOCK_GROUP": block_group,
        "BLOCK_PARTS": launch.combined_elements // block_group,
        "HOLDS_NEXT_QUERY": launch.holds_next_query,
    }


@triton.jit
def _first_token(seq_lens, window):
    """The earliest token that the last one sees."""
    return tl.where(window > 0, tl.maximum(seq_lens - window, 0), 0)


@triton.jit
def _tiles_per_worker(num_tiles, num_workers, min_tiles):
    return tl.maximum(tl.cdiv(num_tiles, num_workers), min_tiles)


@triton.jit(
    do_not_specialize=["num_decodes", "num_workers", "window", "min_tiles"],
    do_not_specialize_on_alignment=["seq_lens_ptr"],
)
def _plan_decodes_kernel(
    tile_starts_ptr, first_seqs_ptr, seq_lens_ptr, num_decodes, num_workers, window, min_tiles,
    TILE: tl.constexpr, BLOCK_SEQS: tl.constexpr, BLOCK_WORKERS: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_WORKERS workers, each going through all requests.

    A request has at least one tile, so that padding is answered too; one that is not there has none.
    """
    begin(USE_PDL)
    seqs = tl.arange(0, BLOCK_SEQS)
    is_seq = seqs < num_decodes
    seq_lens = tl.load(seq_lens_ptr + seqs, is_seq, other=0).to(tl.int32)  # [BLOCK_SEQS]
    num_tiles = tl.cdiv(seq_lens, TILE) - _first_token(seq_lens, window) // TILE
    num_tiles = tl.where(is_seq & (seq_lens >= 0), tl.maximum(num_tiles, 1), 0)
    tile_ends = tl.cumsum(num_tiles, axis=0)
    per_worker = _tiles_per_worker(tl.sum(num_tiles, axis=0), num_workers, min_tiles)

    workers = tl.program_id(0) * BLOCK_WORKERS + tl.arange(0, BLOCK_WORKERS)
    is_before = (tile_ends[None, :] <= (workers * per_worker)[:, None]) & is_seq[None, :]  # [BLOCK_WORKERS, BLOCK_SEQS]
    tl.store(first_seqs_ptr + workers, tl.sum(is_before.to(tl.int32), axis=1), workers < num_workers)

    if tl.program_id(0) == 0:
        tl.store(tile_starts_ptr, 0)
        tl.store(tile_starts_ptr + 1 + seqs, tile_ends, is_seq)


@triton.jit(
    do_not_specialize=["table_stride", "num_decodes", "window", "min_tiles"],
    do_not_specialize_on_alignment=["block_tables_ptr", "seq_lens_ptr"],
)
def _decode_kernel(
    output_ptr, query_ptr, kv_ptr, block_tables_ptr, seq_lens_ptr,
    tile_starts_ptr, first_seqs_ptr, arrivals_ptr, partials_ptr, partial_sums_ptr, slopes_ptr,
    output_token_stride, query_token_stride, query_head_stride, kv_block_stride, kv_value_stride,
    kv_token_stride, kv_head_stride, table_stride,
    num_decodes, window, min_tiles, score_scale, softcap, v_scale,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_GROUP: tl.constexpr,
    BLOCK_PARTS: tl.constexpr, HOLDS_NEXT_QUERY: tl.constexpr,
    HAS_WINDOW: tl.constexpr, HAS_ALIBI: tl.constexpr, HAS_SOFTCAP: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """One program per (KV head, worker), neighbours in the grid reading neighbours in memory; float32 accumulation.

    The query heads of a KV head are the rows of one tile, so that each key is read once for all of them. The plan is
    read, and the first tile called into the L2 cache, while the kernels ahead still make the query: they have not begun
    before the plan was made, and a row of the cache that they write is called as well as any other.
    """
    launch_next(USE_PDL)
    kv_head, worker = tl.program_id(0), tl.program_id(1)
    num_kv_heads, num_workers = tl.num_programs(0), tl.num_programs(1)
    num_tiles = tl.load(tile_starts_ptr + num_decodes)
    seq = tl.load(first_seqs_ptr + worker)
    per_worker = _tiles_per_worker(num_tiles, num_workers, min_tiles)
    tile = worker * per_worker
    last_tile = tl.minimum(tile + per_worker, num_tiles)
    seq_start, seq_end, seq_len = _load_request(tile_starts_ptr, seq_lens_ptr, seq, num_decodes)
    first_token = _first_token(seq_len, window)
    first_tile = tile - seq_start + first_token // TILE
    table_ptr = block_tables_ptr + seq.to(tl.int64) * table_stride
    blocks = load_blocks(table_ptr, first_tile, first_token, seq_len, TILE, BLOCK_SIZE)
    kv_ptr += kv_head.to(tl.int64) * kv_head_stride
    if USE_PDL and BLOCK_D <= 128 and kv_ptr.dtype.element_ty.primitive_bitwidth == 16:  # others lack the registers
        prefetch_tile(kv_ptr, blocks, kv_block_stride, kv_value_stride, kv_token_stride, HEAD_DIM, BLOCK_SIZE, TILE)
    wait_for_previous(USE_PDL)

    members = tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_D)
    mask = (members < GROUP_SIZE)[:, None] & (columns < HEAD_DIM)[None, :]
    heads = kv_head * GROUP_SIZE + members
    slopes = tl.zeros((BLOCK_M,), dtype=tl.float32)
    if HAS_ALIBI:
        slopes = tl.load(slopes_ptr + heads, members < GROUP_SIZE, other=0.0) * LOG2_E

    # What a request begins with is read while the worker still attends to the one before.
    query_ptrs = query_ptr + heads[:, None] * query_head_stride + columns[None, :]
    if HOLDS_NEXT_QUERY:
        query = _load_query(query_ptrs, seq, num_decodes, query_token_stride, mask)
    while tile < last_tile:
        next_start, next_end, next_len = _load_request(tile_starts_ptr, seq_lens_ptr, seq + 1, num_decodes)
        if HOLDS_NEXT_QUERY:
            next_query = _load_query(query_ptrs, seq + 1, num_decodes, query_token_stride, mask)
        else:
            query = _load_query(query_ptrs, seq, num_decodes, query_token_stride, mask)
        next_first = _first_token(next_len, window)
        next_table_ptr = table_ptr + table_stride
        first_blocks = load_blocks(next_table_ptr, next_first // TILE, next_first, next_len, TILE, BLOCK_SIZE)
        row = seq.to(tl.int64)
        positions = tl.zeros((BLOCK_M,), dtype=tl.int32) + (seq_len - 1)
        skipped_tiles = first_token // TILE - seq_start
        part_end = tl.minimum(seq_end, last_tile)
        accumulator = tl.zeros((BLOCK_M, BLOCK_D), dtype=tl.float32)
        row_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
        row_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
        for part_tile in range(tile + skipped_tiles, part_end + skipped_tiles):
            next_blocks = load_blocks(table_ptr, part_tile + 1, first_token, seq_len, TILE, BLOCK_SIZE)
            accumulator, row_sum, row_max = attend_tile(
                accumulator, row_sum, row_max, query, positions, slopes,
                kv_ptr, blocks, part_tile, first_token, seq_len,
                kv_block_stride, kv_value_stride, kv_token_stride, score_scale, softcap, window,
                HEAD_DIM, BLOCK_D, BLOCK_SIZE, TILE,
                IS_MASKED=True, HAS_WINDOW=HAS_WINDOW, HAS_ALIBI=HAS_ALIBI, HAS_SOFTCAP=HAS_SOFTCAP,
            )  # fmt: skip
            blocks = next_blocks
        row_max = tl.where(row_sum > 0.0, row_max, 0.0)
        row_sum = tl.where(row_sum > 0.0, row_sum, 1.0)
        result = accumulator * (v_scale / row_sum)[:, None]
        output_row_ptr = output_ptr + row * output_token_stride + kv_head * GROUP_SIZE * HEAD_DIM
        if seq_end - seq_start == part_end - tile:
            output_ptrs = output_row_ptr + members[:, None] * HEAD_DIM + columns[None, :]
            tl.store(output_ptrs, result.to(output_ptr.dtype.element_ty), mask)
        else:
            # Of its two slots a worker uses the second for a request that it begins and another continues.
            slot = 2 * worker + (seq_start >= worker * per_worker).to(tl.int32)
            slot_head = slot * num_kv_heads + kv_head
            slot_rows = slot_head * GROUP_SIZE + members
            tl.store(partials_ptr + slot_rows[:, None] * HEAD_DIM + columns[None, :], result, mask)
            tl.store(partial_sums_ptr + slot_rows, row_max + tl.log2(row_sum), members < GROUP_SIZE)
            first_worker, last_worker = seq_start // per_worker, (seq_end - 1) // per_worker
            tl.debug_barrier()  # the arrival publishes what all threads have stored
            arrival_ptr = arrivals_ptr + seq * num_kv_heads + kv_head
            if tl.atomic_add(arrival_ptr, 1, sem="acq_rel") == last_worker - first_worker:
                tl.store(arrival_ptr, 0)
                _combine_parts(
                    output_row_ptr, partials_ptr, partial_sums_ptr, first_worker, last_worker, kv_head, num_kv_heads,
                    GROUP_SIZE, HEAD_DIM, BLOCK_GROUP, BLOCK_PARTS,
                )  # fmt: skip
        tile = part_end
        seq += 1
        if HOLDS_NEXT_QUERY:
            query = next_query
        seq_start, seq_end, seq_len = next_start, next_end, next_len
        first_token, table_ptr, blocks = next_first, next_table_ptr, first_blocks


@triton.jit
def _load_request(tile_starts_ptr, seq_lens_ptr, seq, num_decodes):
    """(first tile, end of its tiles, length) of a request; nothing of one past the last."""
    is_request = seq < num_decodes
    start = tl.load(tile_starts_ptr + seq, is_request, other=0)
    end = tl.load(tile_starts_ptr + seq + 1, is_request, other=0)
    length = tl.load(seq_lens_ptr + seq, is_request, other=0).to(tl.int32)
    return start, end, length


@triton.jit
def _load_query(query_ptrs, seq, num_decodes, query_token_stride, mask):
    """[BLOCK_M, BLOCK_D] of a request's heads; zeros of one past the last."""
    return tl.load(query_ptrs + seq.to(tl.int64) * query_token_stride, mask & (seq < num_decodes), other=0.0)


@triton.jit
def _combine_parts(
    output_row_ptr, partials_ptr, partial_sums_ptr, first_worker, last_worker, kv_head, num_kv_heads,
    GROUP_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """Write the heads of one group from their parts, in the order of the context, whoever arrived last.

    A part weighs 2^s, s being the logarithm of the sum of its softmax. BLOCK_PARTS x BLOCK_GROUP elements are read at a
    time.
    """
    num_elements: tl.constexpr = GROUP_SIZE * HEAD_DIM
    for first_element in range(0, num_elements, BLOCK_GROUP):
        elements = first_element + tl.arange(0, BLOCK_GROUP)
        is_element = elements < num_elements
        accumulator = tl.zeros((BLOCK_GROUP,), dtype=tl.float32)
        weight_sum = tl.zeros((BLOCK_GROUP,), dtype=tl.float32)
        largest = tl.full((BLOCK_GROUP,), float("-inf"), dtype=tl.float32)
        for first_part in range(first_worker, last_worker + 1, BLOCK_PARTS):
            workers = first_part + tl.arange(0, BLOCK_PARTS)
            slot_heads = (2 * workers + (workers == first_worker).to(tl.int32)) * num_kv_heads + kv_head
            offsets = slot_heads[:, None] * num_elements + elements[None, :]  # [BLOCK_PARTS, BLOCK_GROUP]
            mask = (workers <= last_worker)[:, None] & is_element[None, :]
            # Past the first-level cache, which may not have seen the other workers' stores.
            sums = tl.load(partial_sums_ptr + offsets // HEAD_DIM, mask, other=float("-inf"), cache_modifier=".cg")
            parts = tl.load(partials_ptr + offsets, mask, other=0.0, cache_modifier=".cg")
            new_largest = tl.maximum(largest, tl.max(sums, axis=0))
            shift = tl.where(is_element, new_largest, 0.0)
            weights = tl.exp2(sums - shift[None, :])
            correction = tl.exp2(largest - shift)
            accumulator = accumulator * correction + tl.sum(weights * parts, axis=0)
            weight_sum = weight_sum * correction + tl.sum(weights, axis=0)
            largest = new_largest
        result = accumulator / tl.where(is_element, weight_sum, 1.0)
        tl.store(output_row_ptr + elements, result.to(output_row_ptr.dtype.element_ty), is_element)


def compile_examples(variant: str) -> list[CompileExample]:
    """Heads of every usual size, over each type of cache."""
    return [
        _compile_example(variant, launch, head_dim, cache_dtype)
        for head_dim in (64, 80, 128, 256)
        for cache_dtype in compiled_cache_dtypes(variant)
        for launch in dict.fromkeys(launch_for(variant, head_dim, cache_dtype, count) for count in (1, MANY_DECODES))
    ]


def _compile_example(variant: str, launch: Launch, head_dim: int, cache_dtype: torch.dtype) -> CompileExample:
    tile = tile_tokens(head_dim, cache_dtype, launch.tile_bytes)
    flags = {"HAS_WINDOW": False, "HAS_ALIBI": False, "HAS_SOFTCAP": False, "USE_PDL": variant in PDL_VARIANTS}
    return CompileExample(
        name=f"paged_decode {launch.num_warps} warps head_dim={head_dim} {cache_dtype}",
        function=_decode_kernel,
        signature=argument_types(_decode_kernel.arg_names, torch.bfloat16, cache_dtype),
        constexprs=_constexprs(4, head_dim, 16, tile, launch) | flags,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
