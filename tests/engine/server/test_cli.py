import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from octavo_engine import cli as cli_module
from octavo_engine.cli import cli, summary
from octavo_engine.config import EngineConfig
from octavo_engine.errors import ConfigError
from octavo_engine.server.command import serve


def octavo(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", **variables}
    command = [sys.executable, "-c", "from octavo_engine.cli import main; main()", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def use_commands(monkeypatch: pytest.MonkeyPatch, **commands: str) -> None:
    points = [EntryPoint(name, value, "octavo.commands") for name, value in commands.items()]
    monkeypatch.setattr(cli_module, "entry_points", lambda group: points)
    cli.__dict__.pop("_entry_points", None)


@pytest.fixture(autouse=True)
def _forget_commands() -> Iterator[None]:
    """What a test has put in their place must not meet the next one, whichever file it is of."""
    cli.__dict__.pop("_entry_points", None)
    yield
    cli.__dict__.pop("_entry_points", None)


def test_version() -> None:
    assert octavo("--version").stdout == f"octavo {importlib.metadata.version('octavo')}\n"


@pytest.mark.parametrize("arguments", [("--help",), ("serve", "--help"), ("completion", "bash")], ids=" ".join)
def test_help_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    code = (
        "import sys\nfrom octavo_engine.cli import cli\n"
        f"cli({list(arguments)!r}, prog_name='octavo', standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'kopf', 'kubernetes'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_help_lists_each_command_with_a_sentence() -> None:
    output = CliRunner().invoke(cli, ["--help"]).output
    commands = output.partition("Commands:")[2].strip().splitlines()
    names = {point.name for point in importlib.metadata.entry_points(group="octavo.commands")}
    assert {line.split()[0] for line in commands if line.startswith("  ") and line[2] != " "} >= names - {"bench"}
    assert "Serve MODEL with an OpenAI-compatible API." in output


def test_serve_has_one_option_for_each_field() -> None:
    options = {option.name: option for option in serve.params}
    assert set(options) == {*EngineConfig.model_fields, "config_file"}
    output = CliRunner().invoke(cli, ["serve", "--help"], terminal_width=110).output
    assert "--enable-prefix-caching / --no-enable-prefix-caching" in output
    assert "--block-size [8|16|32|64|128]" in output
    assert "[default: 8000]" in output


@pytest.mark.parametrize(
    ("arguments", "variables", "words"),
    [
        (["serve"], {}, "no model given"),
        (["serve", "m", "--port", "70000"], {}, "--port=70000"),
        (["serve", "m"], {"OCTAVO_PORT": "x"}, "OCTAVO_PORT='x'"),
        (["serve", "m", "--config", "/nowhere.yaml"], {}, "cannot read the configuration file /nowhere.yaml"),
    ],
    ids=["no-model", "flag", "variable", "file"],
)
def test_mistakes_are_one_sentence_and_exit_code_2(arguments: list[str], variables: dict[str, str], words: str) -> None:
    result = octavo(*arguments, **variables)
    assert result.returncode == 2
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("octavo: ")
    assert words in result.stderr


def test_unknown_option_and_command_are_usage_errors() -> None:
    assert octavo("serve", "m", "--nope").returncode == 2
    assert "No such command 'nope'" in octavo("nope").stderr


def test_options_win_over_variables_over_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[EngineConfig] = []

    def run_server(config: EngineConfig) -> int:
        seen.append(config)
        return 0

    monkeypatch.setattr("octavo_engine.server.lifecycle.run_server", run_server)
    monkeypatch.setattr("octavo_engine.server.command.configure_logging", lambda level: None)
    file = tmp_path / "config.yaml"
    file.write_text("model: from-file\nport: 1\nmax_model_len: 100\nseed: 5\n")
    environment = {"OCTAVO_PORT": "2", "OCTAVO_MAX_MODEL_LEN": "200", "OCTAVO_BLOCK_SIZE": "32"}
    arguments = ["serve", "--config", str(file), "--port", "3", "--no-enable-prefix-caching"]
    result = CliRunner().invoke(cli, arguments, env=environment)
    assert result.exit_code == 0, result.output
    (config,) = seen
    assert (config.model, config.port, config.max_model_len, config.seed) == ("from-file", 3, 200, 5)
    assert config.block_size == 32
    assert not config.enable_prefix_caching


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell: str) -> None:
    result = CliRunner().invoke(cli, ["completion", shell])
    assert result.exit_code == 0
    assert "_OCTAVO_COMPLETE" in result.output


def test_completion_completes_commands_and_options() -> None:
    words = octavo(_OCTAVO_COMPLETE="bash_complete", COMP_WORDS="octavo serve --max", COMP_CWORD="2").stdout
    assert {"plain,--max-model-len", "plain,--max-num-seqs"} <= set(words.split())


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def needs_package() -> None:
        import package_that_is_not_there  # noqa: F401

    class Point:
        name, module, attr = "run", "octavo_engine.server.command", "serve"

        def load(self) -> click.Command:
            return needs_package

    monkeypatch.setattr(cli_module, "entry_points", lambda group: [Point()])
    words = r"`octavo run` needs .*package_that_is_not_there: pip install 'octavo\[engine\]'"
    with pytest.raises(cli_module.MissingExtraError, match=words):
        cli(["run"], standalone_mode=False)


def test_missing_module_of_ours_is_a_defect(monkeypatch: pytest.MonkeyPatch) -> None:
    use_commands(monkeypatch, broken="octavo_engine.no_such_module:command")
    with pytest.raises(ModuleNotFoundError):
        cli(["broken"], standalone_mode=False)


def test_users_mistake_in_a_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    @click.command()
    def mistaken() -> None:
        raise ConfigError("the flag is wrong")

    class Point:
        name, module, attr = "mistaken", "octavo_engine.server.command", "serve"

        def load(self) -> click.Command:
            return mistaken

    monkeypatch.setattr(cli_module, "entry_points", lambda group: [Point()])
    with pytest.raises(SystemExit) as exit_info:
        cli_module.main(["mistaken"])
    assert exit_info.value.code == 2
    assert capsys.readouterr().err == "octavo: the flag is wrong\n"


def test_summary_is_the_first_line_of_the_docstring() -> None:
    point = EntryPoint("serve", "octavo_engine.server.command:serve", "octavo.commands")
    assert summary(point) == "Serve MODEL with an OpenAI-compatible API."
    assert summary(EntryPoint("x", "octavo_engine.no_such_module:x", "octavo.commands")) == ""
