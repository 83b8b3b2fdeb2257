"""The two comparisons of `octavo bench batching`: run, show, record, draw."""

import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from octavo_engine.bench import batching_report, plots
from octavo_engine.bench.allocation import CacheShape, allocate_blocks, reserve_exactly, reserve_maximum
from octavo_engine.bench.batching import run_continuous, run_static
from octavo_engine.bench.client import Endpoint
from octavo_engine.bench.machine import describe_machine
from octavo_engine.bench.report import append_json_lines
from octavo_engine.bench.serving import DEFAULT_URL, find_endpoint, started_server
from octavo_engine.bench.workloads import make_lengths, make_requests, named

_SIMULATED_WORKLOAD = named("sharegpt")
# Halved lengths keep the shape of the distribution, which decides the ratio, and bring the run down to minutes.
_SERVED_WORKLOAD = named("sharegpt-small")
_NUM_SIMULATED_REQUESTS = 1000
_WARM_UP_SEED = 1 << 31


def compare_allocation(
    cache_tokens: int, max_model_len: int, seed: int, plots_folder: Path | None, output: Path | None
) -> None:
    """Blocks on demand against reservation, in the same bytes of KV cache."""
    cache = CacheShape(cache_tokens, max_model_len=max_model_len)
    lengths = make_lengths(_SIMULATED_WORKLOAD, seed, _NUM_SIMULATED_REQUESTS)
    blocks, reserved = allocate_blocks(lengths, cache), reserve_maximum(lengths, cache)
    foreseen = reserve_exactly(lengths, cache)
    batching_report.print_allocation(Console(), cache, blocks, reserved, foreseen)
    if plots_folder:
        title = f"One KV cache of {cache.num_tokens} tokens, {_NUM_SIMULATED_REQUESTS} ShareGPT-like requests waiting"
        plots.plot_allocation(plots_folder / "batching-memory.svg", blocks, reserved, foreseen, title)
    if output:
        results = (("blocks", blocks), ("reserve-maximum", reserved), ("reserve-exactly", foreseen))
        records = [batching_report.allocation_record(name, cache, seed, result) for name, result in results]
        append_json_lines(output, records)


def compare_batching(
    endpoint: Endpoint,
    batch_size: int,
    num_requests: int,
    seed: int,
    time_limit_s: float,
    plots_folder: Path | None,
    output: Path | None,
) -> None:
    """Continuous against static batching of the server at `endpoint`."""
    console = Console()
    warm_up = make_requests(_SERVED_WORKLOAD, _WARM_UP_SEED, num_requests=2)
    run_continuous(endpoint, warm_up, batch_size, time_limit_s)
    # Prompts of its own for each policy, of equal lengths: what one left in the prefix cache must not help the next.
    requests, for_padded, for_shrinking = (
        make_requests(_SERVED_WORKLOAD, seed, num_requests=num_requests, prompt_seed=seed + i) for i in range(3)
    )
    with console.status("continuous batching ..."):
        continuous = run_continuous(endpoint, requests, batch_size, time_limit_s)
    with console.status("static batching, padded ..."):
        padded = run_static(endpoint, for_padded, batch_size, time_limit_s, is_padded=True)
    with console.status("static batching, shrinking ..."):
        shrinking = run_static(endpoint, for_shrinking, batch_size, time_limit_s, is_padded=False)
    batching_report.print_batching(console, batch_size, continuous, padded, shrinking)
    if plots_folder:
        title = f"{num_requests} ShareGPT-like requests, {batch_size} at once, {endpoint.model} on the CPU"
        plots.plot_batching(plots_folder / "batching-latency.svg", continuous, padded, shrinking, title)
    if output:
        machine = asdict(describe_machine())
        append_json_lines(
            output,
            [
                {**batching_report.batching_record(name, endpoint.model, batch_size, seed, result), "machine": machine}
                for name, result in (
                    ("continuous", continuous),
                    ("static-padded", padded),
                    ("static-shrinking", shrinking),
                )
            ],
        )


@contextlib.contextmanager
def serving_endpoint(model: str | None, url: str | None, batch_size: int, max_model_len: int) -> Iterator[Endpoint]:
    """The server at `url`, or one that serves `model` until the block ends."""
    with contextlib.ExitStack() as stack:
        if model:
            flags = ["--max-num-seqs", str(batch_size), "--max-model-len", str(max_model_len)]
            url = stack.enter_context(started_server(model, flags)).url
        yield find_endpoint(url or DEFAULT_URL, None, allow_remote=False, api_key=None)
