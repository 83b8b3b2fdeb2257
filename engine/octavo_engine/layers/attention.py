"""Self-attention over the paged KV cache, with grouped KV heads and rotary positions."""

import torch
from octavo_kernels.ops.kv_write import write_kv_rows
from octavo_kernels.ops.paged_attention import run_attention
from octavo_kernels.ops.rotary import apply_rotary_

from octavo_engine.layers.layer import Layer
from octavo_engine.layers.linear import Linear
from octavo_engine.layers.step import Step


class Attention(Layer):
    """Projections, rotation, KV write, attention, output projection."""

    def __init__(
        self, hidden_size: int, num_heads: int, num_kv_heads: int, head_dim: int, *, bias: bool, output_bias: bool
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.scale = head_dim**-0.5
        kv_size = num_kv_heads * head_dim
        self.qkv_proj = Linear(
            hidden_size, {"q_proj": num_heads * head_dim, "k_proj": kv_size, "v_proj": kv_size}, bias=bias
        )
        self.o_proj = Linear(num_heads * head_dim, {"o_proj": hidden_size}, bias=output_bias)

    def forward(self, hidden: torch.Tensor, kv_cache_layer: torch.Tensor, step: Step) -> torch.Tensor:
        """[num_tokens, hidden_size] -> the same; the step's keys and values land in the cache."""
        heads = self.qkv_proj(hidden).view(len(hidden), -1, self.head_dim)
        num_rotated = self.num_heads + self.num_kv_heads
        apply_rotary_(heads, num_rotated, step.cos, step.sin)
        query, key, value = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        write_kv_rows(key, value, kv_cache_layer, step.kv_rows)
        attended = run_attention(query, kv_cache_layer, step.plan, scale=self.scale)
        output: torch.Tensor = self.o_proj(attended.reshape(len(hidden), -1))
        return output
