"""Tables of `octavo bench ceilings`. It computes no figure."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from octavo_engine.bench.ceilings import Ceilings
from octavo_engine.bench.gpu_ceilings import GpuCeilings
from octavo_engine.bench.linears import LinearShape, LinearTimes


def print_ceilings(console: Console, ceilings: Ceilings) -> None:
    """The read rate, then a row per matrix multiplication."""
    console.print(f"{ceilings.num_threads} threads read memory at {ceilings.read_gb_s:.1f} GB/s", highlight=False)
    table = Table()
    for heading in ("dtype", "rows", "GFLOP/s", "weights GB/s"):
        table.add_column(heading, justify="left" if heading == "dtype" else "right")
    for rate in ceilings.gemm:
        table.add_row(rate.dtype, str(rate.num_rows), f"{rate.gflops:.1f}", f"{rate.weights_gb_s:.1f}")
    console.print(table)


def print_gpu_ceilings(console: Console, ceilings: GpuCeilings) -> None:
    """A line per rate."""
    title = f"{ceilings.name}: {ceilings.num_multiprocessors} multiprocessors, {ceilings.memory_gib:.1f} GiB"
    table = Table(title=title, title_justify="left")
    table.add_column("ceiling")
    table.add_column("rate", justify="right")
    table.add_row("copy", f"{ceilings.copy_gb_s:.0f} GB/s")
    table.add_row("read", f"{ceilings.read_gb_s:.0f} GB/s")
    table.add_row("bfloat16 multiplication", f"{ceilings.matmul_tflops:.0f} TFLOP/s")
    table.add_row("sustained for seconds", f"{ceilings.sustained_matmul_tflops:.0f} TFLOP/s")
    console.print(table)


def print_linears(console: Console, model: str, shapes: Sequence[LinearShape], times: Sequence[LinearTimes]) -> None:
    """A row per number of rows, a column per shape."""
    table = Table(title=f"linear layers of {model}: microseconds each", title_justify="left")
    headings = [f"{shape.name} {shape.out_features}x{shape.in_features}" for shape in shapes]
    for heading in ("rows", *headings, "all, ms a step", "weights GB/s"):
        table.add_column(heading, justify="right")
    for each in times:
        cells = [f"{each.layer_us[shape.name]:.1f}" for shape in shapes]
        table.add_row(str(each.num_rows), *cells, f"{each.step_ms:.3f}", f"{each.weights_gb_s:.0f}")
    console.print(table)
