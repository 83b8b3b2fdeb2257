"""Layer normalisation against float64."""

import pytest
import torch
from octavo_kernels.ops.layer_norm import (
    add_layer_norm,
    add_layer_norm_triton,
    example_inputs,
    layer_norm,
    layer_norm_triton,
)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}
# The kernel rounds once, at the end: half a unit in the last place; a whole one for bfloat16, which the interpreter
# cuts off. What cancels against the bias keeps the error of its summands.
KERNEL_TOLERANCE = {
    torch.float32: {"atol": 2e-5, "rtol": 1e-5},
    torch.float16: {"atol": 2e-5, "rtol": 6e-4},
    torch.bfloat16: {"atol": 2e-5, "rtol": 8e-3},
}


def reference(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    centred = hidden.double() - hidden.double().mean(-1, keepdim=True)
    normalised = centred / (centred.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    return normalised if bias is None else normalised + bias.double()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("hidden_size", [2, 63, 768])
@pytest.mark.parametrize("num_tokens", [1, 63, 1000])
def test_equals_reference(num_tokens: int, hidden_size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    hidden, weight, bias, eps = example_inputs(num_tokens, hidden_size, dtype)
    output = layer_norm(hidden, weight, bias, eps)
    assert output.dtype == dtype
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        output.double(), reference(hidden, weight, bias, eps), atol=tolerance * 4, rtol=tolerance
    )


def test_fused_form_adds_the_residual_first() -> None:
    torch.manual_seed(0)
    hidden, weight, bias, eps = example_inputs(7, 64)
    residual = torch.randn_like(hidden)
    expected = hidden + residual
    output, total = add_layer_norm(hidden, residual, weight, bias, eps)
    assert total is residual
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(output, layer_norm(expected, weight, bias, eps))


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", KERNEL_TOLERANCE, ids=str)
@pytest.mark.parametrize("hidden_size", [17, 63, 768, 5120, 16_384])
@pytest.mark.parametrize("num_tokens", [1, 1000] if torch.cuda.is_available() else [1, 5])
def test_kernel_equals_reference(
    num_tokens: int, hidden_size: int, dtype: torch.dtype, has_bias: bool, device: torch.device
) -> None:
    torch.manual_seed(0)
    hidden, weight, bias, eps = example_inputs(num_tokens, hidden_size, dtype)
    hidden, weight, given = hidden.to(device), weight.to(device), bias.to(device) if has_bias else None
    output = layer_norm_triton(hidden, weight, given, eps)
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), reference(hidden, weight, given, eps), **KERNEL_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", KERNEL_TOLERANCE, ids=str)
def test_kernel_normalises_the_sum_before_it_is_rounded(dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    hidden, weight, bias, eps = (
        each.to(device) if isinstance(each, torch.Tensor) else each for each in example_inputs(7, 63, dtype)
    )
    residual = torch.randn(7, 63, device=device).to(dtype)
    total = hidden.double() + residual.double()
    output, stream = add_layer_norm_triton(hidden, residual, weight, bias, eps)
    assert stream is residual
    torch.testing.assert_close(stream, total.to(dtype))
    torch.testing.assert_close(output.double(), reference(total, weight, bias, eps), **KERNEL_TOLERANCE[dtype])


def test_kernel_takes_rows_that_lie_apart(device: torch.device) -> None:
    torch.manual_seed(0)
    wide, weight = torch.randn(5, 3, 40, device=device), torch.randn(40, device=device)
    before = wide.clone()
    output, total = add_layer_norm_triton(wide[:, 0], wide[:, 2], weight, None, 1e-5)
    torch.testing.assert_close(total, before[:, 0] + before[:, 2])
    torch.testing.assert_close(output.double(), reference(total, weight, None, 1e-5), atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(wide[:, :2], before[:, :2])


def test_fused_form_refuses_what_does_not_fit() -> None:
    hidden, weight, bias, eps = example_inputs(2, 8)
    with pytest.raises(ValueError, match=r"parameter \(4,\) does not fit"):
        add_layer_norm(hidden, hidden.clone(), weight, bias[:4], eps)
    with pytest.raises(ValueError, match="residual"):
        add_layer_norm(hidden, hidden[:1].clone(), weight, bias, eps)


def test_kernel_refuses_a_bias_that_does_not_fit(device: torch.device) -> None:
    hidden, weight, _, eps = example_inputs(2, 8)
    with pytest.raises(ValueError, match=r"parameter \(4,\) does not fit"):
        layer_norm_triton(hidden.to(device), weight.to(device), torch.zeros(4, device=device), eps)
