"""How long a piece of work takes on its device: CUDA events on a GPU, the clock on a CPU."""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence

Work = Callable[[], object]


def median_s(
    works: Sequence[Work], device_type: str, *, num_repeats: int = 7, num_warm_ups: int = 1, num_calls: int = 1
) -> float:
    """Median seconds of one call. A repeat times `num_calls` calls together.

    works: take turns, so that none finds its inputs in a cache where the one before left them; give several copies
    """
    turns = itertools.cycle(works)
    for _ in range(num_warm_ups):
        next(turns)()
    time_calls = _gpu_s if device_type == "cuda" else _cpu_s
    times_s = [time_calls(list(itertools.islice(turns, num_calls))) for _ in range(num_repeats)]
    return statistics.median(times_s) / num_calls


def _cpu_s(calls: Sequence[Work]) -> float:
    start_s = time.perf_counter()
    for call in calls:
        call()
    return time.perf_counter() - start_s


def _gpu_s(calls: Sequence[Work]) -> float:
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for call in calls:
        call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
