"""Rotary position embedding as a layer: frequencies fixed at construction, one cosine and sine table per step."""

import torch
from octavo_kernels.ops.rotary import rotary_cos_sin, rotary_frequencies

from octavo_engine.layers.layer import Layer
from octavo_engine.layers.rope_config import RopeConfig


class RotaryEmbedding(Layer):
    """Makes the (cos, sin) that `apply_rotary` wants, once per step for all layers."""

    def __init__(self, config: RopeConfig, max_position: int) -> None:
        super().__init__()
        with torch.device("cpu"):  # computed, not loaded, so real even in a model that is built without memory
            frequencies, self.factor = rotary_frequencies(config.rotary_dim, config.theta, config.scaling, max_position)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """positions: [num_tokens] int64 -> cosine and sine, each [num_tokens, 1, rotary_dim] of `dtype`."""
        frequencies = self.get_buffer("frequencies")
        return rotary_cos_sin(positions, frequencies, self.factor, dtype)
