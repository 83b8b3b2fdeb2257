"""The Gaussian error linear unit against float64."""

import pytest
import torch
from octavo_kernels.ops.gelu import (
    Approximate,
    example_inputs,
    gelu,
    gelu_and_mul,
    gelu_and_mul_triton,
    gelu_triton,
)

# Of numpy, in the interpreter: a sigmoid's exponential overflows to the infinity that it should.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

TOLERANCE = {
    torch.float32: {"atol": 2e-6, "rtol": 1e-5},
    torch.float16: {"atol": 2e-6, "rtol": 6e-4},
    torch.bfloat16: {"atol": 2e-6, "rtol": 8e-3},
}
FORMS = pytest.mark.parametrize("approximate", ["none", "tanh"])


def reference(hidden: torch.Tensor, approximate: Approximate) -> torch.Tensor:
    x = hidden.double()
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    return 0.5 * x * torch.erfc(-x / 2**0.5)


@FORMS
@pytest.mark.parametrize("size", [1, 63, 1000])
def test_equals_reference(size: int, approximate: Approximate) -> None:
    torch.manual_seed(0)
    gate_up, _ = example_inputs(7, size)
    gate, up = gate_up.chunk(2, dim=-1)
    torch.testing.assert_close(
        gelu(gate_up, approximate).double(), reference(gate_up, approximate), atol=1e-5, rtol=1e-5
    )
    expected = reference(gate, approximate) * up.double()
    torch.testing.assert_close(gelu_and_mul(gate_up, approximate).double(), expected, atol=1e-5, rtol=1e-5)


@FORMS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", [1, 63, 1025] + ([16_384] if torch.cuda.is_available() else []))
@pytest.mark.parametrize("num_tokens", [1, 1000] if torch.cuda.is_available() else [1, 5])
def test_kernel_equals_reference(
    num_tokens: int, size: int, dtype: torch.dtype, approximate: Approximate, device: torch.device
) -> None:
    torch.manual_seed(0)
    gate_up = example_inputs(num_tokens, size, dtype)[0].to(device)
    gate, up = gate_up.chunk(2, dim=-1)
    plain, gated = gelu_triton(gate_up, approximate), gelu_and_mul_triton(gate_up, approximate)
    assert plain.dtype == gated.dtype == dtype
    torch.testing.assert_close(plain.double(), reference(gate_up, approximate), **TOLERANCE[dtype])
    # Near zero, an error of the gate counts as often as what it is multiplied by.
    expected = reference(gate, approximate) * up.double()
    tolerance = TOLERANCE[dtype] | {"atol": 4e-5}
    torch.testing.assert_close(gated.double(), expected, **tolerance)


@FORMS
def test_kernel_is_finite_far_into_the_tails(approximate: Approximate, device: torch.device) -> None:
    hidden = torch.tensor([-1e30, -200.0, 0.0, 200.0, 1e30], device=device)
    torch.testing.assert_close(gelu_triton(hidden, approximate), hidden.clamp(min=0))


def test_kernel_takes_rows_that_lie_apart(device: torch.device) -> None:
    torch.manual_seed(0)
    wide = torch.randn(2, 5, 50, device=device)
    rows = wide[..., :40]
    torch.testing.assert_close(gelu_triton(rows, "tanh"), gelu_triton(rows.contiguous(), "tanh"))
    torch.testing.assert_close(gelu_and_mul_triton(rows[0], "tanh"), gelu_and_mul_triton(rows[0].contiguous(), "tanh"))


def test_kernel_refuses_strided_rows(device: torch.device) -> None:
    with pytest.raises(ValueError, match="contiguous rows"):
        gelu_triton(torch.zeros(4, 4, device=device).T, "none")
