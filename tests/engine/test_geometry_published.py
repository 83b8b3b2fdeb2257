"""Bytes of published models: those of `transformers` models on the meta device, and of quantised linear layers."""

from typing import Any

import pytest
import torch
from octavo_engine.geometry import Geometry, Matrix, geometry_from_config

LLAMA_3: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "tie_word_embeddings": False, "dtype": "bfloat16",
}  # fmt: skip
# The fields of each model's own config.json that bear on its weights -> parameters, bytes of KV cache for a token.
PUBLISHED: dict[str, tuple[dict[str, Any], int, int]] = {
    "Llama-3.1-8B": ({
        **LLAMA_3, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    }, 8_030_261_248, 131_072),
    "Llama-3.3-70B": ({
        **LLAMA_3, "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    }, 70_553_706_496, 327_680),
    "Mistral-7B-v0.1": ({
        "architectures": ["MistralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
        "max_position_embeddings": 32768, "sliding_window": 4096, "tie_word_embeddings": False, "dtype": "bfloat16",
    }, 7_241_732_096, 131_072),
    "Qwen2.5-0.5B": ({
        "architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
        "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768,
        "tie_word_embeddings": True, "dtype": "bfloat16",
    }, 494_032_768, 12_288),
    "Falcon-40B": ({
        "architectures": ["FalconForCausalLM"], "hidden_size": 8192, "num_hidden_layers": 60, "num_kv_heads": 8,
        "num_attention_heads": 128, "vocab_size": 65024, "new_decoder_architecture": True, "parallel_attn": True,
        "dtype": "bfloat16",
    }, 41_303_293_952, 122_880),
    "GPT-NeoX-20B": ({
        "architectures": ["GPTNeoXForCausalLM"], "hidden_size": 6144, "intermediate_size": 24576,
        "num_hidden_layers": 44, "num_attention_heads": 64, "vocab_size": 50432, "max_position_embeddings": 2048,
        "tie_word_embeddings": False, "dtype": "float16",
    }, 20_554_567_680, 1_081_344),
    "Gemma-2-2B": ({
        "architectures": ["Gemma2ForCausalLM"], "hidden_size": 2304, "intermediate_size": 9216, "head_dim": 256,
        "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 256000,
        "max_position_embeddings": 8192, "sliding_window": 4096, "dtype": "float32",
    }, 2_614_341_888, 106_496),
    "Gemma-3-1B": ({
        "architectures": ["Gemma3ForCausalLM"], "hidden_size": 1152, "intermediate_size": 6912, "head_dim": 256,
        "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": 262144,
        "max_position_embeddings": 32768, "sliding_window": 512, "sliding_window_pattern": 6, "dtype": "bfloat16",
    }, 999_885_952, 26_624),
    "Mixtral-8x7B": ({
        "architectures": ["MixtralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000,
        "max_position_embeddings": 32768, "num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None,
        "tie_word_embeddings": False, "dtype": "bfloat16",
    }, 46_702_792_704, 131_072),
    "Qwen1.5-MoE-A2.7B": ({
        "architectures": ["Qwen2MoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 5632,
        "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 151936, "max_position_embeddings": 8192,
        "num_experts": 60, "num_experts_per_tok": 4, "decoder_sparse_step": 1, "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }, 14_315_784_192, 196_608),
    "Qwen3-30B-A3B": ({
        "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960, "num_experts": 128,
        "num_experts_per_tok": 8, "decoder_sparse_step": 1, "mlp_only_layers": [], "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }, 30_532_122_624, 98_304),
    "DeepSeek-V2-Lite": ({
        "architectures": ["DeepseekV2ForCausalLM"], "hidden_size": 2048, "intermediate_size": 10944,
        "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
        "vocab_size": 102400, "max_position_embeddings": 163840, "n_shared_experts": 2, "n_routed_experts": 64,
        "num_experts_per_tok": 6, "first_k_dense_replace": 1, "kv_lora_rank": 512, "q_lora_rank": None,
        "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "dtype": "bfloat16",
    }, 15_706_484_224, 31_104),
    "DeepSeek-V3": ({
        "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
        "num_key_value_heads": 128, "vocab_size": 129280, "max_position_embeddings": 163840, "n_shared_experts": 1,
        "n_routed_experts": 256, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "kv_lora_rank": 512,
        "q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "dtype": "bfloat16",
    }, 671_026_404_352, 70_272),
}  # fmt: skip


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
