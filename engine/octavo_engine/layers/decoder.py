"""The stack that all decoder-only families share: embedding, layers, final norm.

Names of submodules, and so of parameters, are those of LLaMA's checkpoints.
"""

from collections.abc import Sequence

import torch
from octavo_kernels.ops.attention_metadata import AttentionMetadata
from torch import nn

from octavo_engine.geometry import Geometry
from octavo_engine.layers.attention import Attention
from octavo_engine.layers.embedding import Embedding
from octavo_engine.layers.layer import Layer
from octavo_engine.layers.mlp import GatedMlp, Mlp
from octavo_engine.layers.norm import Norm
from octavo_engine.layers.rotary import RotaryEmbedding
from octavo_engine.layers.step import Step, prepare_step


class SequentialLayer(Layer):
    """Attention, then the MLP, each behind a norm: x = x + attention(norm(x)), then x = x + mlp(norm(x))."""

    def __init__(self, attention_norm: Norm, attention: Attention, mlp_norm: Norm, mlp: GatedMlp | Mlp) -> None:
        super().__init__()
        self.input_layernorm = attention_norm
        self.self_attn = attention
        self.post_attention_layernorm = mlp_norm
        self.mlp = mlp

    def forward(
        self, hidden: torch.Tensor, residual: torch.Tensor, kv_cache_layer: torch.Tensor, step: Step
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(what to add to the residual stream, residual stream), both [num_tokens, hidden_size]."""
        hidden, residual = self.input_layernorm.add(hidden, residual)
        hidden = self.self_attn(hidden, kv_cache_layer, step)
        hidden, residual = self.post_attention_layernorm.add(hidden, residual)
        return self.mlp(hidden), residual


class ParallelLayer(Layer):
    """Attention and the MLP beside each other: x = x + attention(norm(x)) + mlp(norm(x)), with two norms or one."""

    def __init__(self, attention_norm: Norm, attention: Attention, mlp_norm: Norm | None, mlp: GatedMlp | Mlp) -> None:
        super().__init__()
        self.input_layernorm = attention_norm
        self.self_attn = attention
        self.post_attention_layernorm = mlp_norm
        self.mlp = mlp

    def forward(
        self, hidden: torch.Tensor, residual: torch.Tensor, kv_cache_layer: torch.Tensor, step: Step
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `SequentialLayer.forward`."""
        normalised, residual = self.input_layernorm.add(hidden, residual)
        attended = self.self_attn(normalised, kv_cache_layer, step)
        if self.post_attention_layernorm:
            normalised = self.post_attention_layernorm(residual)
        return self.mlp(normalised).add_(attended), residual


class Decoder(Layer):
    """Token ids to hidden states. Without `rotary`, positions are the attention's business."""

    def __init__(
        self,
        geometry: Geometry,
        layers: Sequence[SequentialLayer | ParallelLayer],
        norm: Norm,
        rotary: RotaryEmbedding | None,
    ) -> None:
        super().__init__()
        self.embed_tokens = Embedding(geometry.vocab_size, geometry.hidden_size)
        self.layers = nn.ModuleList(layers)
        self.norm = norm
        self.rotary = rotary
        self.sliding_windows = {layer.self_attn.sliding_window for layer in layers}

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """As the engine's `Model.forward`."""
        hidden = self.embed_tokens(input_ids)
        rotary = self.rotary(positions, hidden.dtype) if self.rotary else None
        step = prepare_step(rotary, kv_cache, metadata, hidden.dtype, self.sliding_windows)
        # The residual stream starts empty, so that every layer adds what the one before it computed.
        residual = torch.zeros_like(hidden)
        for layer, kv_cache_layer in zip(self.layers, kv_cache.unbind(1), strict=True):
            hidden, residual = layer(hidden, residual, kv_cache_layer, step)
        normalised: torch.Tensor = self.norm.add(hidden, residual)[0]
        return normalised
