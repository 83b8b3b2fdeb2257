"""`octavo kernels`: which kernels a GPU runs, whether all of them compile for every GPU, and what is fastest on one."""

import sys

import click

from octavo_kernels.hardware import BY_NAME, GENERIC, HARDWARE, Hardware
from octavo_kernels.tuning.command import tune

VARIANT_NAMES = sorted({row.kernel_variant for row in (*HARDWARE, GENERIC) if row.is_gpu})


@click.group()
def kernels() -> None:
    """Show, check and tune the GPU kernels."""


kernels.add_command(tune)


@kernels.command("list")
@click.option("--hardware", help="Row of the hardware table, such as h100; default: this machine's GPU.")
def list_kernels(hardware: str | None) -> None:
    """Show the kernel variant of a GPU and the launch parameters of each kernel."""
    from octavo_kernels.catalogue import launch_tables

    row = GENERIC
    if hardware is None:
        row, why = _this_gpu()
    elif hardware in BY_NAME and BY_NAME[hardware].is_gpu:
        row, why = BY_NAME[hardware], "asked for by name"
    else:
        names = ", ".join(sorted(name for name, each in BY_NAME.items() if each.is_gpu))
        raise click.UsageError(f"the hardware table has no GPU {hardware}; it has {names}")
    click.echo(f"{row.title}: variant {row.kernel_variant} ({why})")
    click.echo(f"measured: {row.measured or 'nothing; launch parameters are reasoned, not tuned'}")
    for name, launch in launch_tables(row.kernel_variant).items():
        click.echo(f"  {name:32} {launch}")


def _this_gpu() -> tuple[Hardware, str]:
    """Its row in the hardware table, and how that was found."""
    import torch

    from octavo_kernels.hardware import identify_gpu

    if not torch.cuda.is_available():
        raise click.UsageError("there is no NVIDIA GPU here; name one with --hardware, such as --hardware h100")
    properties = torch.cuda.get_device_properties(0)
    match = identify_gpu(properties.name, (properties.major, properties.minor), properties.total_memory >> 20)
    return match.hardware, match.detail


@kernels.command("compile")
@click.option("--variant", "variants", multiple=True, type=click.Choice(VARIANT_NAMES), help="Default: all.")
@click.option("--processes", type=click.IntRange(1), help="Compilations at once; default: one for each CPU.")
@click.option("--quiet", is_flag=True, help="Show only what must not be shipped.")
def compile_kernels(variants: tuple[str, ...], processes: int | None, quiet: bool) -> None:
    """Compile every kernel for every GPU of the variants, without a GPU. Spills and over-large tiles fail."""
    from octavo_kernels.catalogue import compile_all

    num_compiled = num_problems = 0
    for each in compile_all(variants or tuple(VARIANT_NAMES), processes):
        num_compiled += 1
        num_problems += each.problem is not None
        if each.problem or not quiet:
            target = "sm_{}{}".format(*each.capability)
            figures = (
                f"{each.registers:4} registers {each.shared_bytes >> 10:4} KiB shared {each.spill_bytes:4} B spilled"
            )
            click.echo(f"{target:7} {each.name:58} {figures}  {each.problem or ''}".rstrip())
    click.echo(f"{num_compiled} kernels compiled, {num_problems} with problems")
    sys.exit(1 if num_problems else 0)
