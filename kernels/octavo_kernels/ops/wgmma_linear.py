"""Linear layers of some hundred tokens on Hopper: the weight read once, the gate applied before anything is written.

Between 64 tokens, which a matrix unit's columns can hold, and thousands, where cuBLAS is as fast as the chip lets it, a
layer is bound by memory, the L2 cache and arithmetic at once. Here the tensor memory accelerator keeps a deep pipeline
of tiles filled by itself, blocks of a cluster fetch once what several of them need, tiles are cut so that they fill the
multiprocessors evenly, and the first of them arrive while the kernel ahead still runs. Triton 3.6 has neither clusters
nor tiles of 224 rows, so the kernel is CUDA C++: `wgmma_linear.cu`.
Sources: PTX ISA (`wgmma`, `cp.async.bulk.tensor`, `mbarrier`); CUTLASS, "Efficient GEMM in CUDA" (warp specialisation).
"""

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from octavo_kernels.cuda_source import Argument, CudaKernel, tensor_map
from octavo_kernels.cuda_source import launch as launch_kernel
from octavo_kernels.launch import cdiv
from octavo_kernels.ops.gemv import check_linear_arguments

# More would be right as well, but tiles are not ordered for them.
MAX_TOKENS: Final = 1024
# The one architecture with these instructions.
CAPABILITY: Final = (9, 0)
_VARIANTS: Final = ("hopper", "grace-hopper")
BLOCK_M: Final = 128
_BLOCK_K: Final = 64
_MAX_BLOCK_N: Final = 256
_NUM_THREADS: Final = 384
_SHARED_BYTES: Final = 227 << 10
_BARRIER_BYTES: Final = 16
_MAX_STAGES: Final = 8
_ALIGNMENT: Final = 16
_ITEM_BYTES: Final = 2


