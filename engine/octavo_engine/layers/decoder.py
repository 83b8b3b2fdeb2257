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
from octavo_engine.parallel import Group, Pipeline


class SequentialLayer(Layer):
    """Attention, then the MLP, each behind a norm: x = x + attention(norm(x)), then x = x + mlp(norm(x))."""

    def __init__(self, attention_norm: Norm, attention: Attention, mlp_norm: Norm, mlp: GatedMlp | Mlp) -> None:
        super().__init__()
        self.input_layernorm = attention_norm
        self.self_attn = attention
        self.post_attention_layernorm = mlp_norm
        self.mlp = mlp

    def forward(
        self, hidden: torch.Tensor, residual: torch.Tensor | None, kv_cache_layer: torch.Tensor, step: Step
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
        self._summed_over: Group | None = None

    def shard(self, group: Group) -> None:
        """As `Layer.shard`: attention and MLP are summed over the ranks together, in one exchange."""
        self.self_attn.o_proj.summed_over = self.mlp.down_proj.summed_over = None
        self._summed_over = group

    def forward(
        self, hidden: torch.Tensor, residual: torch.Tensor | None, kv_cache_layer: torch.Tensor, step: Step
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `SequentialLayer.forward`."""
        normalised, residual = self.input_layernorm.add(hidden, residual)
        attended = self.self_attn(normalised, kv_cache_layer, step)
        if self.post_attention_layernorm:
            normalised = self.post_attention_layernorm(residual)
        output = self.mlp(normalised).add_(attended)
        return (self._summed_over.all_reduce(output) if self._summed_over else output), residual


class Decoder(Layer):
    """Token ids to hidden states. Without `rotary`, positions are the attention's business.

    A stage of a pipeline has some of the layers; the first one also looks tokens up, the last one normalises.
    """

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
        self._own_layers = tuple(layers)
        self._pipeline: Pipeline | None = None
        self.sliding_windows = {layer.self_attn.sliding_window for layer in layers}

    def keep_stage(self, pipeline: Pipeline) -> None:
        """Keep one stage's layers; in the places of the others is nothing."""
        own = pipeline.layers(len(self._own_layers))
        self._pipeline, self._own_layers = pipeline, self._own_layers[own.start : own.stop]
        for i in set(range(len(self.layers))) - set(own):
            self.layers[i] = nn.Identity()
        self.sliding_windows = {layer.self_attn.sliding_window for layer in self._own_layers}

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """As the engine's `Model.forward`; before the last stage, something of that shape."""
        hidden = self._look_up(input_ids)
        rotary = self.rotary(positions, hidden.dtype) if self.rotary else None
        step = prepare_step(rotary, kv_cache, metadata, hidden.dtype, self.sliding_windows)
        # The residual stream starts empty, so that every layer adds what the one before it computed.
        residual: torch.Tensor | None = None
        for layer, kv_cache_layer in zip(self._own_layers, kv_cache.unbind(1), strict=True):
            hidden, residual = layer(hidden, residual, kv_cache_layer, step)
        if self._pipeline and not self._pipeline.is_last:
            assert residual is not None, "a stage has layers"
            self._pipeline.send(residual.add_(hidden))
            return residual
        normalised: torch.Tensor = self.norm.add(hidden, residual)[0]
        return normalised

    def _look_up(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self._pipeline is None or self._pipeline.is_first:
            looked_up: torch.Tensor = self.embed_tokens(input_ids)
            return looked_up
        weight = self.norm.weight
        return self._pipeline.receive(
            torch.empty(len(input_ids), len(weight), dtype=weight.dtype, device=weight.device)
        )
