"""Linear layers. Projections of the same input are stacked into one weight, so that they are one multiplication."""

from collections.abc import Mapping

import torch
from octavo_kernels.ops.linear import LinearKernel, PackedLinear
from torch import nn

from octavo_engine.layers.layer import Layer


class Linear(Layer):
    """y = x W^T + b, where W stacks the checkpoint's weights named in `parts`.

    weight: [sum of parts, in_features], gone once `pack` has given it to a kernel
    parts:  name in the checkpoint (q_proj) -> its number of output features, in order
    """

    def __init__(self, in_features: int, parts: Mapping[str, int], *, bias: bool) -> None:
        super().__init__()
        self.parts = dict(parts)
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
