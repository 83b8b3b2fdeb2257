"""Falcon: 7B, 40B, 180B, 11B ("Falcon 2") and the RefinedWeb models ("Falcon-RW").

Sources: The Falcon Series of Open Language Models (https://arxiv.org/abs/2311.16867) section 4 and the fields of their
configurations.
"""

from collections.abc import Mapping
from typing import ClassVar, Self

from octavo_engine.geometry import Geometry
from octavo_engine.geometry.fields import positive_number
from octavo_engine.layers.alibi import alibi_slopes
from octavo_engine.layers.attention import Attention
from octavo_engine.layers.decoder import Decoder, ParallelLayer, SequentialLayer
from octavo_engine.layers.mlp import Mlp, read_gelu
from octavo_engine.layers.norm import LayerNorm
from octavo_engine.layers.rope_config import read_rope_config
from octavo_engine.layers.rotary import RotaryEmbedding
from octavo_engine.models import Model, register_model


@register_model("FalconForCausalLM")
class Falcon(Model):
    """Attention and MLP side by side behind one norm or two, or in sequence; rotary positions or linear biases."""

    checkpoint_names: ClassVar[Mapping[str, str]] = {
        "transformer": "model",
        "word_embeddings": "embed_tokens",
        "h": "layers",
        "ln_attn": "input_layernorm",
        "self_attention": "self_attn",
        "query_key_value": "qkv_proj",
        "dense": "o_proj",
        "ln_mlp": "post_attention_layernorm",
        "dense_h_to_4h": "up_proj",
        "dense_4h_to_h": "down_proj",
        "ln_f": "norm",
    }

    @classmethod
    def from_config(cls, geometry: Geometry, config: Mapping[str, object], max_model_len: int) -> Self:
        """As `Model.from_config`."""
        size = geometry.hidden_size
        eps = positive_number(config, "layer_norm_epsilon", 1e-5)
        approximate = read_gelu(config, "activation")
        is_parallel = config.get("new_decoder_architecture") or config.get("parallel_attn", True)
        has_alibi = bool(config.get("alibi", False))
        # Falcon adds its biases before it scales the scores.
        slopes = alibi_slopes(geometry.num_heads) * geometry.head_dim**-0.5 if has_alibi else None

        def make_layer() -> ParallelLayer | SequentialLayer:
            attention = Attention(geometry, is_fused=True, alibi_slopes=slopes)
            mlp = Mlp(size, geometry.intermediate_size, bias=geometry.has_mlp_bias, approximate=approximate)
            if not is_parallel:
                return SequentialLayer(LayerNorm(size, eps), attention, LayerNorm(size, eps), mlp)
            mlp_norm = LayerNorm(size, eps) if geometry.num_layer_norms == 2 else None
            return ParallelLayer(LayerNorm(size, eps), attention, mlp_norm, mlp)

        rotary = None
        if not has_alibi:
            rotary = RotaryEmbedding(read_rope_config(config, geometry.head_dim), max_model_len)
        layers = [make_layer() for _ in range(geometry.num_layers)]
        return cls(geometry, Decoder(geometry, layers, LayerNorm(size, eps), rotary))
