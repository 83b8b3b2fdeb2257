"""The Gaussian error linear unit, alone and as the gate of a gated MLP."""
# Triton's kernels: untyped arguments, constexprs in capitals.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from collections.abc import Mapping
from typing import Literal

import torch
import triton
import triton.language as tl

from octavo_kernels.launch import VARIANTS, CompileExample, cdiv, runs_triton, variant_of
from octavo_kernels.ops.silu_and_mul import Launch, check_gate_up

Approximate = Literal["none", "tanh"]

LAUNCH: Mapping[str, Launch] = dict.fromkeys(VARIANTS, Launch())

SQRT_HALF = tl.constexpr(0.7071067811865476)
# 2 sqrt(2 / pi): the approximation's tanh(z) is 2 sigmoid(2z) - 1.
TWO_SQRT_TWO_OVER_PI = tl.constexpr(1.5957691216057308)


def gelu(hidden: torch.Tensor, approximate: Approximate) -> torch.Tensor:
    """x * P(X <= x) for a standard normal X, elementwise, exactly or by the approximation with tanh.

    hidden: [..., size], last dimension contiguous
    Returns the same shape, contiguous; on a GPU computed in float32 and rounded once.
    Source: Hendrycks and Gimpel, "Gaussian Error Linear Units" (https://arxiv.org/abs/1606.08415), section 2.
    """
    if runs_triton(hidden):
        return gelu_triton(hidden, approximate)
    return torch.nn.functional.gelu(hidden, approximate=approximate)


def gelu_and_mul(gate_up: torch.Tensor, approximate: Approximate) -> torch.Tensor:
    """gelu(gate) * up, where `gate_up` holds both side by side.

    gate_up: [num_tokens, 2 * intermediate_size], contiguous
    Returns  [num_tokens, intermediate_size], contiguous
    Source: Shazeer, "GLU Variants Improve Transformer" (https://arxiv.org/abs/2002.05202), GEGLU.
    """
    if runs_triton(gate_up):
        return gelu_and_mul_triton(gate_up, approximate)
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.gelu(gate, approximate=approximate).mul_(up)


def reference(hidden: torch.Tensor, approximate: Approximate) -> torch.Tensor:
    """`gelu` in float32, by its formulas."""
    x = hidden.float()
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + torch.erf(x * 0.5**0.5))


@triton.jit
def _gelu(x, TANH: tl.constexpr):
    """float32 -> float32. By a sigmoid, the approximation overflows nowhere: 0 and 1 are its limits."""
    if TANH:
        return x * tl.sigmoid(TWO_SQRT_TWO_OVER_PI * (x + 0.044715 * x * x * x))
    return 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF))


@triton.jit
def _gelu_kernel(
    output_ptr, input_ptr, row_stride,
    SIZE: tl.constexpr, TANH: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per row and BLOCK of its output's SIZE columns; output rows are contiguous."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < SIZE
    input_ptrs = input_ptr + row * row_stride + columns
    output = _gelu(tl.load(input_ptrs, mask, other=0.0).to(tl.float32), TANH)  # [BLOCK]
    if GATED:
        output *= tl.load(input_ptrs + SIZE, mask, other=0.0).to(tl.float32)
    tl.store(output_ptr + row * SIZE + columns, output.to(output_ptr.dtype.element_ty), mask)


def gelu_triton(hidden: torch.Tensor, approximate: Approximate) -> torch.Tensor:
    """`gelu` by the Triton kernel. Raises ValueError if rows are not contiguous."""
    if hidden.ndim == 0 or hidden.stride(-1) != 1:
        raise ValueError(f"gelu takes contiguous rows, not {tuple(hidden.shape)} with strides {hidden.stride()}")
    rows = hidden.reshape(-1, hidden.shape[-1])
    return _launch(rows, rows.shape[1], approximate, gated=False).view(hidden.shape)


def gelu_and_mul_triton(gate_up: torch.Tensor, approximate: Approximate) -> torch.Tensor:
    """`gelu_and_mul` by the Triton kernel. Rows may lie apart. Raises ValueError if they are not two halves."""
    _, size = check_gate_up(gate_up)
    return _launch(gate_up, size, approximate, gated=True)


def _launch(rows: torch.Tensor, size: int, approximate: Approximate, *, gated: bool) -> torch.Tensor:
    launch = LAUNCH[variant_of(rows.device)]
    output = rows.new_empty(len(rows), size)
    _gelu_kernel[(len(rows), cdiv(size, launch.block))](
        output, rows, rows.stride(0),
        SIZE=size, TANH=approximate == "tanh", GATED=gated, BLOCK=launch.block,
        num_warps=launch.num_warps, num_stages=1,
    )  # fmt: skip
    return output


def example_inputs(
    num_tokens: int, intermediate_size: int = 3072, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, Approximate]:
    """Arguments of `gelu_and_mul`, and of `gelu`; far into both tails."""
    return (torch.randn(num_tokens, 2 * intermediate_size) * 4).to(dtype), "tanh"


def compile_examples(variant: str) -> list[CompileExample]:
    """Both forms, exact and approximate, of usual models in bfloat16."""
    launch = LAUNCH[variant]
    return [
        CompileExample(
            name=f"gelu{'_and_mul' if gated else ''} approximate={approximate} size={size}",
            function=_gelu_kernel,
            signature={"output_ptr": "*bf16", "input_ptr": "*bf16", "row_stride": "i32"},
            constexprs={"SIZE": size, "TANH": approximate == "tanh", "GATED": gated, "BLOCK": launch.block},
            num_warps=launch.num_warps,
            num_stages=1,
        )
        for gated, size in ((False, 3072), (True, 16_384))
        for approximate in ("none", "tanh")
    ]
