"""Geometry from config.json and from GGUF headers."""

import json
from pathlib import Path
from typing import Any

import pytest
from octavo_engine.errors import ModelSourceError, UnsupportedModelError
from octavo_engine.geometry import Geometry, geometry_from_config, geometry_from_gguf, read_geometry

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 48,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "torch_dtype": "bfloat16",
}


def test_reads_the_fields_of_config_json(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    geometry = read_geometry(tmp_path)
    assert geometry == Geometry("LlamaForCausalLM", 2, 48, 6, 2, 8, 80, 100, 64, False, "bfloat16")
    assert read_geometry(tmp_path / "config.json") == geometry


def test_defaults_follow_from_other_fields() -> None:
    config = {key: value for key, value in CONFIG.items() if key not in ("num_key_value_heads", "torch_dtype")}
    geometry = geometry_from_config(config)
    assert geometry.num_kv_heads == 6
    assert geometry.dtype == "float32"


@pytest.mark.parametrize("name", ["hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"])
@pytest.mark.parametrize("value", [None, 0, -1, "many"])
def test_names_a_field_that_makes_no_sense(name: str, value: object) -> None:
    with pytest.raises(UnsupportedModelError, match=name):
        geometry_from_config({**CONFIG, name: value})


def test_heads_must_divide_into_groups() -> None:
    with pytest.raises(UnsupportedModelError, match="num_key_value_heads=4"):
        geometry_from_config({**CONFIG, "num_key_value_heads": 4})


def test_a_folder_without_configuration_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match=r"no config\.json"):
        read_geometry(tmp_path)


def test_counts_parameters_like_transformers(tiny_llama_dir) -> None:
    from transformers import AutoModelForCausalLM

    for seed, fields in enumerate(({}, {"tie_word_embeddings": True}, {"attention_bias": True, "mlp_bias": True})):
        folder = tiny_llama_dir(seed=seed, **fields)
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert read_geometry(folder).num_parameters == sum(weight.numel() for weight in model.parameters())


def test_kv_bytes_count_keys_and_values_of_all_layers() -> None:
    assert geometry_from_config(CONFIG).kv_bytes_per_token("bfloat16") == 2 * 2 * 2 * 8 * 2


def test_an_unknown_gguf_architecture_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match="'mamba' is not supported; supported: llama"):
        geometry_from_gguf({"general.architecture": "mamba"})


def test_a_gguf_header_without_a_number_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"lacks llama\.attention\.head_count"):
        geometry_from_gguf({"general.architecture": "llama"})


@pytest.mark.model
def test_reads_smollm2(smollm2_path: Path) -> None:
    geometry = read_geometry(smollm2_path)
    assert geometry == Geometry("LlamaForCausalLM", 30, 576, 9, 3, 64, 1536, 49152, 8192, True, "float32")
    assert geometry.num_parameters == 134_515_008
