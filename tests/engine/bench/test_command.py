import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from octavo_engine.bench.command import bench
from octavo_engine.bench.machine import CpuMeter, describe_machine
from octavo_engine.errors import OctavoError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve", "--url", "http://192.0.2.1"], "--allow-remote"),
        (["serve", "--concurrency", "2", "--request-rate", "1"], "exclude"),
        (["serve", "--url", "http://127.0.0.1:1", "--start", "m"], "exclude"),
        (["serve", "--workload", "sharegpt", "--input-len", "5"], "--workload"),
        (["serve", "--workload", "nothing"], "sharegpt"),
        (["serve", "--url", "http://127.0.0.1:1"], "no OpenAI-compatible server"),
        (["batching", "--url", "http://127.0.0.1:1", "--model", "m"], "exclude"),
        (["make-checkpoint", "llama", "/tmp/x"], "tiny-llama"),
        (["make-checkpoint", "tiny-llama"], "into which folder"),
    ],
    ids=[
        "remote",
        "two-loops",
        "two-servers",
        "two-lengths",
        "unknown-workload",
        "no-server",
        "two-models",
        "unknown-shape",
        "no-folder",
    ],
)
def test_a_mistake_is_told_in_a_sentence(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(bench, arguments)
    assert isinstance(result.exception, OctavoError)
    assert message in str(result.exception)


@pytest.mark.parametrize("command", ["serve", "offline"])
def test_workloads_can_be_listed(command: str) -> None:
    result = CliRunner().invoke(bench, [command, "--workload", "list"])
    assert result.exit_code == 0
    assert "sharegpt" in result.output


def test_batching_without_a_model_writes_table_records_and_plot(tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    arguments = ["batching", "--cache-tokens", "8192", "--plots", str(tmp_path), "--output", str(output)]
    result = CliRunner().invoke(bench, arguments)
    assert result.exit_code == 0, result.output
    assert "blocks on demand" in result.output
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["label"] for record in records] == ["blocks", "reserve-maximum", "reserve-exactly"]
    assert (tmp_path / "batching-memory.svg").read_text().startswith("<?xml")


def test_a_plot_changes_only_with_its_figures(tmp_path: Path) -> None:
    plots = []
    for folder in (tmp_path / "first", tmp_path / "second"):
        CliRunner().invoke(bench, ["batching", "--cache-tokens", "8192", "--plots", str(folder)])
        plots.append((folder / "batching-memory.svg").read_bytes())
    assert plots[0] == plots[1]


def test_the_machine_and_its_use_are_described() -> None:
    meter = CpuMeter([])
    sum(range(1_000_000))
    shares = meter.read()
    assert shares.own > 0
    assert shares.foreign >= 0
    machine = describe_machine()
    assert machine.num_cpus >= 1
    assert "torch" in machine.versions


def test_a_checkpoint_is_made_once_and_from_a_name_or_a_file(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    made = CliRunner().invoke(bench, ["make-checkpoint", "tiny-llama", str(first), "--dtype", "float16"])
    assert made.exit_code == 0, made.output
    config_file = first / "config.json"
    assert json.loads(config_file.read_text())["dtype"] == "float16"
    again = CliRunner().invoke(bench, ["make-checkpoint", "tiny-llama", str(first)])
    assert isinstance(again.exception, OctavoError)
    assert "holds weights already" in str(again.exception)
    arguments = ["make-checkpoint", "--config", str(config_file), str(second), "--no-weights"]
    assert CliRunner().invoke(bench, arguments).exit_code == 0
    assert not list(second.glob("*.safetensors"))
    assert json.loads((second / "config.json").read_text())["vocab_size"] == 320


def test_help_imports_no_torch() -> None:
    code = "import sys, octavo_engine.bench.command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
