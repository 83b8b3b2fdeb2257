"""The gate of a gated MLP against float64."""

import pytest
import torch
from octavo_kernels.ops.silu_and_mul import example_inputs, silu_and_mul


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("size", [1, 63, 1536])
@pytest.mark.parametrize("num_tokens", [1, 63, 1000])
def test_equals_reference(num_tokens: int, size: int, dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    (gate_up,) = example_inputs(num_tokens, size, dtype)
    gate, up = gate_up[:, :size].double(), gate_up[:, size:].double()
    output = silu_and_mul(gate_up)
    assert output.shape == (num_tokens, size)
    assert output.is_contiguous()
    torch.testing.assert_close(output.double(), gate / (1 + torch.exp(-gate)) * up, atol=tolerance, rtol=tolerance)
