"""Self-attention over the paged KV cache, with grouped KV heads."""

import torch
from octavo_kernels.ops.paged_attention import run_attention
from octavo_kernels.ops.rotate_and_write_kv import rotate_and_write_kv

from octavo_engine.geometry import Geometry
from octavo_engine.layers.layer import Layer
from octavo_engine.layers.linear import FusedHeads, Linear
from octavo_engine.layers.norm import RmsNorm
from octavo_engine.layers.step import Step
from octavo_engine.parallel import Group


class Attention(Layer):
    """Projections, normalisation of heads, rotation, KV write, attention, output projection.

    sliding_window: a token sees itself and the `sliding_window - 1` tokens before it; None: its whole context
    is_fused:       the checkpoint keeps queries, keys and values in one tensor, head by head
    qk_norm_eps:    of the heads' normalisation, where the geometry has it
    alibi_slopes:   [num_heads] float32, what a head adds to its scores for each token of distance
    k_scale, v_scale: what keys and values are divided by in an 8-bit cache
    """

    alibi_slopes: torch.Tensor | None

    def __init__(
        self,
        geometry: Geometry,
        *,
        sliding_window: int | None = None,
        is_fused: bool = False,
        qk_norm_eps: float = 1e-6,
        alibi_slopes: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = geometry.num_heads, geometry.num_kv_heads, geometry.head_dim
        self.scale = self.head_dim**-0.5
        self.sliding_window, self.qk_norm_eps = sliding_window, qk_norm_eps
        self.k_scale = self.v_scale = 1.0
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        parts, fused = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}, None
        if is_fused:
            parts, fused = {"qkv_proj": q_size + 2 * kv_size}, FusedHeads(self.num_kv_heads, self.head_dim)
        self.qkv_proj = Linear(geometry.hidden_size, parts, bias=geometry.has_attention_bias, fused=fused)
        self.q_norm = RmsNorm(self.head_dim, qk_norm_eps) if geometry.has_qk_norm else None
        self.k_norm = RmsNorm(self.head_dim, qk_norm_eps) if geometry.has_qk_norm else None
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.o_proj = Linear(q_size, {"o_proj": geometry.hidden_size}, bias=geometry.has_output_bias)

    def shard(self, group: Group) -> None:
        """As `Layer.shard`: whole heads; several ranks have the same KV head where there are fewer than ranks."""
        heads, kv_heads = group.share(self.num_heads), group.share_or_copy(self.num_kv_heads)
        group_size = self.num_heads // self.num_kv_heads
        self.num_heads, self.num_kv_heads = heads.stop - heads.start, kv_heads.stop - kv_heads.start
        queries, keys = self._rows_of(heads), self._rows_of(kv_heads)
        if self.qkv_proj.fused:
            fused = slice(keys.start * (group_size + 2), keys.stop * (group_size + 2))
            first = kv_heads.start * group_size
            wanted = FusedHeads(self.num_kv_heads, self.head_dim, slice(heads.start - first, heads.stop - first))
            self.qkv_proj.keep_rows({"qkv_proj": fused}, wanted)
        else:
            self.qkv_proj.keep_rows({"q_proj": queries, "k_proj": keys, "v_proj": keys})
        self.o_proj.keep_columns(queries, group)
        if self.alibi_slopes is not None:
            self.alibi_slopes = self.alibi_slopes[heads].clone()

    def _rows_of(self, heads: slice) -> slice:
        return slice(heads.start * self.head_dim, heads.stop * self.head_dim)

    def forward(self, hidden: torch.Tensor, kv_cache_layer: torch.Tensor, step: Step) -> torch.Tensor:
        """[num_tokens, hidden_size] -> the same; the step's keys and values land in the cache."""
        heads = self.qkv_proj(hidden).view(len(hidden), -1, self.head_dim)
        cos, sin = step.rotary or (None, None)
        # Wider caches hold keys and values as they are, whatever the checkpoint was calibrated for.
        is_8_bit = kv_cache_layer.dtype.itemsize == 1
        k_scale, v_scale = (self.k_scale, self.v_scale) if is_8_bit else (1.0, 1.0)
        rotate_and_write_kv(
            heads, self.num_heads, self.num_kv_heads, cos, sin, kv_cache_layer, step.kv_rows,
            q_norm_weight=self.q_norm.weight if self.q_norm else None,
            k_norm_weight=self.k_norm.weight if self.k_norm else None,
            eps=self.qk_norm_eps, k_scale=k_scale, v_scale=v_scale,
        )  # fmt: skip
        query, key, value = torch.split(heads, [self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        plan = step.plans[self.sliding_window]
        attended = run_attention(
            query, kv_cache_layer, plan, scale=self.scale, alibi_slopes=self.alibi_slopes,
            k_scale=k_scale, v_scale=v_scale, new_kv=(key, value),
        )  # fmt: skip
        output: torch.Tensor = self.o_proj(attended.reshape(len(hidden), -1))
        return output
