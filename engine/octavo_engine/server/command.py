"""`octavo serve MODEL`: one option for each field of `EngineConfig`, then the server.

Nothing heavy is imported before the options are known to be right.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from octavo_engine.config import EngineConfig, load_config
from octavo_engine.logs import configure_logging

Command = TypeVar("Command", bound=Callable[..., Any])


def config_options(command: Command) -> Command:
    """Give a command one option for each field of `EngineConfig`, and MODEL as its argument."""
    for name, field in reversed(EngineConfig.model_fields.items()):
        if name != "model":
            command = _option(name, field)(command)
    return command


def _option(name: str, field: FieldInfo) -> Callable[[Command], Command]:
    """The option leaves its value None unless it is given, so that a variable or the file can have its say."""
    flag = name.replace("_", "-")
    has_default = field.default is not None
    default = str(field.default).lower() if isinstance(field.default, bool) else field.default
    text = f"{field.description} [default: {default}]" if has_default else field.description
    kind = _plain_type(field.annotation)
    if kind is bool:
        return click.option(f"--{flag}/--no-{flag}", name, default=None, help=text)
    if get_origin(kind) is Literal:
        return click.option(f"--{flag}", name, type=click.Choice(get_args(kind)), default=None, help=text)
    return click.option(f"--{flag}", name, type=kind, default=None, help=text)


def _plain_type(annotation: Any) -> Any:
    """The type under `Annotated` and `| None`."""
    if get_origin(annotation) is Annotated:
        return _plain_type(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return _plain_type(next(kind for kind in get_args(annotation) if kind is not NoneType))
    return annotation


@click.command()
@click.argument("model", required=False)
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    help="YAML file with any of these fields; options and OCTAVO_* variables win over it.",
)
@config_options
def serve(config_file: Path | None, **flags: Any) -> None:
    """Serve MODEL with an OpenAI-compatible API.

    MODEL is a folder, a .gguf file, hf://ORGANISATION/NAME, s3://BUCKET/PREFIX, oci://REGISTRY/REPOSITORY:TAG, or
    pkg://PACKAGE/FILE.gguf. Every option can also be a variable, such as OCTAVO_MAX_MODEL_LEN, or a field of the
    --config file.

    \b
    octavo serve hf://HuggingFaceTB/SmolLM2-135M-Instruct
    octavo serve ./model.gguf --port 9000 --max-model-len 4096
    """
    given = {name: value for name, value in flags.items() if value is not None}
    config = load_config(given, os.environ, config_file)
    configure_logging(config.log_level)
    # FastAPI, uvicorn and the tokenizers take a second to import, which `--help` need not pay.
    from octavo_engine.server.lifecycle import run_server

    sys.exit(run_server(config))
