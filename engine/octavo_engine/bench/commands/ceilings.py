"""`octavo bench ceilings`: what the machine can do at best."""

import dataclasses
from pathlib import Path

import click

from octavo_engine.errors import ConfigError


@click.command("ceilings")
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Default: the GPU if there is one."
)
@click.option("--threads", type=click.IntRange(1), help="CPU threads; default: torch's choice.")
@click.option(
    "--sustained-s",
    type=click.FloatRange(0, min_open=True),
    default=5.0,
    show_default=True,
    help="GPU: seconds of multiplication without a pause, until power limits its rate.",
)
@click.option("--linears", "model", help="Also time each linear layer of this model: a shape's name, or an address.")
@click.option("-o", "--output", type=click.Path(dir_okay=False, path_type=Path), help="Append JSON lines to it.")
def ceilings(device: str, threads: int | None, sustained_s: float, model: str | None, output: Path | None) -> None:
    """Measure how fast this machine, or its GPU, reads memory and multiplies matrices.

    \b
    octavo bench ceilings --linears llama-8b -o results.jsonl
    """
    import torch
    from rich.console import Console

    from octavo_engine.bench import ceilings_report
    from octavo_engine.bench.ceilings import measure_ceilings
    from octavo_engine.bench.gpu_ceilings import measure_gpu_ceilings
    from octavo_engine.bench.linears import linear_shapes, measure_linears
    from octavo_engine.bench.machine import describe_machine
    from octavo_engine.bench.models import find_model
    from octavo_engine.bench.report import append_json_lines

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no NVIDIA GPU here")
    found = find_model(model) if model else None
    uses_gpu = device != "cpu" and torch.cuda.is_available()
    console, machine = Console(), dataclasses.asdict(describe_machine())
    records: list[dict[str, object]] = []
    if uses_gpu:
        of_gpu = measure_gpu_ceilings(sustained_s)
        ceilings_report.print_gpu_ceilings(console, of_gpu)
        records.append({"kind": "gpu-ceilings", **dataclasses.asdict(of_gpu), "machine": machine})
    else:
        of_cpu = measure_ceilings(threads)
        ceilings_report.print_ceilings(console, of_cpu)
        records.append({"kind": "ceilings", **dataclasses.asdict(of_cpu), "machine": machine})
    if found:
        shapes = linear_shapes(found.geometry, found.config)
        where, dtype = ("cuda", torch.bfloat16) if uses_gpu else ("cpu", torch.float32)
        times = measure_linears(shapes, torch.device(where), dtype)
        ceilings_report.print_linears(console, model or "", shapes, times)
        records += [
            {"kind": "linears", "model": model, **dataclasses.asdict(each), "machine": machine} for each in times
        ]
    if output:
        append_json_lines(output, records)
