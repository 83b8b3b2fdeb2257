"""Families beyond LLaMA against `transformers`: logits through the paged path, weights in bytes, spellings."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.paged_runner import PagedRunner, load, random_prompts, reference_logits
from octavo_engine.capacity import weight_bytes
from octavo_engine.errors import UnsupportedModelError
from octavo_engine.geometry import geometry_from_config, read_geometry
from octavo_engine.layers.alibi import alibi_slopes
from octavo_engine.layers.linear import FusedHeads
from octavo_kernels.hardware import CPU

pytestmark = pytest.mark.usefixtures("one_thread")

YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 32}
NEW_FALCON = {"new_decoder_architecture": True, "num_attention_heads": 6, "num_kv_heads": 2, "hidden_size": 48}
# The biases of six heads are powers of two, which transformers' bfloat16 holds exactly.
FALCON_RW = {
    "alibi": True, "bias": True, "multi_query": False, "parallel_attn": False,
    "num_attention_heads": 6, "hidden_size": 48,
}  # fmt: skip
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2", {}),
    "qwen2 with tied embeddings": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 with a window in upper layers": (
        "Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
    ),
    "qwen2 with an unused window": ("Qwen2", {"use_sliding_window": False, "sliding_window": 9}),
    "qwen2 with yarn": ("Qwen2", {"rope_parameters": YARN_ROPE}),
    "qwen3": ("Qwen3", {}),
    "qwen3 with tied embeddings": ("Qwen3", {"tie_word_embeddings": True}),
    "qwen3 with biases": ("Qwen3", {"attention_bias": True}),
    "qwen3 with other eps": ("Qwen3", {"rms_norm_eps": 1e-2}),
    "qwen3 with windows by layer": (
        "Qwen3",
        {"use_sliding_window": True, "sliding_window": 7,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "neox": ("GPTNeoX", {}),
    "neox in sequence": ("GPTNeoX", {"use_parallel_residual": False}),
    "neox without attention biases": ("GPTNeoX", {"attention_bias": False}),
    "neox with tied embeddings": ("GPTNeoX", {"tie_word_embeddings": True}),
    "neox with whole heads rotated": (
        "GPTNeoX", {"rope_parameters": {"rope_type": "default", "rope_theta": 777.0, "partial_rotary_factor": 1.0}}
    ),
    "neox with the approximate gelu": ("GPTNeoX", {"hidden_act": "gelu_fast", "layer_norm_eps": 1e-2}),
    "falcon": ("Falcon", {}),
    "falcon with untied embeddings": ("Falcon", {"tie_word_embeddings": False}),
    "falcon with biases": ("Falcon", {"bias": True}),
    "falcon with one KV head per head": ("Falcon", {"multi_query": False}),
    "falcon in sequence": ("Falcon", {"parallel_attn": False}),
    "new falcon": ("Falcon", NEW_FALCON),
    "new falcon with one norm": ("Falcon", {**NEW_FALCON, "num_ln_in_parallel_attn": 1}),
    "new falcon with its own MLP size": ("Falcon", {**NEW_FALCON, "ffn_hidden_size": 90}),
    "falcon-rw": ("Falcon", FALCON_RW),
    "falcon with linear biases and one KV head": ("Falcon", {"alibi": True, "num_attention_heads": 4}),
}  # fmt: skip


@pytest.mark.parametrize(("architecture", "fields"), VARIANTS.values(), ids=VARIANTS)
def test_logits_and_bytes_equal_transformers(architecture, fields, tiny_model_dir) -> None:
    folder = tiny_model_dir(architecture, **fields)
    prompts = random_prompts(131, [1, 23, 64, 50])
    expected = reference_logits(folder, prompts)
    loaded, geometry = load(folder), read_geometry(folder)
    assert loaded.weight_bytes == weight_bytes(geometry, CPU, "float32")
    for chunk_sizes in ([1000], [5, 1, 7, 1, 2], [20, 1, 1, 1]):
        logits = PagedRunner(loaded.model, prompts).run(chunk_sizes)
        for own, reference in zip(logits, expected, strict=True):
            torch.testing.assert_close(own, reference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["Qwen2", "Qwen3", "GPTNeoX", "Falcon"])
def test_int8_bytes_are_those_of_the_plan(architecture, tiny_model_dir) -> None:
    folder = tiny_model_dir(architecture)
    assert load(folder, "int8").weight_bytes == weight_bytes(read_geometry(folder), CPU, "float32", "int8")


@pytest.mark.parametrize(("architecture", "fields"), VARIANTS.values(), ids=VARIANTS)
def test_counts_parameters_like_transformers(architecture, fields, tiny_model_dir) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_model_dir(architecture, **fields)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert read_geometry(folder).num_parameters == sum(weight.numel() for weight in model.parameters())


OLDER_SPELLINGS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen2": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2},
        {"layer_types": None, "rope_parameters": None, "rope_theta": 10_000.0},
    ),
    "qwen2 whose window starts above its layers": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 28},
        {"layer_types": None, "max_window_layers": None},
    ),
    "neox": ("GPTNeoX", {}, {"rope_parameters": None, "rotary_pct": 0.25, "rotary_emb_base": 10_000}),
    "falcon": ("Falcon", {"max_position_embeddings": 2048}, {
        "rope_parameters": None, "rope_theta": 10_000.0, "max_position_embeddings": None, "ffn_hidden_size": None,
        "tie_word_embeddings": None, "num_kv_heads": None,
    }),
    "new falcon": ("Falcon", NEW_FALCON, {"rope_parameters": None, "num_ln_in_parallel_attn": None}),
}  # fmt: skip


@pytest.mark.parametrize(("architecture", "fields", "older"), OLDER_SPELLINGS.values(), ids=OLDER_SPELLINGS)
def test_reads_older_configurations(architecture, fields, older, tiny_model_dir, edit_json) -> None:
    folder = tiny_model_dir(architecture, **fields)
    prompts = random_prompts(131, [40])
    expected, geometry = reference_logits(folder, prompts), read_geometry(folder)
    edit_json(folder / "config.json", **older)
    assert read_geometry(folder) == geometry
    logits = PagedRunner(load(folder).model, prompts).run([7])
    torch.testing.assert_close(logits[0], expected[0], atol=1e-4, rtol=1e-4)


def rewrite_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def test_reads_the_output_layer_of_neox_under_both_names(tiny_model_dir) -> None:
    folder = tiny_model_dir("GPTNeoX", shard_size="1GB")
    prompts = random_prompts(131, [10])
    expected = reference_logits(folder, prompts)

    def exchange(tensors: dict[str, torch.Tensor]) -> None:
        old, new = "embed_out.weight", "lm_head.weight"
        tensors.update({new: tensors.pop(old)} if old in tensors else {old: tensors.pop(new)})

    for _ in range(2):
        logits = PagedRunner(load(folder).model, prompts).run([1000])
        torch.testing.assert_close(logits[0], expected[0], atol=1e-4, rtol=1e-4)
        rewrite_tensors(folder, exchange)


def test_ignores_the_masks_that_old_neox_checkpoints_store(tiny_model_dir) -> None:
    folder = tiny_model_dir("GPTNeoX", shard_size="1GB")
    derived = {"bias": torch.ones(1, 1, 4, 4), "masked_bias": torch.ones(()), "rotary_emb.inv_freq": torch.ones(3)}
    layer = "gpt_neox.layers.0.attention"
    rewrite_tensors(folder, lambda tensors: tensors.update({f"{layer}.{name}": v for name, v in derived.items()}))
    load(folder)


def test_a_fused_tensor_of_another_shape_is_named(tiny_model_dir) -> None:
    folder = tiny_model_dir("Falcon", shard_size="1GB")
    name = "transformer.h.1.self_attention.query_key_value.weight"
    rewrite_tensors(folder, lambda tensors: tensors.update({name: torch.ones(55, 40)}))
    with pytest.raises(UnsupportedModelError, match=r"query_key_value.weight has the shape \(55, 40\).*\(56, 40\)"):
        load(folder)


@pytest.mark.parametrize(
    ("architecture", "fields", "message"),
    [
        ("GPTNeoX", {"hidden_act": "relu"}, "hidden_act 'relu' is not supported; supported: gelu"),
        ("Falcon", {"activation": "silu"}, "activation 'silu' is not supported; supported: gelu"),
        ("Qwen2", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("Qwen3", {"layer_types": ["chunked_attention"]}, "layer type 'chunked_attention' is not supported"),
    ],
)
def test_an_unsupported_feature_is_named(architecture, fields, message, tiny_model_dir, edit_json) -> None:
    folder = tiny_model_dir(architecture)
    edit_json(folder / "config.json", **fields)
    with pytest.raises(UnsupportedModelError, match=message):
        load(folder)


def test_fused_heads_become_queries_keys_values() -> None:
    """Two KV heads of two dimensions with three query heads each: rows 0 to 9 are of the first, 10 to 19 the second."""
    stored = torch.arange(20)[:, None].expand(20, 3)
    rows = FusedHeads(num_kv_heads=2, head_dim=2).stack(stored)[:, 0].tolist()
    assert rows == [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15, 6, 7, 16, 17, 8, 9, 18, 19]


@pytest.mark.parametrize(
    ("num_heads", "exponents"),
    [(1, [8]), (4, [2, 4, 6, 8]), (6, [2, 4, 6, 8, 1, 3]), (8, [1, 2, 3, 4, 5, 6, 7, 8]), (12, None)],
)
def test_alibi_slopes_are_powers_of_two(num_heads: int, exponents: list[int] | None) -> None:
    slopes = alibi_slopes(num_heads)
    assert slopes.shape == (num_heads,)
    if exponents:
        torch.testing.assert_close(slopes, torch.tensor([2.0**-exponent for exponent in exponents]))


# config.json of published models, what they have of parameters, and the bytes of KV for a token.
PUBLISHED: dict[str, tuple[Mapping[str, Any], int, int]] = {
    "Qwen2.5-0.5B": ({
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768,
        "tie_word_embeddings": True, "sliding_window": 32768, "use_sliding_window": False,
    }, 494_032_768, 12_288),
    "Qwen3-0.6B": ({
        "architectures": ["Qwen3ForCausalLM"], "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
        "max_position_embeddings": 40960, "tie_word_embeddings": True, "attention_bias": False, "sliding_window": None,
    }, 596_049_920, 114_688),
    "pythia-70m": ({
        "architectures": ["GPTNeoXForCausalLM"], "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6,
        "num_attention_heads": 8, "vocab_size": 50304, "max_position_embeddings": 2048, "tie_word_embeddings": False,
        "rotary_pct": 0.25,
    }, 70_426_624, 12_288),
    "falcon-7b": ({
        "architectures": ["FalconForCausalLM"], "hidden_size": 4544, "num_hidden_layers": 32,
        "num_attention_heads": 71, "vocab_size": 65024, "multi_query": True, "parallel_attn": True, "bias": False,
        "new_decoder_architecture": False, "alibi": False,
    }, 6_921_720_704, 8_192),
    "falcon-40b": ({
        "architectures": ["FalconForCausalLM"], "hidden_size": 8192, "num_hidden_layers": 60, "num_kv_heads": 8,
        "num_attention_heads": 128, "vocab_size": 65024, "new_decoder_architecture": True, "parallel_attn": True,
    }, 41_303_293_952, 122_880),
    "falcon-rw-1b": ({
        "architectures": ["FalconForCausalLM"], "hidden_size": 2048, "num_hidden_layers": 24, "alibi": True,
        "num_attention_heads": 32, "vocab_size": 50304, "multi_query": False, "parallel_attn": False, "bias": True,
    }, 1_311_625_216, 196_608),
}  # fmt: skip


@pytest.mark.parametrize(("config", "num_parameters", "kv_bytes"), PUBLISHED.values(), ids=PUBLISHED)
def test_geometry_of_published_models(config, num_parameters: int, kv_bytes: int) -> None:
    geometry = geometry_from_config(config)
    assert geometry.num_parameters == num_parameters
    assert geometry.kv_bytes_per_token("bfloat16") == kv_bytes
