"""The gate of a gated MLP against float64."""

import pytest
import torch
from octavo_kernels.ops.silu_and_mul import example_inputs, silu_and_mul, silu_and_mul_triton

# Of numpy, in the interpreter: a sigmoid's exponential overflows to the infinity that it should.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


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


def test_takes_rows_that_lie_apart() -> None:
    torch.manual_seed(0)
    wide = torch.randn(5, 50)
    torch.testing.assert_close(silu_and_mul(wide[:, :40]), silu_and_mul(wide[:, :40].contiguous()))


def test_refuses_an_odd_row() -> None:
    with pytest.raises(ValueError, match="even length"):
        silu_and_mul(torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float16, 6e-4), (torch.bfloat16, 8e-3)], ids=str
)
@pytest.mark.parametrize("size", [1, 63, 1025] + ([14_336] if torch.cuda.is_available() else []))
@pytest.mark.parametrize("num_tokens", [1, 1000] if torch.cuda.is_available() else [1, 5])
def test_kernel_equals_reference(
    num_tokens: int, size: int, dtype: torch.dtype, rtol: float, device: torch.device
) -> None:
    torch.manual_seed(0)
    gate_up = example_inputs(num_tokens, size, dtype)[0].to(device) * 4
    gate, up = gate_up[:, :size].double(), gate_up[:, size:].double()
    output = silu_and_mul_triton(gate_up)
    assert output.dtype == dtype
    torch.testing.assert_close(output.double(), gate / (1 + torch.exp(-gate)) * up, atol=1e-6, rtol=rtol)


def test_kernel_is_finite_far_into_the_tails(device: torch.device) -> None:
    gate = torch.tensor([-1e30, -200.0, 200.0, 1e30], device=device)
    output = silu_and_mul_triton(torch.cat((gate, torch.ones_like(gate)))[None])
    torch.testing.assert_close(output[0], gate.clamp(min=0))


def test_kernel_takes_rows_that_lie_apart(device: torch.device) -> None:
    torch.manual_seed(0)
    wide = torch.randn(5, 50, device=device)
    torch.testing.assert_close(silu_and_mul_triton(wide[:, :40]), silu_and_mul_triton(wide[:, :40].contiguous()))


def test_kernel_refuses_an_odd_row(device: torch.device) -> None:
    with pytest.raises(ValueError, match="even length"):
        silu_and_mul_triton(torch.zeros(2, 3, device=device))
