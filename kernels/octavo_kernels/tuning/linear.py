"""Linear layers of up to some hundred tokens: cuBLAS against cuBLASLt's other algorithms and Octavo's kernels.

Every candidate is checked against float32 and must give the same bits twice before it is timed.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Final

import torch

from octavo_kernels.linear_choice import Choice, Launch, LinearChoices, LinearShape, by_num_tokens, understood
from octavo_kernels.ops.gemv import reference
from octavo_kernels.ops.linear import GpuLinear, run_launch
from octavo_kernels.tuning.linear_candidates import OwnLaunch, candidates, compile_key, describe, proposals
from octavo_kernels.tuning.targets import Layer, Target
from octavo_kernels.tuning.timing import median_us

NUM_TOKENS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_DTYPE: Final = torch.bfloat16
_DTYPE_BYTES: Final = 2
# ||output - float32|| / ||float32||; rounding to bfloat16 alone makes 1.7e-3, and gated outputs round up to thrice.
_TOLERANCE: Final = 5e-3
# Together the copies of a weight are several times the L2 cache.
_COPIED_BYTES: Final = 320 << 20
# What counts as faster than cuBLAS, above the noise.
_MIN_GAIN: Final = 1.01

Report = Callable[[str], None]


class Bench:
    """One weight, in as many copies as it takes to keep it out of the L2 cache."""

    def __init__(self, shape: LinearShape, num_copies: int, device: torch.device) -> None:
        size = (shape.out_features, shape.in_features)
        self.shape, self.device = shape, device
        self.generator = torch.Generator(device).manual_seed(0)
        self.weights = [
            torch.empty(size, dtype=_DTYPE, device=device).normal_(0, 0.02, generator=self.generator)
            for _ in range(num_copies)
        ]
        self.arrivals = torch.zeros(shape.out_features, dtype=torch.int32, device=device)

    def hidden(self, num_tokens: int) -> torch.Tensor:
        """Fresh inputs."""
        size = (num_tokens, self.shape.in_features)
        return torch.randn(size, dtype=_DTYPE, device=self.device, generator=self.generator)

    def call(self, launch: Launch | None, hidden: torch.Tensor, copy: int = 0) -> torch.Tensor:
        """The layer, once. No launch: cuBLAS and, gated, the activation by itself."""
        return run_launch(launch, hidden, self.weights[copy], None, self.arrivals, is_gated=self.shape.is_gated)

    def time_us(self, launch: Launch | None, hidden: torch.Tensor) -> float:
        """Microseconds of one call."""
        return median_us(lambda copy: self.call(launch, hidden, copy), len(self.weights), self.device)

    def fallback_us(self, hidden: torch.Tensor, plain: LinearChoices) -> float:
        """Microseconds of the layer with the best plain kernel and, gated, the activation by itself."""
        layers = [GpuLinear(weight, None, plain) for weight in self.weights]
        return median_us(lambda copy: layers[copy].silu_and_mul(hidden), len(layers), self.device)

    def problem_of(self, launch: Launch, hidden: torch.Tensor, expected: torch.Tensor) -> str | None:
        """Why a candidate may not be chosen: its error, a gap in its output, other bits the second time; or None."""
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
        first, second = self.call(launch, hidden), self.call(launch, hidden)
        torch.use_deterministic_algorithms(False)
        error = float((first.float() - expected).norm() / expected.norm())
        if not torch.equal(first, second):
            return "does not repeat itself"
        return None if error < _TOLERANCE else f"error {error:.2e}"


@dataclass(frozen=True, slots=True)
class Measured:
    """A layer and a number of tokens.

    fallback_us: gated, the best plain kernel and a separate activation; else cuBLAS
    best:        of what was tried besides; None where there is nothing
    """

    layer: Layer
    choice: Choice
    fallback_us: float
    best: Launch | None
    best_us: float


def tune_linear(
    targets: Sequence[Target],
    all_num_tokens: Sequence[int],
    known: Sequence[Choice],
    device: torch.device,
    on_choices: Callable[[list[Choice]], None],
    report: Report,
    *,
    num_processes: int,
    deadline_s: float,
) -> None:
    """Measure every layer of the targets and hand on each one's choices as soon as they are known.

    known: what was measured on this GPU before, which a gate may fall back to
    deadline_s: time.monotonic() after which no further layer is begun; report: takes lines for the user
    """
    layers = [layer for target in targets for layer in target.layers]
    if device.type == "cuda":
        _compile_all(layers, all_num_tokens, device, num_processes, report)
    choices = [understood(choice) for choice in known]
    for target in targets:
        rows: list[Measured] = []
        for layer in target.layers:
            if time.monotonic() > deadline_s:
                report(f"out of time before {target.name} {layer.name}")
                return
            bench = Bench(layer.shape, _num_copies(layer.shape, device), device)
            plain = by_num_tokens(choice for choice in choices if not choice.shape.is_gated)
            measured = _measure(bench, layer, all_num_tokens, plain, report)
            new = []
            for row in measured:
                report(_row(target.name, row))
                new.append(row)
            rows += new
            choices += [row.choice for row in new]
            on_choices([row.choice for row in new])
        for line in _totals(target.name, rows):
            report(line)


def _num_copies(shape: LinearShape, device: torch.device) -> int:
    num_bytes = shape.out_features * shape.in_features * _DTYPE_BYTES
    return max(2, _COPIED_BYTES // num_bytes) if device.type == "cuda" else 1


def _measure(
    bench: Bench,
    layer: Layer,
    all_num_tokens: Iterable[int],
    plain: LinearChoices,
    report: Report,
) -> Iterator[Measured]:
    """One weight for each number of tokens. plain: what was chosen without a gate, which one falls back to."""
    shape = layer.shape
    for num_tokens in all_num_tokens:
        hidden = bench.hidden(num_tokens)
        expected = reference(hidden, bench.weights[0], None, is_gated=shape.is_gated)
        cublas_us = bench.time_us(None, hidden)
        fallback_us = bench.fallback_us(hidden, plain) if shape.is_gated else cublas_us
        times: dict[Launch, float] = {}
        tried = candidates(shape, num_tokens, bench.device)
        for launch in (*tried, *proposals(shape, num_tokens, _DTYPE, bench.device)):
            if problem := bench.problem_of(launch, hidden, expected):
                report(f"WRONG: {launch}: {problem}")
            else:
                times[launch] = bench.time_us(launch, hidden)
        best = min(times, key=times.__getitem__, default=None)
        best_us = fallback_us if best is None else times[best]
        wins = best_us * _MIN_GAIN < fallback_us
        us = best_us if wins else fallback_us
        choice = Choice(shape, num_tokens, best if wins else None, round(us, 2), round(cublas_us, 2))
        yield Measured(layer, choice, fallback_us, best, best_us)


Job = tuple[LinearShape, int, OwnLaunch]


def _compile_job(job: Job) -> None:
    """Run a launch once in a process of its own, which leaves its machine code in Triton's cache."""
    shape, num_tokens, launch = job
    bench = Bench(shape, num_copies=1, device=torch.device("cuda"))
    bench.call(launch, bench.hidden(num_tokens))
    torch.cuda.synchronize()


