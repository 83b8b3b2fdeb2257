import json
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
    ],
    ids=["remote", "two-loops", "two-servers", "two-lengths", "unknown-workload", "no-server", "two-models"],
)
def test_a_mistake_is_told_in_a_sentence(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(bench, arguments)
    assert isinstance(result.exception, OctavoError)
    assert message in str(result.exception)


def test_workloads_can_be_listed() -> None:
    result = CliRunner().invoke(bench, ["serve", "--workload", "list"])
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
