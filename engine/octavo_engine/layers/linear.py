"""Linear layers. Projections of the same input are stacked into one weight, so that they are one multiplication."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from octavo_kernels.ops.linear import LinearKernel, PackedLinear, linear_silu_and_mul
from torch import nn

from octavo_engine.layers.layer import Layer


@dataclass(frozen=True, slots=True)
class FusedHeads:
    """Rows of a checkpoint that fuses queries, keys and values: the query heads of a KV head, its key, its value."""

    num_kv_heads: int
    head_dim: int

    def stack(self, stored: torch.Tensor) -> torch.Tensor:
        """[rows, ...] as stored -> the same rows as all queries, all keys, all values."""
        groups = stored.view(self.num_kv_heads, -1, self.head_dim, *stored.shape[1:])
        queries, keys, values = groups[:, :-2], groups[:, -2], groups[:, -1]
        return torch.cat((queries.flatten(0, 2), keys.flatten(0, 1), values.flatten(0, 1)))


class Linear(Layer):
    """y = x W^T + b, where W stacks the checkpoint's weights named in `parts`.

    weight: [sum of parts, in_features], gone once `pack` has given it to a kernel
    parts:  name in the checkpoint (q_proj) -> its number of output features, in order
    fused:  how the rows of a part are ordered in the checkpoint, where they are not as they are here
    """

    def __init__(
        self, in_features: int, parts: Mapping[str, int], *, bias: bool, fused: FusedHeads | None = None
    ) -> None:
        super().__init__()
        self.parts, self.fused = dict(parts), fused
        out_features = sum(parts.values())
        self.weight: nn.Parameter | None = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        self._packed: PackedLinear

    def pack(self, kernel: LinearKernel) -> int:
        """Hand the loaded weight to a kernel, once. Returns the bytes that it keeps."""
        assert self.weight is not None
        self._packed = kernel.pack(self.weight.data, None if self.bias is None else self.bias.data)
        self.weight = self.bias = None
        return self._packed.num_bytes

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_tokens, in_features] -> [num_tokens, out_features]."""
        return self._packed(hidden)

    def silu_and_mul(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_tokens, in_features] -> [num_tokens, out_features / 2]: silu of the first half times the second."""
        return linear_silu_and_mul(self._packed, hidden)
