"""Shows results: JSON lines that a program reads, tables that a person reads. It computes no figure."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from octavo_engine.bench.machine import Machine
from octavo_engine.bench.measurement import Distribution, Spread

if TYPE_CHECKING:
    from octavo_engine.bench.serving import Repeat, ServingPlan


# Of the prompts' tokens: so many from a cache are worth a word, since they make a server look faster than it is.
_NOTED_SHARE = 0.01


def append_json_lines(path: Path, records: Sequence[dict[str, object]]) -> None:
    """Append a line per record. NaN (no such latency) becomes null, since JSON has no NaN."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as lines:
        for record in records:
            lines.write(json.dumps(_without_nan(record), allow_nan=False) + "\n")


def _without_nan(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def serving_record(label: str, plan: "ServingPlan", repeat: "Repeat", machine: Machine) -> dict[str, object]:
    """One repeat with all that is needed to run it again."""
    return {
        "kind": "serve",
        "label": label,
        "workload": asdict(plan.workload),
        "concurrency": plan.concurrency,
        "requests_per_second": plan.requests_per_second,
        "vocab_size": plan.vocab_size,
        "seed": repeat.seed,
        **asdict(repeat.measurement),
        "cpu": asdict(repeat.cpu),
        "machine": asdict(machine),
    }


def print_serving(console: Console, label: str, plan: "ServingPlan", repeats: "Sequence[Repeat]") -> None:
    """A row per repeat, then the medians."""
    table = Table(title=f"{label}: {plan.workload.what}, {_load(plan)}", title_justify="left")
    for heading in ("repeat", "out tokens/s", "tokens/s", "requests/s", "good/s", "TTFT p50 / p99 ms",
                    "TPOT p50 / p99 ms", "ITL p50 / p99 ms", "chunks", "errors", "other CPU"):  # fmt: skip
        table.add_column(heading, justify="right")
    for number, repeat in enumerate(repeats, start=1):
        table.add_row(str(number), *_cells(repeat))
    console.print(table)
    rates = [repeat.measurement.output_tokens_per_s for repeat in repeats]
    console.print(f"output tokens/s: {spread_text(Spread.of(rates))}")
    cached = sum(repeat.measurement.num_cached_tokens for repeat in repeats)
    asked = sum(repeat.measurement.num_input_tokens for repeat in repeats)
    if cached > _NOTED_SHARE * asked:
        share = f"{cached / asked:.0%} of the prompts' tokens came from the server's prefix cache"
        console.print(f"{share}: prompts of another --seed are new to it", highlight=False)
    for error in {repeat.measurement.first_error for repeat in repeats} - {None}:
        console.print(f"[red]error:[/red] {error}", highlight=False)


def spread_text(spread: Spread, digits: int = 1) -> str:
    """Median with the range of the repeats."""
    return f"{spread.median:.{digits}f} [{spread.lowest:.{digits}f} to {spread.highest:.{digits}f}]"


def _load(plan: "ServingPlan") -> str:
    if plan.concurrency is not None:
        return f"{plan.num_requests} requests, {plan.concurrency} at once"
    return f"{plan.num_requests} requests, Poisson at {plan.requests_per_second:g}/s"


def _cells(repeat: "Repeat") -> list[str]:
    result = repeat.measurement
    return [
        f"{result.output_tokens_per_s:.1f}",
        f"{result.total_tokens_per_s:.1f}",
        f"{result.requests_per_s:.2f}",
        f"{result.goodput_per_s:.2f}",
        _pair(result.ttft_ms),
        _pair(result.tpot_ms),
        _pair(result.itl_ms),
        f"{result.chunks_per_request:.0f}",
        str(result.num_errors + result.num_wrong_length),
        f"{repeat.cpu.foreign + repeat.cpu.stolen:.0%}",
    ]


def _pair(latency: Distribution) -> str:
    return f"{latency.p50:.1f} / {latency.p99:.1f}"
