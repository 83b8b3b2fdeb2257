"""Normalisation layers, alone or of the residual stream with what a layer adds to it."""

import torch
from octavo_kernels.ops.layer_norm import add_layer_norm, layer_norm
from octavo_kernels.ops.rms_norm import add_rms_norm, rms_norm
from torch import nn

from octavo_engine.layers.layer import Layer


class RmsNorm(Layer):
    """Root mean square normalisation with a learned weight, optionally of hidden plus residual."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size), requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise [num_tokens, hidden_size]."""
        return rms_norm(hidden, self.weight, self.eps)

    def add(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(normalised sum, sum) of `hidden` and `residual`, whose memory holds the sum; None is an empty stream."""
        if residual is None:
            return self(hidden), hidden
        return add_rms_norm(hidden, residual, self.weight, self.eps)


class LayerNorm(Layer):
    """Layer normalisation with a learned weight and bias, optionally of hidden plus residual."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(hidden_size), requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise [num_tokens, hidden_size]."""
        return layer_norm(hidden, self.weight, self.bias, self.eps)

    def add(self, hidden: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(normalised sum, sum) of `hidden` and `residual`, whose memory holds the sum; None is an empty stream."""
        if residual is None:
            return self(hidden), hidden
        return add_layer_norm(hidden, residual, self.weight, self.bias, self.eps)


Norm = RmsNorm | LayerNorm
