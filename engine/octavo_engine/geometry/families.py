"""Each family's `config.json` -> its geometry. LLaMA's spelling is the common one; others are translated into it."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from octavo_engine.errors import UnsupportedModelError
from octavo_engine.geometry.fields import Config, count, flag, layer_list, must_divide, optional_count, part
from octavo_engine.geometry.served import served_architectures, why_unknown
from octavo_engine.geometry.shapes import DTYPE_BYTES, Experts, Geometry, LatentAttention
from octavo_engine.geometry.weight_format import read_weight_format
from octavo_engine.geometry.windows import layer_windows, window_fields

Reader = Callable[[str, Config], Geometry]


def geometry_from_config(config: object) -> Geometry:
    """The geometry that a Hugging Face `config.json` states.

    Raises UnsupportedModelError that names the unknown architecture, or the missing or contradictory field.
    """
    if not isinstance(config, Mapping):
        raise UnsupportedModelError(f"config.json must hold an object, not {type(config).__name__}")
    architectures = config.get("architectures")
    if not isinstance(architectures, list | tuple) or not architectures:
        raise UnsupportedModelError("config.json: architectures must name the model's class, such as LlamaForCausalLM")
    architecture = str(architectures[0])
    if architecture not in READERS and architecture not in served_architectures():
        raise UnsupportedModelError(why_unknown(architecture))
    config = {**config, **part(config, "text_config")}
    read = READERS.get(architecture, _read_llama)
    return replace(read(architecture, config), weight_format=read_weight_format(config))


def _read_llama(architecture: str, config: Config) -> Geometry:
    """LLaMA's spelling, which most families share; the others translate theirs into it."""
    hidden_size, num_heads = count(config, "hidden_size"), count(config, "num_attention_heads")
    num_kv_heads = count(config, "num_key_value_heads", num_heads)
    must_divide("num_attention_heads", num_heads, "num_key_value_heads", num_kv_heads)
    head_dim = optional_count(config, "head_dim")
    if head_dim is None:
        must_divide("hidden_size", hidden_size, "num_attention_heads", num_heads)
        head_dim = hidden_size // num_heads
    num_layers = count(config, "num_hidden_layers")
    has_attention_bias = flag(config, "attention_bias", False)
    about_windows = window_fields(architecture, config)
    has_window = flag(about_windows, "use_sliding_window", True)
    window = optional_count(about_windows, "sliding_window") if has_window else None
    num_full_layers = layer_windows(about_windows, window, num_layers).count(None) if window else 0
    has_windows = num_full_layers < num_layers
    return Geometry(
        architecture=architecture,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=count(config, "intermediate_size"),
        vocab_size=count(config, "vocab_size"),
        max_position_embeddings=count(config, "max_position_embeddings"),
        tie_word_embeddings=flag(config, "tie_word_embeddings", False),
        dtype=_dtype(config),
        has_attention_bias=has_attention_bias,
        has_mlp_bias=flag(config, "mlp_bias", False),
        sliding_window=window if has_windows else None,
        has_output_bias=has_attention_bias,
        num_full_layers=num_full_layers if has_windows else 0,
    )


def _dtype(config: Config) -> str:
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise UnsupportedModelError(
            f"config.json: the data type {dtype!r} is not supported; known: {', '.join(DTYPE_BYTES)}"
        )
    return dtype


def _read_qwen2(architecture: str, config: Config) -> Geometry:
    return replace(_read_llama(architecture, config), has_attention_bias=True, has_output_bias=False)


def _read_qwen3(architecture: str, config: Config) -> Geometry:
    common = _read_llama(architecture, _with_defaults(config, head_dim=128))
    return replace(common, has_qk_norm=True)


def _read_gpt_neox(architecture: str, config: Config) -> Geometry:
    with_biases = {**_with_defaults(config, attention_bias=True), "mlp_bias": True}
    common = _read_llama(architecture, _without_head_dim(with_biases))
    return replace(common, has_gated_mlp=False, has_norm_bias=True)


def _read_falcon(architecture: str, config: Config) -> Geometry:
    """Published files leave much to defaults: the sizes of the MLP and the context, and that embeddings are tied."""
    has_bias = flag(config, "bias", False)
    translated = {
        **_with_defaults(config, max_position_embeddings=2048, tie_word_embeddings=True),
        "num_key_value_heads": _num_falcon_kv_heads(config),
        "intermediate_size": count(config, "ffn_hidden_size", 4 * count(config, "hidden_size")),
        "attention_bias": has_bias,
        "mlp_bias": has_bias,
    }
    common = _read_llama(architecture, _without_head_dim(translated))
    return replace(common, has_gated_mlp=False, has_norm_bias=True, num_layer_norms=_num_falcon_norms(config))


def _with_defaults(config: Config, **defaults: object) -> Config:
    """What a family's configuration class fills in where a file says nothing, or null."""
    absent = {name: value for name, value in defaults.items() if config.get(name) is None}
    return {**config, **absent}


