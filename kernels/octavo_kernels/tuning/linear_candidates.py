"""Which launches are tried beside cuBLAS for linear layers of up to some hundred tokens: the one place to add some."""

import heapq
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Final

import torch

from octavo_kernels.launch import cdiv, next_power_of_2
from octavo_kernels.linear_choice import Launch, LinearShape
from octavo_kernels.ops import cublaslt_linear, gemv, small_m_linear, wgmma_linear

_DTYPE_BYTES: Final = 2
_SHARED_MEMORY: Final = 220 << 10

# A thread holds 16 bytes of each row or a multiple, so that the hidden states need not pass through shared memory.
_GEMV_LAUNCHES: Final = (
    gemv.Launch(2, 1024, 2),
    gemv.Launch(2, 2048, 4),
    gemv.Launch(2, 4096, 8),
    gemv.Launch(4, 512, 1),
    gemv.Launch(4, 512, 2),
    gemv.Launch(4, 1024, 4),
    gemv.Launch(4, 2048, 4),
    gemv.Launch(4, 2048, 8),
    gemv.Launch(8, 256, 1),
    gemv.Launch(8, 512, 2),
    gemv.Launch(8, 1024, 4),
    gemv.Launch(16, 256, 1),
)
# Tiles that leave room in shared memory for two programs on a multiprocessor, or one with a deep pipeline.
_DOT_TILES: Final = (
    small_m_linear.Launch(32, 256, 1, 4, 4),
    small_m_linear.Launch(64, 64, 1, 4, 6),
    small_m_linear.Launch(64, 128, 1, 4, 4),
    small_m_linear.Launch(64, 256, 1, 4, 3),
    small_m_linear.Launch(128, 64, 1, 4, 5),
    small_m_linear.Launch(128, 128, 1, 8, 4),
)
_NUM_SPLITS: Final = (1, 2, 4, 8)
_WGMMA_BLOCK_N: Final = range(64, 257, 16)
_NUM_WGMMA: Final = 8
# Guesses that rank launches: what a tile and a shared sum cost besides the tile's steps, in clocks, and the bytes that
# the L2 cache gives a multiprocessor in one.
_TILE_CLOCKS, _SUM_CLOCKS, _L2_BYTES_PER_CLOCK = 1500, 3000, 24

OwnLaunch = gemv.Launch | small_m_linear.Launch | wgmma_linear.Launch


def candidates(shape: LinearShape, num_tokens: int, device: torch.device) -> list[OwnLaunch]:
    """The kernels of our own that are tried besides cuBLAS."""
    num_multiprocessors = 1
    if device.type == "cuda":
        num_multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
    gemvs = _GEMV_LAUNCHES if num_tokens <= gemv.MAX_TOKENS else ()
    if num_tokens <= small_m_linear.MAX_TOKENS:
        return [*gemvs, *_dot_launches(shape, num_tokens, num_multiprocessors)]
    if device.type == "cuda" and torch.cuda.get_device_capability(device) == wgmma_linear.CAPABILITY:
        return [*wgmma_launches(shape, num_tokens, num_multiprocessors)]
    return []


def proposals(shape: LinearShape, num_tokens: int, dtype: torch.dtype, device: torch.device) -> list[Launch]:
    """cuBLASLt's algorithms, which need no compiling. None of them gates."""
    if device.type != "cuda" or shape.is_gated:
        return []
    return [*cublaslt_linear.candidates(num_tokens, shape.out_features, shape.in_features, dtype)]


def compile_key(shape: LinearShape, num_tokens: int, launch: OwnLaunch) -> tuple[object, ...]:
    """What decides whether two launches share machine code."""
    if isinstance(launch, gemv.Launch):
        return launch, shape.is_gated, num_tokens, shape.in_features % launch.block_k == 0
    if isinstance(launch, wgmma_linear.Launch):
        return launch, shape.is_gated
    is_even = shape.in_features % (launch.block_k * launch.num_splits) == 0
    return launch, shape.is_gated, max(16, next_power_of_2(num_tokens)), is_even


def describe(launch: Launch) -> str:
    """A launch in a table."""
    if isinstance(launch, cublaslt_linear.Launch):
        return "cublaslt"
    if isinstance(launch, gemv.Launch):
        return f"gemv n{launch.block_n} k{launch.block_k} w{launch.num_warps}"
    if isinstance(launch, wgmma_linear.Launch):
        return f"wgmma n{launch.block_n} {launch.cluster_m}x{launch.cluster_n}x{launch.cluster_k}"
    return f"dot n{launch.block_n} k{launch.block_k} x{launch.num_splits} w{launch.num_warps} s{launch.num_stages}"


def _dot_launches(shape: LinearShape, num_tokens: int, num_multiprocessors: int) -> Iterator[small_m_linear.Launch]:
    """Each tile with the two numbers of splits that come nearest to two programs for each multiprocessor."""
    for tile in _DOT_TILES:
        block_m = max(16, next_power_of_2(num_tokens))
        if tile.num_stages * tile.block_k * (tile.block_n + block_m) * _DTYPE_BYTES > _SHARED_MEMORY:
            continue
        num_tiles = cdiv(shape.out_features, tile.block_n)
        possible = [n for n in _NUM_SPLITS if shape.in_features >= 4 * tile.block_k * n]
        wanted = 2 * num_multiprocessors / num_tiles
        yield from (replace(tile, num_splits=n) for n in heapq.nsmallest(2, possible, key=partial(_distance, wanted)))


def wgmma_launches(shape: LinearShape, num_tokens: int, num_multiprocessors: int) -> list[wgmma_linear.Launch]:
    """The most promising tiles and clusters, for more tokens than the kernels for few take."""
    if num_tokens > wgmma_linear.MAX_TOKENS:
        return []
    cluster_m = 1 if num_tokens <= wgmma_linear.BLOCK_M else 2
    sizes = itertools.product(_WGMMA_BLOCK_N, (1, 2), (1,) if shape.is_gated else (1, 2))
    launches = (
        wgmma_linear.Launch(block_n, cluster_m, cluster_n, cluster_k) for block_n, cluster_n, cluster_k in sizes
    )
    return heapq.nsmallest(_NUM_WGMMA, launches, key=partial(_clocks, shape, num_tokens, num_multiprocessors))


def _clocks(shape: LinearShape, num_tokens: int, num_multiprocessors: int, launch: wgmma_linear.Launch) -> float:
    """Estimated: a step of 64 columns is bound by arithmetic, by shared memory or by the L2 cache."""
    groups = wgmma_linear.num_groups(num_tokens, shape.out_features, launch)
    rounds = cdiv(groups, wgmma_linear.most_clusters(launch, num_multiprocessors))
    num_bytes = 128 * (wgmma_linear.BLOCK_M / launch.cluster_n + launch.block_n / launch.cluster_m)
    step = max(4 * launch.block_n, 256 + 3 * launch.block_n, num_bytes / _L2_BYTES_PER_CLOCK)
    tile = cdiv(shape.in_features, 64 * launch.cluster_k) * step + _TILE_CLOCKS
    return rounds * tile + (_SUM_CLOCKS if launch.cluster_k > 1 else 0)


def _distance(wanted: float, num_splits: int) -> float:
    return abs(math.log(num_splits / wanted))
