"""RMS normalisation against float64."""

from typing import Any

import pytest
import torch
from octavo_kernels.ops.rms_norm import (
    add_rms_norm,
    add_rms_norm_triton,
    example_inputs,
    rms_norm,
    rms_norm_triton,
)

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}
# The kernel rounds once, at the end: half a unit in the last place; a whole one for bfloat16, which the interpreter
# cuts off.
KERNEL_TOLERANCE = {
    torch.float32: {"atol": 1e-5, "rtol": 1e-5},
    torch.float16: {"atol": 1e-5, "rtol": 6e-4},
    torch.bfloat16: {"atol": 1e-5, "rtol": 8e-3},
}


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


def test_fused_form_takes_rows_that_lie_apart() -> None:
    torch.manual_seed(0)
    wide = torch.randn(5, 3, 40)
    hidden, residual, weight = wide[:, 0], wide[:, 2], torch.randn(40)
    expected = hidden + residual
    output, total = add_rms_norm(hidden, residual, weight, 1e-5)
    torch.testing.assert_close(total, expected)
    torch.testing.assert_close(output, rms_norm(expected, weight, 1e-5))


@pytest.mark.parametrize("dtype", KERNEL_TOLERANCE, ids=str)
@pytest.mark.parametrize("hidden_size", [1, 63, 576, 5120, 16_384])
@pytest.mark.parametrize("num_tokens", [1, 1000] if torch.cuda.is_available() else [1, 5])
def test_kernel_equals_reference(num_tokens: int, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
    torch.manual_seed(0)
    hidden, weight, eps = example_inputs(num_tokens, hidden_size, dtype)
    hidden, weight = hidden.to(device), weight.to(device)
    output = rms_norm_triton(hidden, weight, eps)
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), reference(hidden, weight, eps), **KERNEL_TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", KERNEL_TOLERANCE, ids=str)
@pytest.mark.parametrize("hidden_size", [63, 576])
def test_kernel_normalises_the_sum_before_it_is_rounded(
    hidden_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    hidden, weight, eps = example_inputs(7, hidden_size, dtype)
    hidden, weight = hidden.to(device), weight.to(device)
    residual = torch.randn(7, hidden_size, device=device).to(dtype)
    total = hidden.double() + residual.double()
    output, stream = add_rms_norm_triton(hidden, residual, weight, eps)
    assert stream is residual
    torch.testing.assert_close(stream, total.to(dtype))
    torch.testing.assert_close(output.double(), reference(total, weight, eps), **KERNEL_TOLERANCE[dtype])


def test_kernel_takes_rows_that_lie_apart(device: torch.device) -> None:
    torch.manual_seed(0)
    wide = torch.randn(5, 3, 40, device=device)
    before = wide.clone()
    hidden, residual, weight = wide[:, 0], wide[:, 2], torch.randn(40, device=device)
    output, total = add_rms_norm_triton(hidden, residual, weight, 1e-5)
    torch.testing.assert_close(total, before[:, 0] + before[:, 2])
    torch.testing.assert_close(output.double(), reference(total, weight, 1e-5), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(wide[:, :2], before[:, :2])


def test_kernel_normalises_each_head(device: torch.device) -> None:
    torch.manual_seed(0)
    heads, weight = torch.randn(4, 3, 16, device=device), torch.randn(16, device=device)
    torch.testing.assert_close(
        rms_norm_triton(heads, weight, 1e-5).double(), reference(heads, weight, 1e-5), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("hidden", "residual", "weight"),
    [
        (torch.zeros(2, 8), torch.zeros(3, 8), torch.zeros(8)),
        (torch.zeros(2, 8), torch.zeros(2, 8), torch.zeros(4)),
        (torch.zeros(8, 2).T, torch.zeros(2, 8), torch.zeros(8)),
    ],
    ids=["residual", "weight", "strides"],
)
@pytest.mark.parametrize("add", [add_rms_norm, add_rms_norm_triton])
def test_refuses_what_does_not_fit(
    hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, add: Any, device: torch.device
) -> None:
    place = device if add is add_rms_norm_triton else torch.device("cpu")
    with pytest.raises(ValueError, match=r"rows|fit"):
        add(hidden.to(place), residual.to(place), weight.to(place), 1e-5)


def test_only_the_kernel_has_a_widest_row(device: torch.device) -> None:
    hidden, weight, eps = example_inputs(2, 16_385)
    output, total = add_rms_norm(hidden, torch.zeros_like(hidden), weight, eps)
    torch.testing.assert_close(output.double(), reference(total, weight, eps), atol=1e-5, rtol=1e-5)
    wide = hidden.to(device)
    with pytest.raises(ValueError, match="at most 16384, not 16385"):
        add_rms_norm_triton(wide, torch.zeros_like(wide), weight.to(device), eps)
