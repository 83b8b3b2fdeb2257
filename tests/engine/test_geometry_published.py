"""Bytes of published models: those of `transformers` models on the meta device, and of quantised linear layers."""

from typing import Any

import pytest
import torch
from octavo_engine.geometry import Geometry, Matrix, geometry_from_config
from published_models import PUBLISHED


def geometry_of(name: str, **changes: Any) -> Geometry:
    return geometry_from_config({**PUBLISHED[name][0], **changes})


@pytest.mark.parametrize(("config", "num_parameters", "kv_bytes"), PUBLISHED.values(), ids=PUBLISHED)
def test_bytes_are_those_of_transformers_to_the_byte(config, num_parameters: int, kv_bytes: int) -> None:
    import transformers

    name = config["architectures"][0].removesuffix("ForCausalLM").replace("Gemma3", "Gemma3Text")
    dtype = getattr(torch, config["dtype"])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(
            getattr(transformers, f"{name}Config")(**config), dtype=dtype
        )
    geometry = geometry_from_config(config)
    assert geometry.num_parameters * dtype.itemsize == sum(each.nbytes for each in model.parameters())
    assert geometry.num_parameters == num_parameters
    assert geometry.kv_bytes_per_token("bfloat16") == kv_bytes


def test_layers_with_a_window_and_without() -> None:
    assert geometry_of("Mistral-7B-v0.1").num_window_layers == 32
    assert geometry_of("Gemma-2-2B").num_window_layers == 13
    assert geometry_of("Gemma-3-1B").num_window_layers == 22
    assert geometry_of("Llama-3.1-8B").num_window_layers == 0


def test_the_parameters_that_a_token_is_multiplied_with() -> None:
    """A3B: 3.3 billion with embeddings; V3: 37 billion, as their authors count them."""
    qwen = geometry_of("Qwen3-30B-A3B")
    assert (qwen.num_active_linear_parameters + qwen.num_embedding_parameters) / 1e9 == pytest.approx(3.3, abs=0.05)
    deepseek = geometry_of("DeepSeek-V3")
    active = deepseek.num_active_linear_parameters + deepseek.num_embedding_parameters
    assert active / 1e9 == pytest.approx(37.5, abs=0.5)
    llama = geometry_of("Llama-3.1-8B")
    assert llama.num_active_linear_parameters == llama.num_linear_parameters


def test_latent_attention_keeps_one_compressed_vector_for_all_heads() -> None:
    assert geometry_of("DeepSeek-V3").kv_bytes_per_token("bfloat16") == 61 * (512 + 64) * 2


def test_a_few_tokens_read_a_few_experts_and_many_read_all() -> None:
    experts = geometry_of("Qwen3-30B-A3B").experts
    assert experts is not None
    assert experts.touched_share(1) == 8 / 128
    assert experts.touched_share(512) == pytest.approx(1, abs=1e-9)


ROW = Matrix("q_proj", 4096, 4096, 1)
FORMATS: dict[str, tuple[dict[str, Any], int]] = {
    "fp8 in blocks of 128 x 128": (
        {"quant_method": "fp8", "weight_block_size": [128, 128]}, 4096 * 4096 + 32 * 32 * 4,
    ),
    "fp8, one scale": ({"quant_method": "fp8"}, 4096 * 4096 + 4),
    "awq, 4 bits, groups of 128": (
        {"quant_method": "awq", "bits": 4, "group_size": 128}, 4096 * 4096 // 2 + 4096 * 32 * 2 + 4096 * 32 // 2,
    ),
    "gptq, 4 bits, groups of 64": (
        {"quant_method": "gptq", "bits": 4, "group_size": 64},
        4096 * 4096 // 2 + 4096 * 64 * 2 + 4096 * 64 // 2 + 4096 * 4,
    ),
    "gptq, 8 bits, whole rows": (
        {"quant_method": "gptq", "bits": 8, "group_size": -1}, 4096 * 4096 + 4096 * 2 + 4096 + 4096 * 4,
    ),
    "compressed tensors, 4 bits, groups of 128": ({
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int", "group_size": 128, "symmetric": True}}},
    }, 4096 * 4096 // 2 + 4096 * 32 * 2),
    "compressed tensors, fp8 by channel": ({
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}},
    }, 4096 * 4096 + 4096 * 2),
    "compressed tensors, fp8, one scale": ({
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float", "strategy": "tensor"}}},
    }, 4096 * 4096 + 2),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "num_bytes"), FORMATS.values(), ids=FORMATS)
def test_bytes_of_a_quantised_matrix_by_hand(settings: dict[str, Any], num_bytes: int) -> None:
    weight_format = geometry_of("Llama-3.1-8B", quantization_config=settings).weight_format
    assert weight_format is not None
    assert weight_format.matrix_bytes(ROW) == num_bytes


def test_fp8_blocks_have_the_bytes_of_transformers() -> None:
    """Shapes that are no multiples of a block, whose last scales are for less than a block."""
    from transformers.integrations.finegrained_fp8 import FP8Linear

    matrix = Matrix("kv_a_proj", 576, 7168, 1)
    with torch.device("meta"):
        layer = FP8Linear(matrix.in_features, matrix.out_features, block_size=(128, 128))
    settings = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    weight_format = geometry_of("DeepSeek-V3", quantization_config=settings).weight_format
    assert weight_format is not None
    assert weight_format.matrix_bytes(matrix) == sum(each.nbytes for each in layer.parameters())
