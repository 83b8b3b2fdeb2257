"""How long a call takes: replays of a CUDA graph of many calls, which take turns with copies of their inputs.

Together the copies are larger than the L2 cache. On a CPU it is the host's clock and one call, which means nothing for
kernels in Triton's interpreter: there only the rest of a measurement can be tried.
"""
# mypy: disable-error-code="no-untyped-call"

import statistics
import time
from collections.abc import Callable
from typing import Final

import torch

_MIN_CALLS: Final = 16
_NUM_REPLAYS: Final = 9


def median_us(run: Callable[[int], object], num_copies: int, device: torch.device) -> float:
    """Microseconds of one call, the median over replays. run: given the number of the copy to use"""
    if device.type != "cuda":
        start_s = time.perf_counter()
        run(0)
        return (time.perf_counter() - start_s) * 1e6
    num_calls = max(_MIN_CALLS, num_copies)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for index in range(num_calls):
            run(index % num_copies)
    graph.replay()
    return statistics.median(_replay_ms(graph) for _ in range(_NUM_REPLAYS)) * 1e3 / num_calls


def _replay_ms(graph: torch.cuda.CUDAGraph) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
