"""The limits of this machine for decoding: how fast it reads memory and multiplies, and what that allows a model.

Measured with torch, which the engine computes with, in its number of threads. A decode step reads every weight once and
multiplies it with each running request's activations, so it cannot take less than the larger of the two times.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from octavo_engine.bench.roofline import Rates
from octavo_engine.bench.timing import median_s

_READ_BYTES: Final = 1 << 29  # far beyond any cache
_NUM_REPEATS: Final = 7
_GEMM_K, _GEMM_N = 1024, 16_384  # 64 MiB of float32 weights: they come from memory, as a model's do
_ROWS: Final = (1, 16, 256)


@dataclass(frozen=True, slots=True)
class GemmRate:
    """Median GFLOP/s (or GOP/s) of [rows, K] x [K, N], and the weights it reads meanwhile in GB/s."""

    dtype: str
    num_rows: int
    gflops: float
    weights_gb_s: float


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Memory read by all threads in GB/s, and the rates of matrix multiplication."""

    num_threads: int
    read_gb_s: float
    gemm: tuple[GemmRate, ...]


def measure_ceilings(num_threads: int | None = None) -> Ceilings:
    """Measure for a few seconds, on the CPU."""
    import torch

    if num_threads:
        torch.set_num_threads(num_threads)
    gemm = [_gemm_rate(name, rows) for name in ("float32", "bfloat16", "int8") for rows in _ROWS]
    return Ceilings(torch.get_num_threads(), _read_rate_gb_s(), tuple(gemm))


def measure_cpu_rates(dtype: str) -> Rates:
    """The two rates that lower bounds for a model in `dtype` (float32, bfloat16 or int8) need; a second or two."""
    return Rates(_read_rate_gb_s() * 1e9, _gemm_rate(dtype, max(_ROWS)).gflops * 1e9)


def decode_limit_tokens_per_s(
    num_parameters: int, bytes_per_weight: float, batch_size: int, read_gb_s: float, gflops: float
) -> float:
    """Most tokens/s that `batch_size` requests can get, all decoding; attention and KV reads are left out."""
    read_s = num_parameters * bytes_per_weight / (read_gb_s * 1e9)
    multiply_s = 2 * num_parameters * batch_size / (gflops * 1e9)
    return batch_size / max(read_s, multiply_s)


def _read_rate_gb_s() -> float:
    import torch

    data = torch.ones(_READ_BYTES // 4)
    return _READ_BYTES / median_s([data.sum], "cpu", num_repeats=_NUM_REPEATS) / 1e9


def _gemm_rate(dtype: str, num_rows: int) -> GemmRate:
    multiply, weight_bytes = _multiplication(dtype, num_rows)
    seconds = median_s([multiply], "cpu", num_repeats=_NUM_REPEATS)
    operations = 2 * num_rows * _GEMM_K * _GEMM_N
    return GemmRate(dtype, num_rows, operations / seconds / 1e9, weight_bytes / seconds / 1e9)


def _multiplication(dtype: str, num_rows: int) -> tuple[Callable[[], object], int]:
    """The multiplication and the bytes of its weights. int8: weights and, per call, activations are quantised."""
    import torch

    activations = torch.randn(num_rows, _GEMM_K)
    weight = torch.randn(_GEMM_N, _GEMM_K)
    if dtype == "int8":
        quantised = torch.quantize_per_tensor(weight, 0.02, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(quantised, None)
        return lambda: torch.ops.quantized.linear_dynamic(activations, packed, True), weight.numel()
    torch_dtype = getattr(torch, dtype)
    activations, weight = activations.to(torch_dtype), weight.to(torch_dtype)
    return lambda: torch.nn.functional.linear(activations, weight), weight.numel() * weight.element_size()
