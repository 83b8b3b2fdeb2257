"""Geometry from config.json and from GGUF headers."""

import json
from pathlib import Path
from typing import Any

import pytest
from octavo_engine.errors import ModelSourceError, UnsupportedModelError
from octavo_engine.geometry import (
    Experts,
    Geometry,
    LatentAttention,
    WeightFormat,
    check_served,
    geometry_from_config,
    geometry_from_data,
    geometry_from_gguf,
    geometry_to_data,
    layer_windows,
    read_geometry,
    served_architectures,
    why_not_served,
    window_fields,
)

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
WINDOWS: dict[str, Any] = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 10}


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


LIES: dict[str, tuple[dict[str, Any], str]] = {
    "a truth value as a count": ({"hidden_size": True}, "hidden_size must be a positive integer, not True"),
    "a fraction": ({"num_hidden_layers": 2.0}, r"num_hidden_layers must be a positive integer, not 2\.0"),
    "a negative head": ({"head_dim": -8}, "head_dim must be a positive integer, not -8"),
    "negative KV heads": ({"num_key_value_heads": -2}, "num_key_value_heads must be a positive integer"),
    "heads that do not divide": ({"hidden_size": 50}, "hidden_size=50 is not a multiple of num_attention_heads=6"),
    "an absurd vocabulary": ({"vocab_size": 10**12}, "vocab_size=1000000000000 is absurd: no model has more than 16,7"),
    "absurd layers": ({"num_hidden_layers": 10**5}, "num_hidden_layers=100000 is absurd"),
    "text for a truth value": ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false"),
    "a type of data that does not exist": ({"torch_dtype": "bfloat17"}, "the data type 'bfloat17' is not supported"),
    "a window that is no number": (
        {"architectures": ["MistralForCausalLM"], "sliding_window": "all"}, "sliding_window must be a positive integer"
    ),
    "kinds of layers that run out": ({**WINDOWS, "layer_types": ["full_attention"]}, "names 1 of 2 layers"),
    "a kind of layer": ({**WINDOWS, "layer_types": ["linear_attention"] * 2}, "'linear_attention' is not"),
    "no architecture": ({"architectures": []}, "architectures must name the model's class"),
    "an unknown architecture": ({"architectures": ["Mamba"]}, "the architecture Mamba is not supported; supported: F"),
    "a part that is no object": ({"text_config": [1]}, "text_config must be an object"),
    "an unknown quantisation": ({"quantization_config": {"quant_method": "x"}}, "quantisation 'x' is not known; known"),
    "odd bits": ({"quantization_config": {"quant_method": "awq", "bits": 5}}, "awq with 5 bits is not known"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "sentence"), LIES.values(), ids=LIES)
def test_a_config_that_lies_is_refused_in_a_sentence(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UnsupportedModelError, match=sentence):
        geometry_from_config({**CONFIG, **change})


@pytest.mark.parametrize("config", [None, [], "text", 3])
def test_a_config_that_is_no_object_is_refused(config: object) -> None:
    with pytest.raises(UnsupportedModelError, match=r"config\.json must hold an object"):
        geometry_from_config(config)


def test_a_family_whose_heads_share_the_hidden_size_ignores_another_head_size() -> None:
    neox = {**CONFIG, "architectures": ["GPTNeoXForCausalLM"], "num_key_value_heads": None, "head_dim": 99}
    assert geometry_from_config(neox).head_dim == 8
    with pytest.raises(UnsupportedModelError, match="hidden_size=49 is not a multiple"):
        geometry_from_config({**neox, "hidden_size": 49})


def test_a_token_cannot_choose_more_experts_than_there_are() -> None:
    config = {**CONFIG, "architectures": ["MixtralForCausalLM"], "num_local_experts": 2, "num_experts_per_tok": 3}
    with pytest.raises(UnsupportedModelError, match="num_experts_per_tok=3 is more than num_local_experts=2"):
        geometry_from_config(config)


HEADER: dict[str, Any] = {
    "general.architecture": "llama", "llama.attention.head_count": 8, "llama.embedding_length": 64,
    "llama.feed_forward_length": 8, "llama.context_length": 8, "tokenizer.ggml.tokens": ["a"], "llama.block_count": 1,
    "octavo.tensor_names": frozenset(),
}  # fmt: skip


@pytest.mark.parametrize("key", ["llama.attention.head_count", "llama.block_count"])
@pytest.mark.parametrize("value", [0, -4, "8", [8]])
def test_a_gguf_header_that_lies_is_refused(key: str, value: object) -> None:
    assert geometry_from_gguf(HEADER).num_heads == 8
    with pytest.raises(UnsupportedModelError, match=f"{key} must be a positive integer"):
        geometry_from_gguf({**HEADER, key: value})


@pytest.mark.parametrize(
    ("pairs", "sentence"),
    [
        ({"split.count": 3}, "one of 3 parts of a model: make one file of them with llama-gguf-split --merge"),
        ({"llama.expert_count": 8}, r"models with experts are not supported: llama\.expert_count"),
        ({"tokenizer.ggml.tokens": []}, r"lacks llama\.vocab_size"),
    ],
)
def test_what_is_not_read_from_gguf_is_named(pairs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UnsupportedModelError, match=sentence):
        geometry_from_gguf({**HEADER, **pairs})


def test_windows_by_layer() -> None:
    assert layer_windows({}, 9, 3) == (9, 9, 9)
    assert layer_windows({"max_window_layers": 2}, 9, 3) == (None, None, 9)
    assert layer_windows({"layer_types": ["sliding_attention", "full_attention"] * 2}, 9, 3) == (9, None, 9)
    assert layer_windows({"sliding_window_pattern": 3}, 9, 4) == (9, 9, None, 9)


