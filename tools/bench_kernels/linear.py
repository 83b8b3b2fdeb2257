"""Measures linear layers of few tokens on one GPU: cuBLAS against Octavo's kernels, and writes the table of winners.

    PYTHONPATH=kernels python3 tools/bench_kernels/linear.py --output $OUT

Every candidate is checked against float32 and must give the same bits twice. Times are medians over replays of a CUDA
graph of many calls, which take turns with several copies of the weight, so that the L2 cache is of no help. The table,
named by the row of the hardware table, is shipped as `kernels/octavo_kernels/linear_choices/<name>.json`.
"""
# mypy: disable-error-code="no-untyped-call"

import argparse
import heapq
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Final

import torch
import triton
from octavo_kernels.hardware import identify_gpu
from octavo_kernels.linear_choice import Choice, Launch, LinearChoices, LinearShape, by_num_tokens, write_choices
from octavo_kernels.ops import gemv, small_m_linear
from octavo_kernels.ops.gemv import reference
from octavo_kernels.ops.linear import GpuLinear
from octavo_kernels.ops.silu_and_mul import silu_and_mul
from torch.nn import functional

_DTYPE: Final = torch.bfloat16
# ||output - float32|| / ||float32||; rounding to bfloat16 alone makes 1.7e-3, and gated outputs round up to thrice.
_TOLERANCE: Final = 5e-3
# Together the copies of a weight are several times the L2 cache.
_COPIED_BYTES: Final = 320 << 20
_MIN_CALLS: Final = 16
_NUM_REPLAYS: Final = 9
# What counts as faster than cuBLAS, above the noise.
_MIN_GAIN: Final = 1.01
_DTYPE_BYTES: Final = 2


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer of a model, which has `count` of it."""

    name: str
    count: int
    shape: LinearShape


MODELS: Final[Mapping[str, tuple[Layer, ...]]] = {
    "llama-8b": (
        Layer("qkv", 32, LinearShape(6144, 4096)),
        Layer("o", 32, LinearShape(4096, 4096)),
        Layer("gate_up", 32, LinearShape(28672, 4096)),
        Layer("gate_up gated", 0, LinearShape(28672, 4096, is_gated=True)),
        Layer("down", 32, LinearShape(4096, 14336)),
        Layer("head", 1, LinearShape(128256, 4096)),
    ),
    "llama-1b": (
        Layer("qkv", 16, LinearShape(3072, 2048)),
        Layer("o", 16, LinearShape(2048, 2048)),
        Layer("gate_up", 16, LinearShape(16384, 2048)),
        Layer("gate_up gated", 0, LinearShape(16384, 2048, is_gated=True)),
        Layer("down", 16, LinearShape(2048, 8192)),
        Layer("head", 1, LinearShape(128256, 2048)),
    ),
}

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


def dot_launches(shape: LinearShape, num_tokens: int, num_multiprocessors: int) -> Iterator[small_m_linear.Launch]:
    """Each tile with the two numbers of splits that come nearest to two programs for each multiprocessor."""
    for tile in _DOT_TILES:
        block_m = max(16, triton.next_power_of_2(num_tokens))
        if tile.num_stages * tile.block_k * (tile.block_n + block_m) * _DTYPE_BYTES > 220 << 10:
            continue
        num_tiles = triton.cdiv(shape.out_features, tile.block_n)
        possible = [n for n in _NUM_SPLITS if shape.in_features >= 4 * tile.block_k * n]
        wanted = 2 * num_multiprocessors / num_tiles
        yield from (replace(tile, num_splits=n) for n in heapq.nsmallest(2, possible, key=partial(_distance, wanted)))


def _distance(wanted: float, num_splits: int) -> float:
    return abs(math.log(num_splits / wanted))


def candidates(shape: LinearShape, num_tokens: int, num_multiprocessors: int) -> list[OwnLaunch]:
    """What is tried besides cuBLAS."""
    gemvs = _GEMV_LAUNCHES if num_tokens <= gemv.MAX_TOKENS else ()
    return [*gemvs, *dot_launches(shape, num_tokens, num_multiprocessors)]


class Bench:
    """One weight, in as many copies as it takes to keep it out of the L2 cache."""

    def __init__(self, shape: LinearShape, num_copies: int) -> None:
        size = (shape.out_features, shape.in_features)
        self.shape = shape
        self.generator = torch.Generator("cuda").manual_seed(0)
        self.weights = [
            torch.empty(size, dtype=_DTYPE, device="cuda").normal_(0, 0.02, generator=self.generator)
            for _ in range(num_copies)
        ]
        self.arrivals = torch.zeros(shape.out_features, dtype=torch.int32, device="cuda")

    def hidden(self, num_tokens: int) -> torch.Tensor:
        """Fresh inputs."""
        size = (num_tokens, self.shape.in_features)
        return torch.randn(size, dtype=_DTYPE, device="cuda", generator=self.generator)

    def call(self, launch: Launch, hidden: torch.Tensor, copy: int = 0) -> torch.Tensor:
        """The layer, once. No launch: cuBLAS and, gated, the activation by itself."""
        weight, is_gated = self.weights[copy], self.shape.is_gated
        if isinstance(launch, gemv.Launch):
            return gemv.gemv(hidden, weight, None, launch, is_gated=is_gated)
        if isinstance(launch, small_m_linear.Launch):
            return small_m_linear.small_m_linear(hidden, weight, None, launch, self.arrivals, is_gated=is_gated)
        output = functional.linear(hidden, weight)
        return silu_and_mul(output) if is_gated else output

    def time_us(self, launch: Launch, hidden: torch.Tensor) -> float:
        """Microseconds of one call."""
        return median_us(lambda copy: self.call(launch, hidden, copy), len(self.weights))

    def fallback_us(self, hidden: torch.Tensor, plain: LinearChoices) -> float:
        """Microseconds of the layer with the best plain kernel and, gated, the activation by itself."""
        layers = [GpuLinear(weight, None, plain) for weight in self.weights]
        return median_us(lambda copy: layers[copy].silu_and_mul(hidden), len(layers))

    def is_right(self, launch: Launch, hidden: torch.Tensor, expected: torch.Tensor) -> bool:
        """Whether a candidate computes the layer, writes all of its output and repeats itself to the bit."""
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
        first, second = self.call(launch, hidden), self.call(launch, hidden)
        torch.use_deterministic_algorithms(False)
        error = float((first.float() - expected).norm() / expected.norm())
        is_right = error < _TOLERANCE and torch.equal(first, second)
        if not is_right:
            print(f"WRONG: {launch}, error {error:.2e}, repeats itself: {torch.equal(first, second)}", flush=True)
        return is_right


def median_us(run: Callable[[int], object], num_copies: int) -> float:
    """Microseconds of one call, from a graph that calls with the number of each copy in turn."""
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


def compile_key(shape: LinearShape, num_tokens: int, launch: OwnLaunch) -> tuple[object, ...]:
    """What decides whether two launches share machine code."""
    if isinstance(launch, gemv.Launch):
        return launch, shape.is_gated, num_tokens, shape.in_features % launch.block_k == 0
    is_even = shape.in_features % (launch.block_k * launch.num_splits) == 0
    return launch, shape.is_gated, max(16, triton.next_power_of_2(num_tokens)), is_even


Job = tuple[LinearShape, int, OwnLaunch]


def compile_job(job: Job) -> None:
    """Run a launch once in a process of its own, which leaves its machine code in Triton's cache."""
    shape, num_tokens, launch = job
    bench = Bench(shape, num_copies=1)
    bench.call(launch, bench.hidden(num_tokens))
    torch.cuda.synchronize()


