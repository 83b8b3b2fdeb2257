"""Every implementation of linear layers against float64, and each token's independence of its neighbours."""

import pytest
import torch
from octavo_kernels.ops.linear import (
    FBGEMM_FLOAT16,
    GPU,
    ONEDNN_FLOAT32,
    TORCH,
    TORCH_INT8,
    LinearKernel,
    activation_dtype,
    choose_linear,
    example_inputs,
    linear_silu_and_mul,
    quantize_rows,
)

CPU = torch.device("cpu")
# Largest error of a row's outputs, relative to their size.
TOLERANCE = {TORCH: 1e-5, GPU: 1e-5, ONEDNN_FLOAT32: 1e-5, FBGEMM_FLOAT16: 3e-3, TORCH_INT8: 5e-2}


def available(kernel: LinearKernel) -> bool:
    if kernel is ONEDNN_FLOAT32:
        return bool(torch._C._has_mkldnn)
    return kernel is not FBGEMM_FLOAT16 or "fbgemm" in torch.backends.quantized.supported_engines


@pytest.fixture(params=TOLERANCE, ids=lambda kernel: kernel.name)
def kernel(request: pytest.FixtureRequest) -> LinearKernel:
    if not available(request.param):
        pytest.skip(f"{request.param.name} is not built into this torch")
    return request.param


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("in_features", "out_features"), [(64, 48), (63, 1), (576, 131)])
@pytest.mark.parametrize("num_tokens", [1, 2, 63, 1000])
def test_equals_reference(
    num_tokens: int, in_features: int, out_features: int, bias: bool, kernel: LinearKernel
) -> None:
    torch.manual_seed(0)
    hidden, weight, bias_values = example_inputs(
        num_tokens, in_features=in_features, out_features=out_features, bias=bias
    )
    before = hidden.clone()
    output = kernel.pack(weight, bias_values)(hidden)
    product = hidden.double() @ weight.double().T
    expected = product if bias_values is None else product + bias_values.double()
    # A row's outputs are of this size: weights have a deviation of 0.1, biases of 1.
    scale = hidden.double().norm(dim=1) * 0.1 + (1.0 if bias else 0.0)
    error = (output.double() - expected).abs().amax(dim=1) / scale
    assert output.shape == (num_tokens, out_features)
    assert output.dtype == torch.float32
    assert float(error.max()) < TOLERANCE[kernel]
    assert torch.equal(hidden, before)


def test_a_row_does_not_depend_on_its_neighbours(kernel: LinearKernel) -> None:
    torch.manual_seed(0)
    hidden, weight, bias = example_inputs(33)
    layer = kernel.pack(weight, bias)
    together = layer(hidden)
    for row in range(33):
        torch.testing.assert_close(layer(hidden[row : row + 1])[0], together[row], atol=1e-5, rtol=1e-4)


def test_a_gate_and_its_projection_equal_their_formula(kernel: LinearKernel) -> None:
    torch.manual_seed(0)
    _, weight, bias = example_inputs(1, out_features=48)
    hidden = torch.randn(5, weight.shape[1])
    layer = kernel.pack(weight, bias)
    gate, up = layer(hidden).double().chunk(2, dim=1)
    output = linear_silu_and_mul(layer, hidden)
    assert output.is_contiguous()
    torch.testing.assert_close(output.double(), gate / (1 + torch.exp(-gate)) * up, atol=1e-5, rtol=1e-4)


def test_rows_of_zeros_stay_finite(kernel: LinearKernel) -> None:
    weight = torch.randn(8, 64)
    weight[3] = 0
    output = kernel.pack(weight, None)(torch.cat((torch.zeros(1, 64), torch.ones(1, 64))))
    assert bool(output.isfinite().all())
    assert not bool(output[0].any())
    assert float(output[1, 3]) == 0


def test_quantised_rows_have_a_scale_each() -> None:
    weight = torch.tensor([[1.0, -127.0], [0.011, 0.02], [0.0, 0.0]])
    integers, scales = quantize_rows(weight)
    assert integers.tolist() == [[1, -127], [70, 127], [0, 0]]
    torch.testing.assert_close(scales, torch.tensor([1.0, 0.02 / 127, 1.0]))


def test_quantising_shrinks_the_weight(kernel: LinearKernel) -> None:
    weight = torch.randn(128, 256)
    expected = 128 * 256 + 128 * 4 if kernel.is_quantized else weight.nbytes
    assert kernel.pack(weight, None).num_bytes == expected


def test_the_choice_follows_device_and_type() -> None:
    assert choose_linear(CPU, torch.bfloat16, "none") is TORCH
    assert choose_linear(CPU, torch.bfloat16, "int8") is TORCH_INT8
    assert choose_linear(CPU, torch.float16, "none") in (FBGEMM_FLOAT16, TORCH)
    assert choose_linear(torch.device("cuda"), torch.float16, "none") is GPU
    assert choose_linear(torch.device("cuda"), torch.bfloat16, "none") is GPU
    assert choose_linear(torch.device("cuda"), torch.float32, "none") is TORCH
    assert choose_linear(torch.device("cuda"), torch.bfloat16, "int8") is TORCH_INT8
    assert choose_linear(torch.device("cuda"), torch.float32, "int8") is TORCH_INT8
    assert choose_linear(CPU, torch.float32, "none") in (ONEDNN_FLOAT32, TORCH)
    assert activation_dtype(torch.float16, CPU) == torch.float32
    assert activation_dtype(torch.float16, torch.device("cuda")) == torch.float16
