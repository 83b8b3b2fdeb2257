"""Shows the batching results as tables and JSON lines. Of figures, it computes only ratios."""

from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from octavo_engine.bench.allocation import AllocationResult, CacheShape
from octavo_engine.bench.batching import BatchingResult


def print_allocation(
    console: Console,
    cache: CacheShape,
    blocks: AllocationResult,
    reserved: AllocationResult,
    foreseen: AllocationResult,
) -> None:
    """Ways of allocation as rows, and the two ratios below."""
    table = Table(
        title=f"KV cache of {cache.num_tokens} tokens, contexts of up to {cache.max_model_len}",
        title_justify="left",
    )
    for heading in ("allocation", "mean", "most", "wasted", "idle", "steps", "preempted"):
        table.add_column(heading, justify="left" if heading == "allocation" else "right")
    for name, result in (
        ("blocks on demand", blocks),
        ("maximum length reserved", reserved),
        ("final length reserved", foreseen),
    ):
        table.add_row(
            name,
            f"{result.mean_running:.1f}",
            str(result.max_running),
            f"{result.wasted_share:.1%}",
            f"{result.idle_share:.1%}",
            str(result.num_steps),
            str(result.num_preemptions),
        )
    console.print(table)
    mean_ratio = blocks.mean_running / reserved.mean_running
    max_ratio = blocks.max_running / reserved.max_running
    console.print(
        f"blocks on demand hold {mean_ratio:.2f}x (mean) and {max_ratio:.2f}x (most) the requests of the maximum "
        f"length's reservation, and waste {blocks.wasted_share:.1%} of the cache",
        highlight=False,
    )


def print_batching(
    console: Console, batch_size: int, continuous: BatchingResult, padded: BatchingResult, shrinking: BatchingResult
) -> None:
    """Policies as rows, and the ratios below."""
    table = Table(title=f"{len(continuous.served)} requests, {batch_size} at once, one server", title_justify="left")
    for heading in ("batching", "out tokens/s", "duration s", "short: median s", "short: worst s/token"):
        table.add_column(heading, justify="left" if heading == "batching" else "right")
    for name, result in (
        ("continuous", continuous),
        ("static, padded", padded),
        ("static, shrinking", shrinking),
    ):
        table.add_row(
            name,
            f"{result.output_tokens_per_s:.1f}",
            f"{result.duration_s:.1f}",
            f"{result.median_short_latency_s:.2f}",
            f"{result.worst_short_s_per_token:.3f}",
        )
    console.print(table)
    over_padded, over_shrinking = (
        continuous.output_tokens_per_s / each.output_tokens_per_s for each in (padded, shrinking)
    )
    console.print(
        f"continuous batching has {over_padded:.2f}x the throughput of static batching, "
        f"and {over_shrinking:.2f}x that of a static batch that shrinks",
        highlight=False,
    )


def allocation_record(name: str, cache: CacheShape, seed: int, result: AllocationResult) -> dict[str, object]:
    """One way of allocation as a JSON line, without its timeline."""
    figures = {key: value for key, value in asdict(result).items() if key != "timeline"}
    return {"kind": "allocation", "label": name, "seed": seed, "cache": asdict(cache), **figures}


def batching_record(name: str, model: str, batch_size: int, seed: int, result: BatchingResult) -> dict[str, object]:
    """One policy as a JSON line."""
    return {
        "kind": "batching",
        "label": name,
        "model": model,
        "batch_size": batch_size,
        "seed": seed,
        "num_requests": len(result.served),
        "duration_s": result.duration_s,
        "output_tokens_per_s": result.output_tokens_per_s,
        "median_short_latency_s": result.median_short_latency_s,
        "worst_short_s_per_token": result.worst_short_s_per_token,
    }
