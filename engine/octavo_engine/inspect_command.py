"""`octavo inspect`: a model's geometry as data, from its configuration and the headers of its files."""

import json
from pathlib import Path

import click

from octavo_engine.errors import ModelSourceError, OctavoError, UnsupportedModelError
from octavo_engine.geometry import geometry_to_data, why_not_served
from octavo_engine.model_source import resolve_geometry

# A pod's termination message holds no more than 4 KiB.
_MOST_CHARACTERS = 2000


@click.command()
@click.argument("model")
@click.option("--revision", help="Branch, tag or commit of a model on the hub.  [default: its default branch]")
@click.option(
    "--output-file",
    type=click.Path(dir_okay=False, path_type=Path),
    help="File that gets the answer, too, or else the error as JSON, such as a pod's /dev/termination-log.",
)
def inspect(model: str, revision: str | None, output_file: Path | None) -> None:
    """Print a model's geometry as JSON, without reading a weight.

    The answer is what spec.model.geometry of an InferenceService takes. Ends with exit code 2 if the model cannot be
    found or read.
    """
    try:
        geometry = resolve_geometry(model, revision=revision)
    except OctavoError as error:
        _write(output_file, {"reason": _reason(error), "message": str(error)[:_MOST_CHARACTERS]})
        raise
    data = geometry_to_data(geometry)
    _write(output_file, data)
    click.echo(json.dumps(data, indent=2))
    problem = why_not_served(geometry)
    if problem:
        click.echo(f"octavo: {problem}", err=True)


def _reason(error: OctavoError) -> str:
    if isinstance(error, ModelSourceError):
        return error.reason
    return "ModelNotSupported" if isinstance(error, UnsupportedModelError) else "ModelUnreadable"


def _write(file: Path | None, data: dict[str, object]) -> None:
    if file is None:
        return
    try:
        file.write_text(json.dumps(data), encoding="utf-8")
    except OSError as error:
        raise ModelSourceError(f"cannot write {file}: {error.strerror}") from None