@pytest.mark.parametrize("use", [{}, {"use_sliding_window": True}, {"use_sliding_window": None}], ids=str)
@pytest.mark.parametrize(
    "fields",
    [{}, {"sliding_window": 9}, {"sliding_window": None}, {"sliding_window": 9, "max_window_layers": 1}], ids=str,
)  # fmt: skip
@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3", "GPTNeoX", "Falcon"])
def test_windows_are_those_of_transformers(family: str, fields: dict[str, Any], use: dict[str, Any]) -> None:
    import transformers

    given = {"num_hidden_layers": 3, **fields, **use}
    if given.get("use_sliding_window") is None:  # a class that checks its fields takes no null here
        given.pop("use_sliding_window", None)
    reference = getattr(transformers, f"{family}Config")(**given)
    window = reference.sliding_window if family in ("Mistral", "Qwen2", "Qwen3") else None
    types = getattr(reference, "layer_types", None) or ["sliding_attention"] * 3
    expected = tuple(window if each == "sliding_attention" else None for each in types)
    config = {**CONFIG, "architectures": [f"{family}ForCausalLM"], "num_hidden_layers": 3, **fields, **use}
    geometry = geometry_from_config(config)
    assert geometry.num_window_layers == sum(each is not None for each in expected)
    about_windows = window_fields(geometry.architecture, config)
    assert layer_windows(about_windows, geometry.sliding_window, 3) == expected


def test_a_window_bounds_what_a_token_reads_and_not_what_the_cache_holds() -> None:
    config = {**CONFIG, **WINDOWS, "layer_types": ["sliding_attention", "full_attention"]}
    geometry = geometry_from_config(config)
    assert geometry.num_window_layers == 1
    a_layer = 2 * 2 * 8 * 2
    assert geometry.kv_bytes_per_token("bfloat16") == 2 * a_layer
    assert geometry.kv_read_bytes(7, "bfloat16") == (7 + 7) * a_layer
    assert geometry.kv_read_bytes(50, "bfloat16") == (10 + 50) * a_layer


def test_what_the_engine_runs_is_what_its_models_register() -> None:
    from octavo_engine.models import MODELS, find_model_class

    find_model_class("LlamaForCausalLM")
    assert MODELS.architectures == served_architectures()


def test_what_can_be_planned_only_says_so() -> None:
    assert why_not_served(geometry_from_config(CONFIG)) == ""
    mixtral = {**CONFIG, "architectures": ["MixtralForCausalLM"], "num_local_experts": 2, "num_experts_per_tok": 1}
    with pytest.raises(UnsupportedModelError, match="MixtralForCausalLM is not supported; supported: Falcon"):
        check_served(geometry_from_config(mixtral))
    quantised = geometry_from_config({**CONFIG, "quantization_config": {"quant_method": "awq", "bits": 4}})
    with pytest.raises(UnsupportedModelError, match="weights quantised by awq are not supported"):
        check_served(quantised)


DEEPSEEK = Geometry(
    "DeepseekV2ForCausalLM", 3, 48, 6, 6, 8, 80, 100, 64, False, "bfloat16",
    experts=Experts(2, 8, 2, 16, shared_intermediate_size=32), latent=LatentAttention(16, 4, 8, 8),
    weight_format=WeightFormat("fp8", 8, 128, 128, 4), sliding_window=9, checkpoint_bytes=12345,
)  # fmt: skip


def test_a_geometry_goes_through_json_and_comes_back() -> None:
    for geometry in (DEEPSEEK, geometry_from_config(CONFIG)):
        assert geometry_from_data(json.loads(json.dumps(geometry_to_data(geometry)))) == geometry


EXPERTS = {"num_layers": 2, "num_experts": 8, "num_experts_per_token": 2, "intermediate_size": 16}
WRONG_DATA: dict[str, tuple[dict[str, Any], str]] = {
    "unknown field": ({"layers": 3}, r"geometry\.layers: there is no such field; known: architecture"),
    "wrong type": ({"num_layers": "3"}, r"geometry\.num_layers must be int, not '3'"),
    "inner": ({"experts": {"num_layers": 1}}, r"geometry\.experts\.num_experts is missing"),
    "no object": ({"latent": 3}, r"geometry\.latent must be an object, not 3"),
    "not positive": ({"num_layers": 0}, r"geometry\.num_layers must be positive, and below .* it is 0"),
    "negative": ({"num_full_layers": -1}, r"geometry\.num_full_layers must be not negative, .* it is -1"),
    "no experts": ({"experts": {**EXPERTS, "num_experts": 0}}, r"geometry\.experts\.num_experts must be positive"),
    "too many": ({"experts": {**EXPERTS, "num_experts_per_token": 9}}, "a token passes more than all"),
    "absurd": ({"vocab_size": 10**18}, r"geometry\.vocab_size must be positive, and below 35,184"),
    "heads": ({"num_kv_heads": 5}, r"geometry\.num_heads=6 is not a multiple of num_kv_heads=5"),
    "data type": ({"dtype": "int3"}, r"geometry\.dtype 'int3' is not known"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "sentence"), WRONG_DATA.values(), ids=WRONG_DATA)
def test_a_geometry_that_was_written_wrongly_is_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UnsupportedModelError, match=sentence):
        geometry_from_data({**geometry_to_data(DEEPSEEK), **change})
    with pytest.raises(UnsupportedModelError, match=r"geometry\.architecture is missing"):
        geometry_from_data({})
