"""Model shapes by name, as the config.json that a checkpoint of that shape has. Torch-free.

Shapes follow published models, so that figures mean something; tiny ones are for tests. The weights are never theirs.
"""

from collections.abc import Mapping
from typing import Any, Final

from octavo_engine.errors import ConfigError

_COMMON: Final[Mapping[str, Any]] = {
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "use_cache": True,
}
_LLAMA3: Final[Mapping[str, Any]] = {
    **_COMMON,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128_256,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "max_position_embeddings": 131_072,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 128_000,
    "eos_token_id": 128_001,
}
_QWEN3: Final[Mapping[str, Any]] = {
    **_COMMON,
    "vocab_size": 151_936,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "rope_scaling": None,
    "max_position_embeddings": 40_960,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "bos_token_id": 151_643,
    "eos_token_id": 151_645,
}
_QWEN3_MOE: Final[Mapping[str, Any]] = {
    **_QWEN3,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "tie_word_embeddings": False,
}
_TINY: Final[Mapping[str, Any]] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

SHAPES: Final[Mapping[str, Mapping[str, Any]]] = {
    "llama-8b": {
        **_LLAMA3,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "llama-1b": {
        **_LLAMA3,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {
        **_QWEN3,
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "max_window_layers": 28,
        "tie_word_embeddings": True,
    },
    "qwen3-30b-a3b": {
        **_QWEN3_MOE,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    },
    "pythia-1.4b": {
        **_COMMON,
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": "gpt_neox",
        "hidden_act": "gelu",
        "vocab_size": 50_304,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "max_position_embeddings": 2048,
        "rotary_pct": 0.25,
        "rotary_emb_base": 10_000,
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": True,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "falcon-7b": {
        **_COMMON,
        "architectures": ["FalconForCausalLM"],
        "model_type": "falcon",
        "vocab_size": 65_024,
        "hidden_size": 4544,
        "ffn_hidden_size": 18_176,
        "num_hidden_layers": 32,
        "num_attention_heads": 71,
        "multi_query": True,
        "new_decoder_architecture": False,
        "parallel_attn": True,
        "alibi": False,
        "bias": False,
        "layer_norm_epsilon": 1e-5,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "bos_token_id": 11,
        "eos_token_id": 11,
    },
    "tiny-llama": {
        **_LLAMA3,
        **_TINY,
        "intermediate_size": 160,
        "num_key_value_heads": 2,
        "rope_scaling": None,
        "tie_word_embeddings": False,
    },
    "tiny-qwen3-moe": {
        **_QWEN3_MOE,
        **_TINY,
        "intermediate_size": 160,
        "moe_intermediate_size": 32,
        "num_key_value_heads": 2,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
}


def shape_config(name: str) -> Mapping[str, Any]:
    """The fields of the config.json of that shape. Raises ConfigError that lists the names."""
    if name not in SHAPES:
        raise ConfigError(f"no shape is named {name!r}; there are: {', '.join(SHAPES)}")
    return SHAPES[name]
