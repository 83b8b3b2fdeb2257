"""GPT-NeoX: GPT-NeoX-20B, Pythia and those built like them.

Sources: GPT-NeoX-20B (https://arxiv.org/abs/2204.06745) section 2.1, Pythia (https://arxiv.org/abs/2304.01373) section
2.2 and the fields of their configurations.
"""

from collections.abc import Mapping
from typing import ClassVar, Self

from octavo_engine.geometry import Geometry
from octavo_engine.geometry.fields import positive_number
from octavo_engine.layers.attention import Attention
from octavo_engine.layers.decoder import Decoder, ParallelLayer, SequentialLayer
from octavo_engine.layers.mlp import Mlp, read_gelu
from octavo_engine.layers.norm import LayerNorm
from octavo_engine.layers.rope_config import read_rope_config
from octavo_engine.layers.rotary import RotaryEmbedding
from octavo_engine.models import Model, register_model

ROTARY_SHARE = 0.25  # of a head, unless the configuration says otherwise


@register_model("GPTNeoXForCausalLM")
class GptNeoX(Model):
    """Attention and MLP side by side or in sequence, layer norms, rotary positions for a part of each head."""

    checkpoint_names: ClassVar[Mapping[str, str]] = {
        "gpt_neox": "model",
        "embed_in": "embed_tokens",
        "attention": "self_attn",
        "query_key_value": "qkv_proj",
        "dense": "o_proj",
        "dense_h_to_4h": "up_proj",
        "dense_4h_to_h": "down_proj",
        "final_layer_norm": "norm",
        "embed_out": "lm_head",
    }

    @classmethod
    def from_config(cls, geometry: Geometry, config: Mapping[str, object], max_model_len: int) -> Self:
        """As `Model.from_config`."""
        size = geometry.hidden_size
        eps = positive_number(config, "layer_norm_eps", 1e-5)
        approximate = read_gelu(config, "hidden_act")
        layer_class = ParallelLayer if config.get("use_parallel_residual", True) else SequentialLayer

        def make_layer() -> ParallelLayer | SequentialLayer:
            attention = Attention(geometry, is_fused=True)
            mlp = Mlp(size, geometry.intermediate_size, bias=geometry.has_mlp_bias, approximate=approximate)
            return layer_class(LayerNorm(size, eps), attention, LayerNorm(size, eps), mlp)

        # Before transformers 5 the rotary settings had names of their own.
        spelled = {
            "rope_theta": config.get("rotary_emb_base"),
            "partial_rotary_factor": config.get("rotary_pct", ROTARY_SHARE),
            **config,
        }
        rotary = RotaryEmbedding(read_rope_config(spelled, geometry.head_dim), max_model_len)
        layers = [make_layer() for _ in range(geometry.num_layers)]
        return cls(geometry, Decoder(geometry, layers, LayerNorm(size, eps), rotary))
