"""The limits of a GPU: how fast it copies and reads its memory, and how fast it multiplies, at first and for seconds.

A large GPU draws more power in a long multiplication than it may, so that its clock falls: a run of some seconds has to
be held against the sustained rate, a short one against the first.
"""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from octavo_engine.bench.roofline import Rates
from octavo_engine.bench.timing import Work, median_s

_BUFFER_BYTES: Final = 1 << 30  # far beyond any cache
_NUM_BUFFERS: Final = 2
_MATRIX_SIZE: Final = 8192
_CALLS_PER_SAMPLE: Final = 4


@dataclass(frozen=True, slots=True)
class GpuCeilings:
    """Rates of one GPU: copying counts bytes read and written; multiplication is dense bfloat16, 8192 x 8192 x 8192."""

    name: str
    num_multiprocessors: int
    memory_gib: float
    copy_gb_s: float
    read_gb_s: float
    matmul_tflops: float
    sustained_matmul_tflops: float

    @property
    def rates(self) -> Rates:
        """The best of them, as a lower bound on time needs it."""
        return Rates(max(self.copy_gb_s, self.read_gb_s) * 1e9, self.matmul_tflops * 1e12)


def measure_gpu_ceilings(sustained_s: float = 5.0) -> GpuCeilings:
    """Measure the current GPU; takes `sustained_s` and a second more, and 4 GiB of its memory meanwhile."""
    import torch

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    copy_gb_s, read_gb_s = _memory_rates_gb_s()
    multiplications = _multiplications()
    result = GpuCeilings(
        name=properties.name,
        num_multiprocessors=properties.multi_processor_count,
        memory_gib=round(properties.total_memory / 2**30, 1),
        copy_gb_s=copy_gb_s,
        read_gb_s=read_gb_s,
        matmul_tflops=_tflops(
            median_s(multiplications, "cuda", num_repeats=10, num_warm_ups=3, num_calls=_CALLS_PER_SAMPLE)
        ),
        sustained_matmul_tflops=_sustained_tflops(multiplications, sustained_s),
    )
    del multiplications
    torch.cuda.empty_cache()
    return result


def _memory_rates_gb_s() -> tuple[float, float]:
    """GB/s of copying (read and written) and of reading."""
    import torch

    sources = [torch.randint(0, 255, (_BUFFER_BYTES,), dtype=torch.uint8, device="cuda") for _ in range(_NUM_BUFFERS)]
    targets = [torch.empty_like(source) for source in sources]
    copies: list[Work] = [
        lambda source=source, target=target: target.copy_(source)  # type: ignore[misc]
        for source, target in zip(sources, targets, strict=True)
    ]
    copy_s = median_s(copies, "cuda", num_repeats=20, num_warm_ups=3)
    del sources, targets, copies
    numbers = [torch.randn(_BUFFER_BYTES // 4, device="cuda") for _ in range(_NUM_BUFFERS)]
    read_s = median_s([each.sum for each in numbers], "cuda", num_repeats=20, num_warm_ups=3)
    return 2 * _BUFFER_BYTES / copy_s / 1e9, _BUFFER_BYTES / read_s / 1e9


def _multiplications() -> list[Work]:
    """The same multiplication on several sets of matrices. Random ones: constant data draws less power."""
    import torch

    def multiplication() -> Work:
        left, right = (torch.randn(_MATRIX_SIZE, _MATRIX_SIZE, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        product = torch.empty_like(left)
        return lambda: torch.mm(left, right, out=product)

    return [multiplication() for _ in range(_NUM_BUFFERS)]


def _sustained_tflops(multiplications: Sequence[Work], duration_s: float) -> float:
    """The rate in the last third of `duration_s` without a pause."""
    samples_s = []
    start_s = time.perf_counter()
    while time.perf_counter() - start_s < duration_s:
        samples_s.append(median_s(multiplications, "cuda", num_repeats=1, num_warm_ups=0, num_calls=16))
    return _tflops(statistics.median(samples_s[-max(1, len(samples_s) // 3) :]))


def _tflops(seconds: float) -> float:
    return 2 * _MATRIX_SIZE**3 / seconds / 1e12
