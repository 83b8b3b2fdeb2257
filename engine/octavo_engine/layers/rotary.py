"""Rotary position embedding as a layer: frequencies fixed at construction, one cosine and sine table per step."""

import torch
from octavo_kernels.launch import runs_triton
from octavo_kernels.ops.rotary import rotary_cos_sin, rotary_frequencies

from octavo_engine.layers.layer import Layer
from octavo_engine.layers.rope_config import RopeConfig
from octavo_engine.layers.step import RotaryTables


class RotaryEmbedding(Layer):
    """Makes the tables that attention rotates queries and keys with, once per step for all layers."""

    def __init__(self, config: RopeConfig, max_position: int) -> None:
        super().__init__()
        with torch.device("cpu"):  # computed, not loaded, so real even in a model that is built without memory
            frequencies, self.factor = rotary_frequencies(config.rotary_dim, config.theta, config.scaling, max_position)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, positions: torch.Tensor, dtype: torch.dtype) -> RotaryTables:
        """positions: [num_tokens] int64 -> cosine and sine, in float32 on a GPU, else in `dtype`, that of queries."""
        frequencies = self.get_buffer("frequencies")
        return rotary_cos_sin(positions, frequencies, self.factor, torch.float32 if runs_triton(positions) else dtype)
