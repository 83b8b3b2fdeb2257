"""Linear layers. Projections of the same input are stacked into one weight, so that they are one multiplication."""

from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional


class Linear(nn.Module):
    """y = x W^T + b, where W stacks the checkpoint's weights named in `parts`.

    weight: [sum of parts, in_features]
    parts:  name in the checkpoint (q_proj) -> its number of output features, in order
    """

    def __init__(self, in_features: int, parts: Mapping[str, int], *, bias: bool) -> None:
        super().__init__()
        self.in_features = in_features
        self.parts = dict(parts)
        out_features = sum(parts.values())
        self.weight = nn.Parameter(torch.empty(out_features, in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_tokens, in_features] -> [num_tokens, out_features]."""
        return functional.linear(hidden, self.weight, self.bias)
