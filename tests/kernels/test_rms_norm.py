"""RMS normalisation against float64."""

import pytest
import torch
from octavo_kernels.ops.rms_norm import add_rms_norm, example_inputs, rms_norm

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def reference(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = hidden.double()
    return (wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt()) * weight.double()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("hidden_size", [1, 63, 576])
@pytest.mark.parametrize("num_tokens", [1, 63, 1000])
def test_equals_reference(num_tokens: int, hidden_size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, weight, eps = example_inputs(num_tokens, hidden_size, dtype)
    before = hidden.clone()
    output = rms_norm(hidden, weight, eps)
    assert output.dtype == dtype
    torch.testing.assert_close(
        output.double(), reference(hidden, weight, eps), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
    )
    torch.testing.assert_close(hidden, before)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_fused_form_adds_the_residual_first(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, weight, eps = example_inputs(7, 64, dtype)
    residual = torch.randn_like(hidden)
    expected = hidden + residual
    output, total = add_rms_norm(hidden, residual, weight, eps)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(output, rms_norm(expected, weight, eps))
