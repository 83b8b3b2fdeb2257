"""Where a step's time goes: torch's profiler over some steps of the engine, summed up by kind of kernel.

On a GPU the kernels count, by their own time, and so does what lies between them; on a CPU torch's operations do.
"""

import itertools
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from octavo_engine.bench.offline import add_requests, collect
from octavo_engine.bench.workloads import BenchRequest
from octavo_engine.core import EngineCore
from octavo_engine.protocol import AbortRequests

if TYPE_CHECKING:
    from torch.profiler import profile

OTHER_KIND: Final = "other"
# The first that matches a kernel's name wins.
_KINDS: Final = (
    ("attention", r"att(n|ention)|flash|paged|cascade|combine|(decode|prefill|chunk)_kernel|plan_(decodes|chunks)"),
    ("norm, activation, rotary", r"norm|silu|gelu|glu|activation|rotary|rope|(write|store)_kv|kv_(write|cache)"),
    ("gemm", r"gemm|gemv|nvjet|cutlass|cublas|wgmma|matmul|split_?k|s16816|xmma|(^|:|_)(add|b|baddb)?mm\b|linear|moe"),
    ("sampling", r"sampl|argmax|best_key|gumbel|softmax|top_?[kp]|penalt|multinomial|sort|philox"),
    ("memory", r"memcpy|memset|copy|fill|cat\b|catarray|index|gather|scatter|embedding|aten::to\b"),
)
_PATTERNS: Final = tuple((kind, re.compile(pattern, re.IGNORECASE)) for kind, pattern in _KINDS)
_SETTLING_STEPS: Final = 3


@dataclass(frozen=True, slots=True)
class KernelEvent:
    """One run of a kernel, in microseconds of the profiler's clock."""

    name: str
    start_us: float
    end_us: float


@dataclass(frozen=True, slots=True)
class KernelShare:
    """What one kernel, or one kind of them, took in a step: milliseconds, and how often it ran."""

    name: str
    ms_per_step: float
    runs_per_step: float


@dataclass(frozen=True, slots=True)
class StepProfile:
    """Means over the profiled steps.

    tokens_per_step: generated, over all requests
    wall_ms:         by the clock, with the profiler's own cost
    busy_ms:         at least one kernel ran
    """

    num_steps: int
    tokens_per_step: float
    wall_ms: float
    busy_ms: float
    kinds: tuple[KernelShare, ...]
    kernels: tuple[KernelShare, ...]

    @property
    def gap_ms(self) -> float:
        """No kernel ran."""
        return self.wall_ms - self.busy_ms


def profile_steps(
    core: EngineCore, requests: Sequence[BenchRequest], num_steps: int, num_skipped: int | None = None
) -> StepProfile:
    """Profile `num_steps` steps, then end the requests.

    num_skipped: steps before the first that counts; None: until every request decodes, so that prompts are left out
    """
    from torch.profiler import profile

    answers = add_requests(core, requests)
    _skip(core, answers, num_skipped)
    num_before = _num_tokens(answers)
    with profile(activities=[_activity()], acc_events=True) as profiler:
        start_s = time.perf_counter()
        num_done = 0
        while core.has_work and num_done < num_steps:
            collect(core.step().outputs, answers)
            num_done += 1
        _synchronize()
        wall_s = time.perf_counter() - start_s
    num_tokens = _num_tokens(answers) - num_before
    core.abort(AbortRequests(list(answers)))
    while core.has_work:
        core.step()
    return summarise(_events(profiler), num_done, num_tokens, wall_s)


def _num_tokens(answers: Mapping[str, Sequence[int]]) -> int:
    return sum(map(len, answers.values()))


def _skip(core: EngineCore, answers: dict[str, list[int]], num_skipped: int | None) -> None:
    num_done, num_settled = 0, 0
    while core.has_work and (num_done < num_skipped if num_skipped is not None else num_settled < _SETTLING_STEPS):
        collect(core.step().outputs, answers)
        num_done += 1
        num_settled += all(answers.values())


def summarise(events: Sequence[KernelEvent], num_steps: int, num_tokens: int, wall_s: float) -> StepProfile:
    """Sum up events of `num_steps` steps that brought `num_tokens` and took `wall_s` together."""
    num_steps = max(num_steps, 1)
    return StepProfile(
        num_steps=num_steps,
        tokens_per_step=num_tokens / num_steps,
        wall_ms=wall_s * 1e3 / num_steps,
        busy_ms=busy_us(events) / 1e3 / num_steps,
        kinds=_shares(((kind_of(event.name), event) for event in events), num_steps),
        kernels=_shares(((event.name, event) for event in events), num_steps),
    )


def kind_of(name: str) -> str:
    """The kind of kernel that a name tells."""
    return next((kind for kind, pattern in _PATTERNS if pattern.search(name)), OTHER_KIND)


def busy_us(events: Iterable[KernelEvent]) -> float:
    """Microseconds in which at least one event ran: the union of their intervals."""
    busy, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda each: each.start_us):
        busy += max(0.0, event.end_us - max(event.start_us, until))
        until = max(until, event.end_us)
    return busy


def _shares(named: Iterable[tuple[str, KernelEvent]], num_steps: int) -> tuple[KernelShare, ...]:
    """Sums by name, the largest first."""
    totals: dict[str, tuple[float, int]] = {}
    for name, event in named:
        total_us, count = totals.get(name, (0.0, 0))
        totals[name] = (total_us + event.end_us - event.start_us, count + 1)
    ordered = sorted(totals.items(), key=lambda item: -item[1][0])
    return tuple(KernelShare(name, us / 1e3 / num_steps, count / num_steps) for name, (us, count) in ordered)


def _activity() -> Any:
    import torch
    from torch.profiler import ProfilerActivity

    return ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _events(profiler: "profile") -> list[KernelEvent]:
    """Kernels of the GPU; without one, operations of the CPU laid end to end by the time that they spent themselves."""
    import torch
    from torch.autograd import DeviceType  # type: ignore[attr-defined]

    found: list[Any] = list(profiler.events() or [])  # type: ignore[no-untyped-call]
    if torch.cuda.is_available():
        return [
            KernelEvent(event.name, event.time_range.start, event.time_range.end)
            for event in found
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation
        ]
    times_us = [event.self_cpu_time_total for event in found]
    ends_us = itertools.accumulate(times_us)
    return [
        KernelEvent(event.name, end_us - time_us, end_us)
        for event, time_us, end_us in zip(found, times_us, ends_us, strict=True)
    ]
