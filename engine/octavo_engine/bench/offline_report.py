"""Tables and JSON lines of `octavo bench offline`. Beside percentages it computes no figure."""

from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from octavo_engine.bench.offline import OfflineResult
from octavo_engine.bench.report import spread_text
from octavo_engine.bench.roofline import Floors, Rates
from octavo_engine.bench.step_profile import KernelShare, StepProfile

_NUM_SHOWN_KERNELS = 25
_MAX_NAME_LENGTH = 90


def offline_record(result: OfflineResult, floors: Floors, rates: Rates) -> dict[str, object]:
    """One workload with all that is needed to run it again. Percentages: lower bound over median."""
    duration_s = result.duration_s
    spread_percent = 100 * (duration_s.highest - duration_s.lowest) / duration_s.median
    return {
        "kind": "offline",
        "workload": asdict(result.workload),
        "num_requests": len(result.lengths),
        "times_s": result.times_s,
        "median_s": duration_s.median,
        "spread_percent": spread_percent,
        "output_tokens_per_s": result.output_tokens_per_s,
        "total_tokens_per_s": result.total_tokens_per_s,
        "first_token_times_s": result.first_token_times_s,
        "first_token_ms": result.first_token_ms,
        "decode_ms_per_token": result.decode_ms_per_token,
        "ms_per_token": _ms_per_token(result),
        "num_distinct_ends": result.num_distinct_ends,
        "rates": asdict(rates),
        "floors": asdict(floors),
        "percent_of_strict": 100 * floors.strict_s / duration_s.median,
        "percent_of_serial": 100 * floors.serial_s / duration_s.median,
        "percent_of_serial_shared": 100 * floors.serial_shared_s / duration_s.median,
    }


def _ms_per_token(result: OfflineResult) -> float | None:
    """Milliseconds per token of the longest answer, prefill included, where prefill is taken apart, too."""
    if not result.workload.splits_prefill:
        return None
    return result.duration_s.median * 1e3 / max(output for _, output in result.lengths)


def profile_record(profile: StepProfile) -> dict[str, object]:
    """A profile with its largest kernels."""
    return {**asdict(profile), "kernels": [asdict(each) for each in profile.kernels[:_NUM_SHOWN_KERNELS]]}


def print_rates(console: Console, record: dict[str, object]) -> None:
    """What the percentages refer to."""
    rates = record["rates"]
    assert isinstance(rates, dict)
    text = f"ceilings: {rates['bytes_per_s'] / 1e9:.0f} GB/s, {rates['flops_per_s'] / 1e12:.2f} TFLOP/s"
    console.print(text, highlight=False)


def print_offline(console: Console, label: str, results: Sequence[tuple[OfflineResult, dict[str, object]]]) -> None:
    """A row per workload."""
    table = Table(title=f"{label}: offline, in process", title_justify="left")
    for heading in ("workload", "requests", "median s [range]", "out tokens/s", "tokens/s", "ms/token",
                    "first token ms", "decode ms/token", "% serial", "% prefix once", "distinct"):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "workload" else "right")
    for result, record in results:
        table.add_row(
            result.workload.name,
            str(len(result.lengths)),
            spread_text(result.duration_s, 3),
            f"{result.output_tokens_per_s:.1f}",
            f"{result.total_tokens_per_s:.1f}",
            _number(record["ms_per_token"], 3),
            _number(record["first_token_ms"], 2),
            _number(record["decode_ms_per_token"], 3),
            _number(record["percent_of_serial"], 1),
            _number(record["percent_of_serial_shared"], 1) if result.workload.num_prefix_tokens else "",
            str(result.num_distinct_ends),
        )
    console.print(table)


def print_profile(console: Console, label: str, profile: StepProfile) -> None:
    """Kinds of kernels with the gaps between them, then the largest kernels."""
    title = (
        f"{label}: {profile.num_steps} steps of {profile.tokens_per_step:.1f} tokens, "
        f"{profile.wall_ms:.3f} ms each under the profiler"
    )
    kinds = (*profile.kinds, KernelShare("between kernels", profile.gap_ms, 0.0))
    console.print(_share_table(title, "kind", kinds, profile.wall_ms))
    kernels = profile.kernels[:_NUM_SHOWN_KERNELS]
    console.print(_share_table("largest kernels", "kernel", kernels, profile.wall_ms))


def _share_table(title: str, what: str, shares: Sequence[KernelShare], wall_ms: float) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column(what)
    for heading in ("ms a step", "% of the step", "runs a step", "us a run"):
        table.add_column(heading, justify="right")
    for share in shares:
        us_per_run = f"{share.ms_per_step * 1e3 / share.runs_per_step:.1f}" if share.runs_per_step else ""
        runs = f"{share.runs_per_step:.1f}" if share.runs_per_step else ""
        percent = f"{100 * share.ms_per_step / wall_ms:.1f}"
        table.add_row(share.name[:_MAX_NAME_LENGTH], f"{share.ms_per_step:.4f}", percent, runs, us_per_run)
    return table


def _number(value: object, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, float) else ""