def _without_head_dim(config: Config) -> Config:
    """For families whose heads share the hidden size exactly, whatever a file says beside it."""
    return {**config, "head_dim": None}


def _num_falcon_kv_heads(config: Config) -> int | None:
    """None: as many as query heads."""
    if flag(config, "new_decoder_architecture", False):
        return optional_count(config, "num_kv_heads")
    return 1 if flag(config, "multi_query", True) else None


def _num_falcon_norms(config: Config) -> int:
    """Attention and MLP that read the same input share its norm, unless the newer architecture gives each its own."""
    if flag(config, "new_decoder_architecture", False):
        return count(config, "num_ln_in_parallel_attn", 2)
    return 1 if flag(config, "parallel_attn", True) else 2


def _read_gemma2(architecture: str, config: Config) -> Geometry:
    """Norms before and after both halves of a layer; every other layer has a window."""
    common = _read_llama(architecture, _with_defaults(config, tie_word_embeddings=True))
    return replace(common, num_layer_norms=4)


def _read_gemma3(architecture: str, config: Config) -> Geometry:
    return replace(_read_gemma2(architecture, config), has_qk_norm=True)


def _read_mixtral(architecture: str, config: Config) -> Geometry:
    common = _read_llama(architecture, config)
    experts = _experts(config, "num_local_experts", common.num_layers, common.intermediate_size)
    return replace(common, experts=experts)


def _read_qwen2_moe(architecture: str, config: Config) -> Geometry:
    common = _read_qwen2(architecture, config)
    experts = _qwen_experts(config, common)
    shared = optional_count(config, "shared_expert_intermediate_size") or 0
    if experts is None:
        return common
    return replace(common, experts=replace(experts, shared_intermediate_size=shared, has_shared_gate=shared > 0))


def _read_qwen3_moe(architecture: str, config: Config) -> Geometry:
    common = _read_qwen3(architecture, config)
    return replace(common, experts=_qwen_experts(config, common))


def _qwen_experts(config: Config, common: Geometry) -> Experts | None:
    """Every `decoder_sparse_step`-th layer has experts, unless `mlp_only_layers` names it."""
    step, dense = count(config, "decoder_sparse_step", 1), layer_list(config, "mlp_only_layers")
    num_layers = sum((layer + 1) % step == 0 and layer not in dense for layer in range(common.num_layers))
    return _experts(config, "num_experts", num_layers, count(config, "moe_intermediate_size")) if num_layers else None


def _read_deepseek(architecture: str, config: Config) -> Geometry:
    """Latent attention; experts behind the first dense layers. Layers that only predict further tokens do not count."""
    latent = LatentAttention(
        query_rank=optional_count(config, "q_lora_rank"),
        kv_rank=count(config, "kv_lora_rank"),
        rotary_dim=count(config, "qk_rope_head_dim"),
        plain_dim=count(config, "qk_nope_head_dim"),
        value_dim=count(config, "v_head_dim"),
    )
    common = _read_llama(architecture, {**config, "head_dim": latent.plain_dim + latent.rotary_dim})
    first, every = optional_count(config, "first_k_dense_replace") or 0, count(config, "moe_layer_freq", 1)
    num_layers = sum(layer >= first and layer % every == 0 for layer in range(common.num_layers))
    if not num_layers or not optional_count(config, "n_routed_experts"):
        return replace(common, latent=latent)
    width = count(config, "moe_intermediate_size")
    experts = _experts(config, "n_routed_experts", num_layers, width)
    shared = (optional_count(config, "n_shared_experts") or 0) * width
    return replace(common, latent=latent, experts=replace(experts, shared_intermediate_size=shared))


def _experts(config: Config, count_name: str, num_layers: int, width: int) -> Experts:
    num_experts, per_token = count(config, count_name), count(config, "num_experts_per_tok")
    if per_token > num_experts:
        raise UnsupportedModelError(
            f"config.json: num_experts_per_tok={per_token} is more than {count_name}={num_experts}"
        )
    return Experts(num_layers, num_experts, per_token, width)


# Architecture -> how its config.json is read, where that differs from LLaMA's. Some of them the engine does not run
# yet: see `served`.
READERS: Mapping[str, Reader] = {
    "Qwen2ForCausalLM": _read_qwen2,
    "Qwen3ForCausalLM": _read_qwen3,
    "GPTNeoXForCausalLM": _read_gpt_neox,
    "FalconForCausalLM": _read_falcon,
    "Gemma2ForCausalLM": _read_gemma2,
    "Gemma3ForCausalLM": _read_gemma3,
    "MixtralForCausalLM": _read_mixtral,
    "Qwen2MoeForCausalLM": _read_qwen2_moe,
    "Qwen3MoeForCausalLM": _read_qwen3_moe,
    "DeepseekV2ForCausalLM": _read_deepseek,
    "DeepseekV3ForCausalLM": _read_deepseek,
}