def compile_all(
    layers: Iterable[Layer], all_num_tokens: Iterable[int], num_multiprocessors: int, num_jobs: int
) -> None:
    """Compile every candidate in parallel, each for the smallest weight that needs it."""
    jobs: dict[tuple[object, ...], Job] = {}
    for layer in sorted(layers, key=lambda layer: layer.shape.out_features * layer.shape.in_features):
        for num_tokens in all_num_tokens:
            for launch in candidates(layer.shape, num_tokens, num_multiprocessors):
                jobs.setdefault(compile_key(layer.shape, num_tokens, launch), (layer.shape, num_tokens, launch))
    start = time.monotonic()
    with ProcessPoolExecutor(num_jobs, mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_job, jobs.values(), chunksize=2))
    print(f"compiled {len(jobs)} kernels in {time.monotonic() - start:.0f} s", flush=True)


@dataclass(frozen=True, slots=True)
class Measured:
    """A layer and a number of tokens. pdl_us: the winner with programmatic dependent launch, if it was asked for.

    fallback_us: gated, the best plain kernel and a separate activation; else cuBLAS
    """

    layer: Layer
    choice: Choice
    fallback_us: float
    best_own: OwnLaunch
    best_own_us: float
    pdl_us: float | None


def measure_layer(
    layer: Layer, all_num_tokens: list[int], plain: LinearChoices, *, with_pdl: bool
) -> Iterator[Measured]:
    """Measure one weight for each number of tokens. plain: what was chosen so far, for what a gate falls back to."""
    shape = layer.shape
    num_bytes = shape.out_features * shape.in_features * _DTYPE_BYTES
    bench = Bench(shape, max(2, _COPIED_BYTES // num_bytes))
    num_multiprocessors = torch.cuda.get_device_properties("cuda").multi_processor_count
    for num_tokens in all_num_tokens:
        hidden = bench.hidden(num_tokens)
        expected = reference(hidden, bench.weights[0], None, is_gated=shape.is_gated)
        cublas_us = bench.time_us(None, hidden)
        fallback_us = bench.fallback_us(hidden, plain) if shape.is_gated else cublas_us
        times = {
            launch: bench.time_us(launch, hidden)
            for launch in candidates(shape, num_tokens, num_multiprocessors)
            if bench.is_right(launch, hidden, expected)
        }
        best = min(times, key=times.__getitem__)
        wins = times[best] * _MIN_GAIN < fallback_us
        us = times[best] if wins else fallback_us
        choice = Choice(shape, num_tokens, best if wins else None, round(us, 2), round(cublas_us, 2))
        pdl_us = bench.time_us(replace(best, use_pdl=True), hidden) if with_pdl else None
        yield Measured(layer, choice, fallback_us, best, times[best], pdl_us)


def describe(launch: OwnLaunch) -> str:
    """A launch in a table."""
    if isinstance(launch, gemv.Launch):
        return f"gemv n{launch.block_n} k{launch.block_k} w{launch.num_warps}"
    return f"dot n{launch.block_n} k{launch.block_k} x{launch.num_splits} w{launch.num_warps} s{launch.num_stages}"


def print_row(model: str, measured: Measured) -> None:
    """One line of the table."""
    shape, choice = measured.layer.shape, measured.choice
    terabytes = shape.out_features * shape.in_features * _DTYPE_BYTES / 1e6
    pdl = "" if measured.pdl_us is None else f"  pdl {measured.pdl_us:7.2f}"
    print(
        f"{model:8} {measured.layer.name:13} {choice.num_tokens:3}  cublas {choice.cublas_us:7.2f} us "
        f"{terabytes / choice.cublas_us:4.2f} TB/s  fallback {measured.fallback_us:7.2f}  "
        f"own {measured.best_own_us:7.2f} us {terabytes / measured.best_own_us:4.2f} TB/s "
        f"{describe(measured.best_own):24} x{measured.fallback_us / measured.best_own_us:4.2f}"
        f"{'  WIN' if choice.launch is not None else ''}{pdl}",
        flush=True,
    )


def print_totals(model: str, rows: list[Measured]) -> None:
    """All linear layers of a step, in milliseconds."""
    for num_tokens in sorted({row.choice.num_tokens for row in rows}):
        of_step = [row for row in rows if row.choice.num_tokens == num_tokens]
        cublas = sum(row.layer.count * row.choice.cublas_us for row in of_step) / 1e3
        chosen = sum(row.layer.count * row.choice.us for row in of_step) / 1e3
        num_features = sum(
            row.layer.count * row.layer.shape.out_features * row.layer.shape.in_features for row in of_step
        )
        terabytes = num_features * _DTYPE_BYTES / chosen / 1e9
        print(
            f"{model:8} a step of {num_tokens:2}: cublas {cublas:.3f} ms, chosen {chosen:.3f} ms, {terabytes:.2f} TB/s"
        )


def main() -> None:
    options = _parse()
    deadline = time.monotonic() + options.time_limit_s
    properties = torch.cuda.get_device_properties("cuda")
    models = {model: [layer for layer in MODELS[model] if options.layers in layer.name] for model in options.models}
    compile_all(
        [layer for layers in models.values() for layer in layers],
        options.tokens, properties.multi_processor_count, options.jobs,
    )  # fmt: skip
    path = options.output / f"{identify_gpu(properties.name).hardware.name}.json"
    choices: list[Choice] = []
    for model, layers in models.items():
        rows: list[Measured] = []
        for layer in layers:
            if time.monotonic() > deadline:
                print(f"out of time before {model} {layer.name}", flush=True)
                break
            for row in measure_layer(layer, options.tokens, by_num_tokens(choices), with_pdl=options.pdl):
                print_row(model, row)
                rows.append(row)
            choices += [row.choice for row in rows if row.layer is layer]
            write_choices(path, choices, origin(properties.name))
            torch.cuda.empty_cache()
        print_totals(model, rows)
    print(f"wrote {path}", flush=True)


def origin(gpu: str) -> dict[str, str]:
    """Where a table's numbers come from."""
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return {"gpu": gpu, **versions, "date": f"{datetime.now(UTC):%Y-%m-%d}"}


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--layers", default="", help="only layers with this in their name")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--pdl", action="store_true", help="time winners with programmatic dependent launch, too")
    parser.add_argument("--jobs", type=int, default=max((os.cpu_count() or 2) - 2, 1), help="processes that compile")
    parser.add_argument("--time-limit-s", type=float, default=240, help="no further layer is begun after this time")
    parser.add_argument("--output", type=Path, default=Path("."), help="folder of the table")
    return parser.parse_args()


if __name__ == "__main__":
    main()
