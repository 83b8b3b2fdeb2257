"""Paged attention: launch parameters ranked by the geometric mean of their gains over the shipped ones.

Each candidate is checked against float32 on each batch before it is timed.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import torch
from triton import OutOfResources

from octavo_kernels.launch import variant_of
from octavo_kernels.ops import paged_decode, paged_prefill
from octavo_kernels.tuning.attention_batches import (
    Batch,
    Example,
    Run,
    decode_batches,
    largest_error,
    make_example,
    prefill_batches,
    speed,
)
from octavo_kernels.tuning.targets import Heads
from octavo_kernels.tuning.timing import median_us

_TOLERANCE: Final = 2e-2

# What two rows of a table have in common where the later one replaces the earlier one.
ROW_KEYS: Final = ("kind", "num_heads", "num_kv_heads", "head_dim", "cache_dtype")

Launch = paged_decode.Launch | paged_prefill.Launch
Kind = Literal["decode", "many decodes", "prefill"]

DECODE_LAUNCHES: Final = tuple(
    paged_decode.Launch(tile_bytes, min_tiles, workers, num_warps, num_stages, combined_elements)
    for (tile_bytes, num_stages, workers, num_warps), min_tiles, combined_elements in itertools.product(
        (
            (16_384, 3, 2, 4), (16_384, 4, 2, 4), (8_192, 3, 2, 4), (8_192, 4, 2, 4),
            (8_192, 3, 4, 2), (8_192, 4, 4, 2), (32_768, 3, 1, 4), (16_384, 5, 1, 4),
        ),
        (1, 2), (1024, 2048),
    )
)  # fmt: skip
PREFILL_LAUNCHES: Final = (
    paged_prefill.Launch(128, 16_384, num_warps=8, num_stages=3),
    paged_prefill.Launch(128, 16_384, num_warps=8, num_stages=2),
    paged_prefill.Launch(128, 32_768, num_warps=8, num_stages=2),
    paged_prefill.Launch(128, 8_192, num_warps=4, num_stages=3),
    paged_prefill.Launch(64, 16_384, num_warps=4, num_stages=2),
    paged_prefill.Launch(64, 16_384, num_warps=4, num_stages=3),
    paged_prefill.Launch(64, 8_192, num_warps=4, num_stages=3),
)


@dataclass(frozen=True, slots=True)
class Job:
    """What is tuned together: one kernel for one set of heads. shipped: what serving launches for all the batches."""

    kind: Kind
    heads: Heads
    batches: tuple[Batch, ...]
    shipped: Launch
    candidates: tuple[Launch, ...]


def jobs(all_heads: Sequence[Heads], cache_dtype: torch.dtype, device: torch.device) -> Iterator[Job]:
    """Decodes and chunks of all these heads; many decodes by themselves, where they have a launch of their own."""
    variant = variant_of(device)
    for heads in all_heads:
        by_launch: dict[paged_decode.Launch, list[Batch]] = {}
        for batch in decode_batches():
            shipped = paged_decode.launch_for(variant, heads.head_dim, cache_dtype, len(batch.query_lens))
            by_launch.setdefault(shipped, []).append(batch)
        for shipped, batches in by_launch.items():
            kind: Kind = "decode" if shipped == paged_decode.LAUNCH[variant] else "many decodes"
            yield Job(kind, heads, tuple(batches), shipped, DECODE_LAUNCHES)
    for heads in all_heads:
        launch = paged_prefill.launch_for(variant, heads.head_dim)
        yield Job("prefill", heads, tuple(prefill_batches()), launch, PREFILL_LAUNCHES)


def tune_attention(
    all_jobs: Sequence[Job],
    cache_dtype: torch.dtype,
    device: torch.device,
    on_rows: Callable[[list[Mapping[str, Any]]], None],
    report: Callable[[str], None],
    *,
    deadline_s: float,
) -> None:
    """Rank the candidates of each job and hand on the rows, best first: what was tuned, the gain, the launch.

    deadline_s: time.monotonic() after which no further job is begun; report: takes lines for the user
    """
    torch.manual_seed(0)
    for job in all_jobs:
        if time.monotonic() > deadline_s:
            report(f"out of time before {job.kind} of {job.heads}")
            return
        examples = [make_example(batch, job.heads, cache_dtype, device) for batch in job.batches]
        gains = _gains(job, examples, report)
        for launch, gain in gains.items():
            report(f"{gain:6.3f} x the shipped speed: {launch}")
        what = {"kind": job.kind, **asdict(job.heads), "cache_dtype": str(cache_dtype).removeprefix("torch.")}
        on_rows([{**what, "launches": [{"gain": round(gain, 3), **asdict(each)} for each, gain in gains.items()]}])


def _gains(job: Job, examples: Sequence[Example], report: Callable[[str], None]) -> dict[Launch, float]:
    """By how much faster each launch is than the shipped one, over all batches; best first. The shipped has 1."""
    baseline = [_measure_us(example, job.shipped, report) for example in examples]
    gains: dict[Launch, float] = {job.shipped: 1.0}
    for launch in job.candidates:
        if launch == job.shipped:
            continue
        times = [_measure_us(example, launch, report) for example in examples]
        pairs = [(before, after) for before, after in zip(baseline, times, strict=True) if before and after]
        if len(pairs) == len(examples):
            gains[launch] = statistics.geometric_mean(before / after for before, after in pairs)
    return dict(sorted(gains.items(), key=lambda item: -item[1]))


def _measure_us(example: Example, launch: Launch, report: Callable[[str], None]) -> float | None:
    """Microseconds of one layer; None if the kernel does not fit or is wrong."""
    try:
        run = _runner(example, launch)
        error = largest_error(example, run)
        layers = example.cache.unbind(1)
        output = torch.empty_like(example.query)
        us = median_us(lambda copy: run(output, layers[copy]), len(layers), example.query.device)
    except OutOfResources as reason:
        report(f"{'':24}  does not fit: {launch}: {reason}")
        return None
    heads = example.heads
    title = f"{example.batch.name} ({heads.num_heads}/{heads.num_kv_heads}/{heads.head_dim})"
    verdict = "" if error < _TOLERANCE else "  WRONG"
    report(f"{title:36} {us:9.1f} us {speed(example, us)}  error {error:.1e}{verdict}  {launch}")
    return None if verdict else us


def _runner(example: Example, launch: Launch) -> Run:
    """Attention of one layer, over a plan made once."""
    layer, dtype = example.cache[:, 0], example.query.dtype
    if isinstance(launch, paged_decode.Launch):
        decodes = paged_decode.plan_decodes(example.metadata, layer, dtype, launch=launch)
        return lambda output, cache: paged_decode.run_decodes(output, example.query, cache, decodes, example.scoring)
    chunks = paged_prefill.plan_chunks(example.metadata, layer, dtype, launch=launch)
    return lambda output, cache: paged_prefill.run_chunks(output, example.query, cache, chunks, example.scoring)