def _compile_all(
    layers: Iterable[Layer],
    all_num_tokens: Sequence[int],
    device: torch.device,
    num_processes: int,
    report: Report,
) -> None:
    """Compile every candidate in parallel, each for the smallest weight that needs it."""
    jobs: dict[tuple[object, ...], Job] = {}
    for layer in sorted(layers, key=lambda layer: layer.shape.out_features * layer.shape.in_features):
        for num_tokens in all_num_tokens:
            for launch in candidates(layer.shape, num_tokens, device):
                jobs.setdefault(compile_key(layer.shape, num_tokens, launch), (layer.shape, num_tokens, launch))
    start_s = time.monotonic()
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        list(pool.map(_compile_job, jobs.values(), chunksize=2))
    report(f"compiled {len(jobs)} kernels in {time.monotonic() - start_s:.0f} s")


def _row(target: str, measured: Measured) -> str:
    shape, choice = measured.layer.shape, measured.choice
    megabytes = shape.out_features * shape.in_features * _DTYPE_BYTES / 1e6
    return (
        f"{target:8} {measured.layer.name:13} {choice.num_tokens:3}  cublas {choice.cublas_us:7.2f} us "
        f"{megabytes / choice.cublas_us:4.2f} TB/s  fallback {measured.fallback_us:7.2f}  "
        f"best {measured.best_us:7.2f} us {megabytes / measured.best_us:4.2f} TB/s "
        f"{describe(measured.best) if measured.best else '':24} x{measured.fallback_us / measured.best_us:4.2f}"
        f"{'  WIN' if choice.launch is not None else ''}"
    )


def _totals(target: str, rows: Sequence[Measured]) -> Iterator[str]:
    """All linear layers of a step."""
    for num_tokens in sorted({row.choice.num_tokens for row in rows}):
        of_step = [row for row in rows if row.choice.num_tokens == num_tokens]
        cublas = sum(row.layer.count * row.choice.cublas_us for row in of_step) / 1e3
        chosen = sum(row.layer.count * row.choice.us for row in of_step) / 1e3
        num_weights = sum(
            row.layer.count * row.layer.shape.out_features * row.layer.shape.in_features for row in of_step
        )
        if chosen:
            terabytes = num_weights * _DTYPE_BYTES / chosen / 1e9
            yield (
                f"{target:8} a step of {num_tokens:2}: cublas {cublas:.3f} ms, chosen {chosen:.3f} ms, "
                f"{terabytes:.2f} TB/s"
            )
