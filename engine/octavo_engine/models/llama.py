"""The LLaMA family: LLaMA 1 to 3, SmolLM2, TinyLlama, Mistral.

Sources: LLaMA (https://arxiv.org/abs/2302.13971) section 2.2, Mistral 7B (https://arxiv.org/abs/2310.06825) section 2
and the fields of their configurations.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from octavo_kernels.ops.attention_metadata import AttentionMetadata
from torch import nn

from octavo_engine.errors import UnsupportedModelError
from octavo_engine.geometry import Geometry
from octavo_engine.layers.attention import Attention
from octavo_engine.layers.embedding import Embedding, OutputLayer
from octavo_engine.layers.layer import Layer
from octavo_engine.layers.mlp import GatedMlp
from octavo_engine.layers.norm import RmsNorm
from octavo_engine.layers.rope_config import RopeConfig, read_rope_config
from octavo_engine.layers.rotary import RotaryEmbedding
from octavo_engine.layers.step import Step, prepare_step
from octavo_engine.models import Model, register_model


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """What a LLaMA needs to know beyond its geometry."""

    rms_norm_eps: float
    rope: RopeConfig

    @classmethod
    def read(cls, config: Mapping[str, object], geometry: Geometry) -> Self:
        """From the fields of config.json. Raises UnsupportedModelError that names the field."""
        activation = config.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise UnsupportedModelError(f"config.json: hidden_act {activation!r} is not supported; supported: silu")
        return cls(
            rms_norm_eps=float(str(config.get("rms_norm_eps", 1e-6))),
            rope=read_rope_config(config, geometry.head_dim),
        )


class LlamaLayer(Layer):
    """One block: attention and MLP, each behind a norm and beside the residual stream."""

    def __init__(self, geometry: Geometry, config: LlamaConfig) -> None:
        super().__init__()
        size = geometry.hidden_size
        self.input_layernorm = RmsNorm(size, config.rms_norm_eps)
        self.self_attn = Attention(
            size, geometry.num_heads, geometry.num_kv_heads, geometry.head_dim,
            bias=geometry.has_attention_bias, output_bias=geometry.has_attention_bias,
        )  # fmt: skip
        self.post_attention_layernorm = RmsNorm(size, config.rms_norm_eps)
        self.mlp = GatedMlp(size, geometry.intermediate_size, bias=geometry.has_mlp_bias)

    def forward(
        self, hidden: torch.Tensor, residual: torch.Tensor, kv_cache_layer: torch.Tensor, step: Step
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(what to add to the residual stream, residual stream), both [num_tokens, hidden_size]."""
        hidden, residual = self.input_layernorm.add(hidden, residual)
        hidden = self.self_attn(hidden, kv_cache_layer, step)
        hidden, residual = self.post_attention_layernorm.add(hidden, residual)
        return self.mlp(hidden), residual


class LlamaDecoder(Layer):
    """Embedding, layers and final norm: what checkpoints call `model`."""

    def __init__(self, geometry: Geometry, config: LlamaConfig, max_model_len: int) -> None:
        super().__init__()
        self.sliding_window = geometry.sliding_window
        self.embed_tokens = Embedding(geometry.vocab_size, geometry.hidden_size)
        self.layers = nn.ModuleList(LlamaLayer(geometry, config) for _ in range(geometry.num_layers))
        self.norm = RmsNorm(geometry.hidden_size, config.rms_norm_eps)
        self.rotary = RotaryEmbedding(config.rope, max_model_len)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """As `Model.forward`."""
        hidden = self.embed_tokens(input_ids)
        cos, sin = self.rotary(positions, hidden.dtype)
        step = prepare_step(cos, sin, kv_cache, metadata, self.sliding_window)
        # The residual stream starts empty, so that every layer adds what the one before it computed.
        residual = torch.zeros_like(hidden)
        for layer, kv_cache_layer in zip(self.layers, kv_cache.unbind(1), strict=True):
            hidden, residual = layer(hidden, residual, kv_cache_layer, step)
        normalised: torch.Tensor = self.norm.add(hidden, residual)[0]
        return normalised


@register_model("LlamaForCausalLM", "MistralForCausalLM")
class Llama(Model):
    """A LLaMA with its output layer."""

    def __init__(self, geometry: Geometry, config: LlamaConfig, max_model_len: int) -> None:
        super().__init__(geometry)
        self.model = LlamaDecoder(geometry, config, max_model_len)
        tied = self.model.embed_tokens if geometry.tie_word_embeddings else None
        self.lm_head = OutputLayer(geometry.hidden_size, geometry.vocab_size, tied_to=tied)

    @classmethod
    def from_config(cls, geometry: Geometry, config: Mapping[str, object], max_model_len: int) -> Self:
        """As `Model.from_config`."""
        return cls(geometry, LlamaConfig.read(config, geometry), max_model_len)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """As `Model.forward`."""
        hidden: torch.Tensor = self.model(input_ids, positions, kv_cache, metadata)
        return hidden

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """As `Model.compute_logits`."""
        logits: torch.Tensor = self.lm_head(hidden)
        return logits
