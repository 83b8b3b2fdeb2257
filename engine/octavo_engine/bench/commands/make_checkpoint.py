"""`octavo bench make-checkpoint`: a model with random weights on disk, for engines that cannot draw their own."""

import json
from pathlib import Path

import click

from octavo_engine.errors import ConfigError


@click.command("make-checkpoint")
@click.argument("shape", required=False)
@click.argument("folder", type=click.Path(file_okay=False, path_type=Path), required=False)
@click.option(
    "--config",
    "config_file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Take the shape from this config.json instead of a name.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Equal seeds make equal files.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16", show_default=True)
@click.option("--weights/--no-weights", default=True, show_default=True, help="Configuration and tokenizer alone.")
def make_checkpoint(
    shape: str | None, folder: Path | None, config_file: Path | None, seed: int, dtype: str, weights: bool
) -> None:
    """Write a checkpoint of SHAPE into FOLDER: random weights, a tokenizer with a word for each id.

    Any engine can load it. `octavo bench make-checkpoint list` shows the shapes.

    \b
    octavo bench make-checkpoint llama-1b /tmp/llama-1b --seed 1
    octavo bench make-checkpoint --config config.json /tmp/model
    """
    from octavo_engine.bench.checkpoint import write_configuration, write_weights
    from octavo_engine.bench.shapes import SHAPES, shape_config

    if shape == "list":
        click.echo("\n".join(SHAPES))
        return
    if config_file:
        # Click fills arguments from the left: with --config, the only one is the folder.
        if folder or not shape:
            raise ConfigError("--config says the shape already: give the folder alone")
        config, folder = json.loads(config_file.read_text(encoding="utf-8")), Path(shape)
    elif shape and folder:
        config = shape_config(shape)
    else:
        raise ConfigError("say which shape to write, and into which folder")
    if any(folder.glob("*.safetensors")):
        raise ConfigError(f"{folder} holds weights already: remove them, or name another folder")
    config = {**config, "dtype": dtype}
    write_configuration(config, folder)
    if weights:
        write_weights(config, folder, seed=seed, dtype=dtype, on_progress=_show)


def _show(fraction: float, file: str) -> None:
    click.echo(f"{fraction:4.0%} {file}", err=True)
