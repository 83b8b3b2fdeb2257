"""The LLaMA family: LLaMA 1 to 3, SmolLM2, TinyLlama, Mistral.

Sources: LLaMA (https://arxiv.org/abs/2302.13971) section 2.2, Mistral 7B (https://arxiv.org/abs/2310.06825) section 2
and the fields of their configurations.
"""

from collections.abc import Mapping
from typing import Self

from octavo_engine.errors import UnsupportedModelError
from octavo_engine.geometry import Geometry, layer_windows, window_fields
from octavo_engine.geometry.fields import positive_number
from octavo_engine.layers.attention import Attention
from octavo_engine.layers.decoder import Decoder, SequentialLayer
from octavo_engine.layers.mlp import GatedMlp
from octavo_engine.layers.norm import RmsNorm
from octavo_engine.layers.rope_config import read_rope_config
from octavo_engine.layers.rotary import RotaryEmbedding
from octavo_engine.models import Model, register_model


@register_model("LlamaForCausalLM", "MistralForCausalLM")
class Llama(Model):
    """Sequential layers, RMS norms, a gated MLP, rotary positions; Mistral's first models have sliding windows."""

    @classmethod
    def from_config(cls, geometry: Geometry, config: Mapping[str, object], max_model_len: int) -> Self:
        """As `Model.from_config`."""
        activation = config.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise UnsupportedModelError(f"config.json: hidden_act {activation!r} is not supported; supported: silu")
        eps = positive_number(config, "rms_norm_eps", 1e-6)

        def make_layer(sliding_window: int | None) -> SequentialLayer:
            return SequentialLayer(
                RmsNorm(geometry.hidden_size, eps),
                Attention(geometry, sliding_window=sliding_window, qk_norm_eps=eps),
                RmsNorm(geometry.hidden_size, eps),
                GatedMlp(geometry.hidden_size, geometry.intermediate_size, bias=geometry.has_mlp_bias),
            )

        about_windows = window_fields(geometry.architecture, config)
        windows = layer_windows(about_windows, geometry.sliding_window, geometry.num_layers)
        layers = [make_layer(window) for window in windows]
        rotary = RotaryEmbedding(read_rope_config(config, geometry.head_dim), max_model_len)
        return cls(geometry, Decoder(geometry, layers, RmsNorm(geometry.hidden_size, eps), rotary))
