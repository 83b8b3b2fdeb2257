"""`octavo inspect` as a user, or an inspection Job, runs it."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from octavo_engine.errors import ModelSourceError, UnsupportedModelError
from octavo_engine.geometry import geometry_from_config, geometry_from_data
from octavo_engine.inspect_command import inspect

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 6,
    "intermediate_size": 80, "vocab_size": 100, "max_position_embeddings": 64, "dtype": "bfloat16",
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_prints_what_a_spec_takes(folder: Path) -> None:
    result = CliRunner().invoke(inspect, [str(folder)])
    assert result.exit_code == 0
    assert geometry_from_data(json.loads(result.stdout)) == geometry_from_config(CONFIG)


def test_writes_the_answer_where_a_pod_reports_it_in_less_than_its_4_kib(folder: Path) -> None:
    log = folder / "termination-log"
    assert CliRunner().invoke(inspect, [str(folder), "--output-file", str(log)]).exit_code == 0
    assert geometry_from_data(json.loads(log.read_text())) == geometry_from_config(CONFIG)
    assert log.stat().st_size < 1000


def test_a_model_that_no_engine_runs_is_inspected_all_the_same(folder: Path) -> None:
    config = {**CONFIG, "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 8}}
    (folder / "config.json").write_text(json.dumps(config))
    result = CliRunner().invoke(inspect, [str(folder)])
    assert json.loads(result.stdout)["weight_format"]["bits"] == 4
    assert "weights quantised by awq are not supported" in result.stderr


@pytest.mark.parametrize(
    ("change", "error", "reason", "message"),
    [
        (None, ModelSourceError, "ModelUnreadable", "has no config.json"),
        ({"hidden_size": -1}, UnsupportedModelError, "ModelNotSupported", "hidden_size must be a positive integer"),
    ],
    ids=["nothing there", "a lie"],
)
def test_a_failure_is_reported_with_its_reason(change, error, reason, message, folder: Path) -> None:
    log = folder / "termination-log"
    if change is None:
        (folder / "config.json").unlink()
    else:
        (folder / "config.json").write_text(json.dumps({**CONFIG, **change}))
    result = CliRunner().invoke(inspect, [str(folder), "--output-file", str(log)])
    assert isinstance(result.exception, error)
    written = json.loads(log.read_text())
    assert written["reason"] == reason
    assert message in written["message"]


def test_a_log_that_cannot_be_written_is_a_sentence(folder: Path) -> None:
    result = CliRunner().invoke(inspect, [str(folder), "--output-file", str(folder / "none" / "log")])
    assert isinstance(result.exception, ModelSourceError)
    assert "cannot write" in str(result.exception)
