"""The one `octavo` command. Its subcommands are the entry points of the group `octavo.commands`.

Only the command that runs is imported; the help of the others is read from their source. So `octavo --help` and
`octavo plan` work, at once, where torch is not installed. A user's mistake is one sentence and exit code 2.
"""

import ast
import importlib.util
import sys
from collections.abc import Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, Final, cast

import click
from click.shell_completion import get_completion_class

from octavo_engine import __version__
from octavo_engine.errors import OctavoError

COMMAND_GROUP: Final = "octavo.commands"
PROGRAM: Final = "octavo"
USER_ERROR_EXIT: Final = 2
SHELLS: Final = ("bash", "zsh", "fish")


class MissingExtraError(OctavoError):
    """A command's packages are not installed."""


class LazyGroup(click.Group):
    """A group whose entry points are loaded when they run, beside the commands that it holds itself."""

    @cached_property
    def _entry_points(self) -> Mapping[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=COMMAND_GROUP)}

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, sorted."""
        return sorted({*super().list_commands(ctx), *self._entry_points})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now."""
        point = self._entry_points.get(cmd_name)
        if point is None:
            return super().get_command(ctx, cmd_name)
        return cast("click.Command", point.load())

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. Raises MissingExtraError if it needs packages that are not there."""
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            point = self._entry_points.get(ctx.invoked_subcommand or "")
            if point is None or is_own_module(error.name):
                raise
            raise MissingExtraError(missing_extra(error.name, point)) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands in the help, without importing any."""
        width = formatter.width - 6
        rows = []
        for name in self.list_commands(ctx):
            point = self._entry_points.get(name)
            own = super().get_command(ctx, name)
            rows.append((name, own.get_short_help_str(width) if own else summary(cast("EntryPoint", point))))
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def is_own_module(name: str | None) -> bool:
    """Whether a missing module is one of Octavo's own, which is a defect and no missing extra."""
    return (name or "").startswith("octavo_")


def missing_extra(module: str | None, point: EntryPoint) -> str:
    """What to install, so that a command finds a module. The extra is named as the package that brings the command."""
    package = (module or "").partition(".")[0]
    extra = point.module.partition(".")[0].removeprefix("octavo_")
    return f"`{PROGRAM} {point.name}` needs the Python package {package}: pip install 'octavo[{extra}]'"


def summary(point: EntryPoint) -> str:
    """The first line of a command's docstring, from its source."""
    spec = importlib.util.find_spec(point.module)
    if spec is None or spec.origin is None:
        return ""
    source = Path(spec.origin).read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == point.attr:
            return (ast.get_docstring(node) or "").partition("\n")[0]
    return ""


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name=PROGRAM, message="%(prog)s %(version)s")
def cli() -> None:
    """Serve open-weight language models: on this machine, or on Kubernetes.

    \b
    octavo serve MODEL         an engine with an OpenAI-compatible API
    octavo plan -f model.yaml  what a cluster would run, and why
    octavo operator            the controller that runs it
    """


@cli.command()
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the script that completes commands and options in a shell.

    \b
    bash:  eval "$(octavo completion bash)"    in ~/.bashrc
    zsh:   eval "$(octavo completion zsh)"     in ~/.zshrc
    fish:  octavo completion fish > ~/.config/fish/completions/octavo.fish
    """
    completion_class = get_completion_class(shell)
    assert completion_class is not None
    click.echo(completion_class(cli, {}, PROGRAM, f"_{PROGRAM.upper()}_COMPLETE").source())


def main(arguments: list[str] | None = None) -> Any:
    """Entry of the `octavo` command."""
    try:
        return cli(arguments, prog_name=PROGRAM)
    except OctavoError as error:
        click.echo(f"octavo: {error}", err=True)
        sys.exit(USER_ERROR_EXIT)
