"""Which launches are tried for a linear layer of few tokens, beside cuBLAS: the one place to add some."""

import heapq
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Final

import torch

from octavo_kernels.launch import cdiv, next_power_of_2
from octavo_kernels.linear_choice import LinearShape
from octavo_kernels.ops import cublaslt_linear, gemv, small_m_linear

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

OwnLaunch = gemv.Launch | small_m_linear.Launch
AnyLaunch = cublaslt_linear.Launch | OwnLaunch


def candidates(shape: LinearShape, num_tokens: int, num_multiprocessors: int) -> list[OwnLaunch]:
    """The kernels of our own that are tried besides cuBLAS."""
    gemvs = _GEMV_LAUNCHES if num_tokens <= gemv.MAX_TOKENS else ()
    dots = _dot_launches(shape, num_tokens, num_multiprocessors) if num_tokens <= small_m_linear.MAX_TOKENS else ()
    return [*gemvs, *dots]


def proposals(shape: LinearShape, num_tokens: int, dtype: torch.dtype, device: torch.device) -> list[AnyLaunch]:
    """cuBLASLt's algorithms, which need no compiling. None of them gates."""
    if device.type != "cuda" or shape.is_gated:
        return []
    return [*cublaslt_linear.candidates(num_tokens, shape.out_features, shape.in_features, dtype)]


def compile_key(shape: LinearShape, num_tokens: int, launch: OwnLaunch) -> tuple[object, ...]:
    """What decides whether two launches share machine code."""
    if isinstance(launch, gemv.Launch):
        return launch, shape.is_gated, num_tokens, shape.in_features % launch.block_k == 0
    is_even = shape.in_features % (launch.block_k * launch.num_splits) == 0
    return launch, shape.is_gated, max(16, next_power_of_2(num_tokens)), is_even


def describe(launch: AnyLaunch) -> str:
    """A launch in a table."""
    if isinstance(launch, cublaslt_linear.Launch):
        return "cublaslt"
    if isinstance(launch, gemv.Launch):
        return f"gemv n{launch.block_n} k{launch.block_k} w{launch.num_warps}"
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


def _distance(wanted: float, num_splits: int) -> float:
    return abs(math.log(num_splits / wanted))
