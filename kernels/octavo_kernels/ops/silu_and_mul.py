"""The gate of a gated MLP: SiLU of one half times the other."""

import torch

from octavo_kernels.native import kernels_for


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, where `gate_up` holds both side by side.

    gate_up: [num_tokens, 2 * intermediate_size], contiguous
    Returns  [num_tokens, intermediate_size], contiguous
    Source: Shazeer, "GLU Variants Improve Transformer" (https://arxiv.org/abs/2002.05202), SwiGLU.
    """
    if kernels := kernels_for(gate_up):
        return kernels.silu_and_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)


def example_inputs(
    num_tokens: int, intermediate_size: int = 1536, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor]:
    """Arguments of `silu_and_mul`."""
    return (torch.randn(num_tokens, 2 * intermediate_size).to(dtype),)
