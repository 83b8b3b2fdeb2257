"""The gated MLP."""

import torch
from octavo_kernels.ops.silu_and_mul import silu_and_mul

from octavo_engine.layers.layer import Layer
from octavo_engine.layers.linear import Linear


class GatedMlp(Layer):
    """down(silu(gate(x)) * up(x)), gate and up in one multiplication."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, bias: bool) -> None:
        super().__init__()
        self.gate_up_proj = Linear(
            hidden_size, {"gate_proj": intermediate_size, "up_proj": intermediate_size}, bias=bias
        )
        self.down_proj = Linear(intermediate_size, {"down_proj": hidden_size}, bias=bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden_size] -> the same."""
        output: torch.Tensor = self.down_proj(silu_and_mul(self.gate_up_proj(hidden)))
        return output