@dataclass(frozen=True, slots=True)
class Launch:
    """How the layer is cut.

    block_n:   rows of the weight for a tile, a multiple of 16 up to 256; gated, half of them gates
    cluster_m: blocks of 128 tokens that share each tile of the weight, 1 or 2
    cluster_n: blocks of other rows of the weight that share each tile of the tokens, 1 or 2
    cluster_k: blocks that share the columns of the weight and add up their sums, 1 or, without a gate, 2
    """

    block_n: int
    cluster_m: int = 1
    cluster_n: int = 1
    cluster_k: int = 1

    @property
    def num_stages(self) -> int:
        """Tiles that shared memory has room for."""
        return min(_MAX_STAGES, _SHARED_BYTES // (self._stage_bytes + _BARRIER_BYTES))

    @property
    def shared_bytes(self) -> int:
        """Of a block."""
        return self.num_stages * (self._stage_bytes + _BARRIER_BYTES)

    @property
    def cluster(self) -> int:
        """Blocks that work together."""
        return self.cluster_m * self.cluster_n * self.cluster_k

    @property
    def _stage_bytes(self) -> int:
        return (BLOCK_M + self.block_n) * _BLOCK_K * 2


@functools.cache
def kernel_of(launch: Launch, dtype: torch.dtype, *, is_gated: bool, has_bias: bool) -> CudaKernel:
    """What a launch compiles."""
    macros = {
        "BLOCK_N": launch.block_n,
        "NUM_STAGES": launch.num_stages,
        "CLUSTER_M": launch.cluster_m,
        "CLUSTER_N": launch.cluster_n,
        "CLUSTER_K": launch.cluster_k,
        "IS_GATED": int(is_gated),
        "HAS_BIAS": int(has_bias),
        "IS_HALF": int(dtype == torch.float16),
    }
    lines = [f"#define {name} {value}" for name, value in macros.items()]
    lines.append(f"#define WGMMA(sums, a, b, adds) {_multiply(launch.block_n, dtype)}")
    words = [f"wgmma_linear n{launch.block_n} {launch.cluster_m}x{launch.cluster_n}x{launch.cluster_k}"]
    words += [str(dtype).removeprefix("torch."), *["gated"] * is_gated, *["with bias"] * has_bias]
    return CudaKernel(
        name=" ".join(words),
        source=Path(__file__).with_suffix(".cu"),
        macros="\n".join(lines) + "\n",
        shared_bytes=launch.shared_bytes,
        num_threads=_NUM_THREADS,
    )


def _multiply(block_n: int, dtype: torch.dtype) -> str:
    """The statement of one multiplication. Its sums are operands each, as many as a thread holds."""
    num_sums = block_n // 2
    kind = "f16" if dtype == torch.float16 else "bf16"
    operands = ", ".join(f"%{i}" for i in range(num_sums))
    sums = ", ".join(f'"+f"(sums[{i}])' for i in range(num_sums))
    text = (
        rf"{{\n.reg .pred p;\nsetp.ne.b32 p, %{num_sums + 2}, 0;\n"
        rf"wgmma.mma_async.sync.aligned.m64n{block_n}k16.f32.{kind}.{kind} "
        rf"{{{operands}}}, %{num_sums}, %{num_sums + 1}, p, 1, 1, 0, 0;\n}}\n"
    )
    return f'asm volatile("{text}" : {sums} : "l"(a), "l"(b), "r"((int)(adds)))'


def wgmma_linear(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, launch: Launch, *, is_gated: bool = False
) -> torch.Tensor:
    """y = x W^T + b, or silu(gate) * up where y holds both side by side, on Hopper, without waiting.

    hidden:  [num_tokens, in_features], bfloat16 or float16, rows contiguous and aligned to 16 bytes
    weight:  [out_features, in_features], contiguous, of the type of `hidden`
    bias:    [out_features], contiguous, of the same type, or None
    Returns  [num_tokens, out_features], gated [num_tokens, out_features / 2], contiguous, in the type of `hidden`;
             computed in float32 and rounded once
    Raises ValueError if the arguments do not fit: rows of the output must be multiples of 16 bytes, too.
    """
    check_linear_arguments(hidden, weight, bias, MAX_TOKENS, is_gated=is_gated)
    (num_tokens, in_features), num_rows = hidden.shape, weight.shape[0]
    num_columns = num_rows // 2 if is_gated else num_rows
    _check_alignment(hidden, weight, num_columns)
    _check_launch(launch, is_gated=is_gated)
    output = hidden.new_empty(num_tokens, num_columns)
    dtype = hidden.dtype
    arguments: tuple[Argument, ...] = (
        tensor_map(hidden.data_ptr(), (num_tokens, in_features), hidden.stride(0), dtype, BLOCK_M // launch.cluster_n),
        tensor_map(weight.data_ptr(), (num_rows, in_features), in_features, dtype, launch.block_n // 2),
        ctypes.c_void_p(output.data_ptr()),
        ctypes.c_void_p(None if bias is None else bias.data_ptr()),
        *(ctypes.c_int(number) for number in (num_tokens, num_columns, in_features)),
    )
    num_multiprocessors = torch.cuda.get_device_properties(hidden.device).multi_processor_count
    num_clusters = even_clusters(num_tokens, num_rows, launch, num_multiprocessors)
    kernel = kernel_of(launch, dtype, is_gated=is_gated, has_bias=bias is not None)
    launch_kernel(kernel, num_clusters * launch.cluster, arguments, hidden.device)
    return output


def takes(out_features: int, in_features: int, *, is_gated: bool) -> bool:
    """Whether rows of a weight and of its output are multiples of 16 bytes, as `wgmma_linear` asks."""
    num_columns = out_features // 2 if is_gated else out_features
    return in_features * _ITEM_BYTES % _ALIGNMENT == 0 and num_columns * _ITEM_BYTES % _ALIGNMENT == 0


def num_groups(num_tokens: int, out_features: int, launch: Launch) -> int:
    """Of as many tiles as a cluster makes at once."""
    return cdiv(num_tokens, BLOCK_M * launch.cluster_m) * cdiv(out_features, launch.block_n * launch.cluster_n)


def most_clusters(launch: Launch, num_multiprocessors: int) -> int:
    """That run at once. Multiprocessors come in groups of an even number, in which larger clusters leave some idle."""
    granularity = 2 if launch.cluster <= 2 else 8
    return num_multiprocessors // granularity * granularity // launch.cluster


def even_clusters(num_tokens: int, out_features: int, launch: Launch, num_multiprocessors: int) -> int:
    """As few clusters as end at the same time as all that run at once; with a shared sum, one for each group."""
    groups = num_groups(num_tokens, out_features, launch)
    return groups if launch.cluster_k > 1 else cdiv(groups, cdiv(groups, most_clusters(launch, num_multiprocessors)))


def _check_alignment(hidden: torch.Tensor, weight: torch.Tensor, num_columns: int) -> None:
    if hidden.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"matrix units take bfloat16 or float16 here, not {hidden.dtype}")
    strides = (hidden.stride(0), weight.stride(0), num_columns)
    addresses = (hidden.data_ptr(), weight.data_ptr())
    if any(stride * hidden.itemsize % _ALIGNMENT for stride in strides) or any(each % _ALIGNMENT for each in addresses):
        raise ValueError(f"rows of {strides} elements at {addresses} are not all aligned to {_ALIGNMENT} bytes")


def _check_launch(launch: Launch, *, is_gated: bool) -> None:
    sizes = launch.cluster_m, launch.cluster_n, launch.cluster_k
    is_known = all(size in (1, 2) for size in sizes) and not (is_gated and launch.cluster_k > 1)
    if not is_known or not 0 < launch.block_n <= _MAX_BLOCK_N or launch.block_n % 16:
        raise ValueError(f"there is no {'gated ' if is_gated else ''}kernel for {launch}")


_EXAMPLES: Final = (Launch(64), Launch(224, 2), Launch(224, 2, 2), Launch(96, 1, 2, 2), Launch(256, 2, 2, 2))


def compile_examples(variant: str) -> list[CudaKernel]:
    """For Hopper, small and large tiles in clusters of all shapes, plain and gated, with and without a bias."""
    if variant not in _VARIANTS:
        return []
    return [
        kernel_of(launch, dtype, is_gated=is_gated, has_bias=dtype == torch.float16)
        for launch in _EXAMPLES
        for is_gated in (False, True)
        for dtype in (torch.bfloat16, torch.float16)
        if launch.cluster_k == 1 or not is_gated
    ]
