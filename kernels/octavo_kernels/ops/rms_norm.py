"""Root mean square normalisation, alone and fused with the addition of the residual stream."""

import torch

from octavo_kernels.native import kernels_for


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32, in the type of `hidden`.

    hidden: [num_tokens, hidden_size]
    weight: [hidden_size]
    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (https://arxiv.org/abs/1910.07467), equation 4.
    """
    return torch.nn.functional.rms_norm(hidden, weight.shape, weight, eps)


def add_rms_norm(
    hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add `hidden` to the residual stream, then normalise the sum: (normalised, sum).

    hidden, residual: [num_tokens, hidden_size], contiguous; `residual` is overwritten with the sum
    """
    if kernels := kernels_for(hidden, residual, weight):
        return kernels.add_rms_norm(hidden, residual, weight, eps), residual
    residual += hidden
    return rms_norm(residual, weight, eps), residual


def example_inputs(
    num_tokens: int, hidden_size: int = 576, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Arguments of `rms_norm`, with rows of very different magnitude."""
    hidden = torch.randn(num_tokens, hidden_size) * torch.logspace(-3, 3, num_tokens)[:, None]
    return hidden.to(dtype), torch.randn(hidden_size).to(dtype), 1e-5
