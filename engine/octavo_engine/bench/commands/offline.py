"""`octavo bench offline`: the engine in process, against the limits of the machine."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from octavo_engine.errors import ConfigError

if TYPE_CHECKING:
    from octavo_engine.bench.roofline import Rates


@click.command("offline")
@click.option(
    "--model", help="What to run: a shape's name (with dummy weights), or an address as `octavo serve` takes."
)
@click.option(
    "--workload",
    "workload_names",
    multiple=True,
    help="Named workload, may be given several times; `--workload list` shows them. Default: W3.",
)
@click.option("--num-requests", type=click.IntRange(1), help="Default: the workload's number.")
@click.option("--repeats", type=click.IntRange(1), help="Timed repeats; default: the workload's number.")
@click.option("--warm-ups", type=click.IntRange(0), default=1, show_default=True, help="Untimed repeats before.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the first repeat.")
@click.option(
    "--load-format", type=click.Choice(["auto", "dummy"]), help="dummy: random weights, no files but config.json."
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="A field of the engine's configuration, such as max_num_seqs=256; may be given several times.",
)
@click.option("--bandwidth-gb-s", type=click.FloatRange(0, min_open=True), help="Of memory; default: measured.")
@click.option("--tflops", type=click.FloatRange(0, min_open=True), help="Of multiplication; default: measured.")
@click.option("--profile", "num_profiled", type=click.IntRange(0), default=0, help="Then profile so many steps.")
@click.option(
    "--profile-skip", type=click.IntRange(0), help="Steps before the profile; default: until every request decodes."
)
@click.option("--label", help="Name in tables and records; default: the model's.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Append JSON lines to this file.")
def offline(
    model: str | None,
    workload_names: tuple[str, ...],
    num_requests: int | None,
    repeats: int | None,
    warm_ups: int,
    seed: int,
    load_format: str | None,
    settings: tuple[str, ...],
    bandwidth_gb_s: float | None,
    tflops: float | None,
    num_profiled: int,
    profile_skip: int | None,
    label: str | None,
    output: Path | None,
) -> None:
    """Measure the engine without HTTP: all requests at once, greedy, to the full length.

    The percentages compare with a lower bound: weights, keys and values read once a step at the memory's rate,
    multiplications at the measured one, prefill and decode one after the other.

    \b
    octavo bench offline --model llama-1b --workload W3 --workload W2 --profile 20
    octavo bench offline --model hf://meta-llama/Llama-3.1-8B --workload W1 -o results.jsonl
    """
    from rich.console import Console

    from octavo_engine.bench.workloads import WORKLOADS, named

    console = Console()
    if "list" in workload_names:
        for workload in WORKLOADS.values():
            console.print(f"{workload.name:15} {workload.what}", highlight=False)
        return
    if not model:
        raise ConfigError("--model: say which model to run")
    workloads = [named(name) for name in workload_names or ("W3",)]
    fields = {**({"load_format": load_format} if load_format else {}), **_read_settings(settings)}
    rates = _read_rates(bandwidth_gb_s, tflops)

    from octavo_engine.bench import offline_report
    from octavo_engine.bench.models import find_model, model_address
    from octavo_engine.bench.offline import OfflinePlan
    from octavo_engine.bench.offline_session import ProfilePlan, WorkloadReport, run_session
    from octavo_engine.bench.report import append_json_lines
    from octavo_engine.config import load_config
    from octavo_engine.logs import configure_logging

    found = find_model(model)
    if found.is_shape:
        fields = {"load_format": "dummy", **fields}
    name = label or found.name
    reports: list[WorkloadReport] = []

    def show(report: WorkloadReport) -> None:
        reports.append(report)
        if len(reports) == 1:
            offline_report.print_rates(console, report.record)
        offline_report.print_offline(console, name, [(report.result, report.record)])
        if report.profile:
            offline_report.print_profile(console, f"{name} {report.result.workload.name}", report.profile)
        if output:
            append_json_lines(output, [{"label": name, **report.record}])

    with model_address(found) as address:
        config = load_config({"model": address, **fields}, os.environ)
        configure_logging(config.log_level)
        plan = OfflinePlan(num_requests, repeats, warm_ups, seed)
        run_session(found, config, workloads, plan, ProfilePlan(num_profiled, profile_skip), rates, show)


def _read_settings(settings: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE as the configuration's fields. Raises ConfigError for what is not of that form."""
    pairs = [setting.partition("=") for setting in settings]
    for name, equals, _ in pairs:
        if not name or not equals:
            raise ConfigError(f"--set {name}: expected NAME=VALUE")
    return {name.replace("-", "_"): value for name, _, value in pairs}


def _read_rates(bandwidth_gb_s: float | None, tflops: float | None) -> "Rates | None":
    """The machine's rates, if both are given. Raises ConfigError if only one is."""
    from octavo_engine.bench.roofline import Rates

    if bandwidth_gb_s and tflops:
        return Rates(bandwidth_gb_s * 1e9, tflops * 1e12)
    if bandwidth_gb_s or tflops:
        raise ConfigError("--bandwidth-gb-s and --tflops go together: give both, or let both be measured")
    return None
