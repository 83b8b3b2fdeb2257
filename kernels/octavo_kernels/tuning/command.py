"""`octavo kernels tune`: the table of launch choices, measured on this machine's GPU."""

import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from octavo_kernels.tuning.targets import Target

_SHAPES_HELP = """What to tune for, repeatable: llama-8b, llama-1b, a model's folder or config.json, a weight such as
6144x4096 or 28672x4096:gated, or heads such as 32/8/128. Default: llama-8b and llama-1b."""
_OUTPUT_HELP = """JSON file to add to: what it has and is not measured anew stays. Default: NAME-OP.json, with the GPU's
name in the hardware table."""


@click.command()
@click.option("--op", type=click.Choice(("linear", "attention")), default="linear", help="Default: linear.")
@click.option("--shapes", multiple=True, metavar="MODEL_OR_SHAPE", help=_SHAPES_HELP)
@click.option("--tokens", multiple=True, type=click.IntRange(1), help="linear: tokens of a step. Default: 1 to 512.")
@click.option("--kv-cache-dtype", type=click.Choice(("bfloat16", "fp8")), default="bfloat16", help="attention: cache.")
@click.option("--shipped-only", is_flag=True, help="attention: measure what is shipped, and no candidates.")
@click.option("--processes", type=click.IntRange(1), help="linear: compilations at once. Default: all CPUs but two.")
@click.option("--time-limit-s", type=float, help="Begin nothing after this time; what was measured is kept.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help=_OUTPUT_HELP)
def tune(
    op: str,
    shapes: tuple[str, ...],
    tokens: tuple[int, ...],
    kv_cache_dtype: str,
    shipped_only: bool,
    processes: int | None,
    time_limit_s: float | None,
    output: Path | None,
) -> None:
    """Measure launch choices on this machine's GPU and write them to a table.

    Linear layers: for each weight and number of tokens the fastest of cuBLAS and Octavo's kernels. Attention: launch
    parameters, ranked by their gain over the shipped ones.
    """
    import torch

    if not torch.cuda.is_available():
        raise click.UsageError("tuning measures on an NVIDIA GPU, and there is none here")
    from octavo_kernels.hardware import identify_gpu
    from octavo_kernels.tuning import tables

    gpu = torch.cuda.get_device_name()
    path = output or Path(f"{identify_gpu(gpu).hardware.name}-{op}.json")
    deadline_s = time.monotonic() + (float("inf") if time_limit_s is None else time_limit_s)
    try:
        targets = _read_targets(op, shapes)
        tables.check_table(path, op, gpu)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if op == "linear":
        _tune_linear(targets, tokens, path, gpu, processes or max((os.cpu_count() or 2) - 2, 1), deadline_s)
    else:
        _tune_attention(targets, kv_cache_dtype, shipped_only, path, gpu, deadline_s)
    click.echo(f"wrote {path}")


def _read_targets(op: str, shapes: tuple[str, ...]) -> "list[Target]":
    """Raises ValueError for what is no target, or has nothing of this op."""
    from octavo_kernels.tuning.targets import MODELS, read_target

    targets = [read_target(text) for text in shapes or MODELS]
    for target in targets:
        if not (target.layers if op == "linear" else target.heads):
            raise ValueError(f"{target.name} is no shape of --op {op}")
    return targets


def _tune_linear(
    targets: "list[Target]", tokens: tuple[int, ...], path: Path, gpu: str, num_processes: int, deadline_s: float
) -> None:
    import torch

    from octavo_kernels.linear_choice import read_choices
    from octavo_kernels.tuning import tables
    from octavo_kernels.tuning.linear import NUM_TOKENS, tune_linear

    known = read_choices(path) if path.exists() else []
    tune_linear(
        targets, tokens or NUM_TOKENS, known, torch.device("cuda"),
        lambda choices: tables.add_choices(path, choices, gpu), click.echo,
        num_processes=num_processes, deadline_s=deadline_s,
    )  # fmt: skip


def _tune_attention(
    targets: "list[Target]", kv_cache_dtype: str, shipped_only: bool, path: Path, gpu: str, deadline_s: float
) -> None:
    import torch

    from octavo_kernels.launch import FLOAT8_VARIANTS, variant_of
    from octavo_kernels.tuning import tables
    from octavo_kernels.tuning.attention import ROW_KEYS, jobs, tune_attention

    device = torch.device("cuda", torch.cuda.current_device())
    if kv_cache_dtype == "fp8" and variant_of(device) not in FLOAT8_VARIANTS:
        raise click.UsageError(f"{gpu} has no 8-bit floats: leave out --kv-cache-dtype fp8")
    cache_dtype = torch.float8_e4m3fn if kv_cache_dtype == "fp8" else torch.bfloat16
    all_heads = list(dict.fromkeys(heads for target in targets for heads in target.heads))
    all_jobs = [replace(job, candidates=()) if shipped_only else job for job in jobs(all_heads, cache_dtype, device)]
    tune_attention(
        all_jobs, cache_dtype, device, lambda rows: tables.add_rows(path, rows, ROW_KEYS, gpu), click.echo,
        deadline_s=deadline_s,
    )  # fmt: skip
