"""Layer normalisation, alone and fused with the addition of the residual stream."""
# Triton's kernels: untyped arguments, constexprs in capitals.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from collections.abc import Mapping

import torch
import triton
import triton.language as tl

from octavo_kernels.launch import VARIANTS, CompileExample, next_power_of_2, runs_triton, variant_of
from octavo_kernels.ops.rms_norm import Launch, check_fits_registers, check_norm_arguments
from octavo_kernels.pdl import PDL_VARIANTS, launch_next, pdl_options, wait_for_previous

LAUNCH: Mapping[str, Launch] = dict.fromkeys(VARIANTS, Launch())


def layer_norm(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """(x - mean(x)) / sqrt(variance(x) + eps) * weight + bias over the last dimension, in the type of `hidden`.

    hidden:       [..., hidden_size], last dimension contiguous
    weight, bias: [hidden_size]; bias None: there is none
    Raises ValueError on a GPU if the shapes do not fit or a row exceeds `rms_norm.MAX_HIDDEN_SIZE`.
    Source: Ba et al., "Layer Normalization" (https://arxiv.org/abs/1607.06450), equation 3.
    """
    if runs_triton(hidden):
        return layer_norm_triton(hidden, weight, bias, eps)
    return torch.nn.functional.layer_norm(hidden, weight.shape, weight, bias, eps)


def add_layer_norm(
    hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add `hidden` to the residual stream, then normalise the sum: (normalised, sum).

    hidden, residual: [num_tokens, hidden_size], rows contiguous; `residual` is overwritten with the sum
    weight, bias:     [hidden_size], contiguous; bias None: there is none
    On a GPU what is normalised is the sum before it is rounded to the residual's type.
    Raises ValueError if the shapes do not fit and, on a GPU, if a row exceeds `rms_norm.MAX_HIDDEN_SIZE`.
    """
    if runs_triton(hidden):
        return add_layer_norm_triton(hidden, residual, weight, bias, eps)
    check_norm_arguments(hidden, residual, weight, bias)
    residual += hidden
    return layer_norm(residual, weight, bias, eps), residual


def reference(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    """`layer_norm` in float32, by its formula."""
    wide = hidden.float()
    centred = wide - wide.mean(-1, keepdim=True)
    normalised = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps) * weight.float()
    return normalised if bias is None else normalised + bias.float()


@triton.jit
def _layer_norm_kernel(
    output_ptr, hidden_ptr, residual_ptr, weight_ptr, bias_ptr,
    eps, hidden_row_stride, residual_row_stride,
    HIDDEN_SIZE: tl.constexpr, ADD_RESIDUAL: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
    USE_PDL: tl.constexpr,
):  # fmt: skip
    """One program per row, accumulating in float32; output rows are contiguous."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < HIDDEN_SIZE
    launch_next(USE_PDL)
    weight = tl.load(weight_ptr + columns, mask, other=0.0).to(tl.float32)  # [BLOCK]
    wait_for_previous(USE_PDL)
    x = tl.load(hidden_ptr + row * hidden_row_stride + columns, mask, other=0.0).to(tl.float32)  # [BLOCK]
    if ADD_RESIDUAL:
        residual_ptrs = residual_ptr + row * residual_row_stride + columns
        x += tl.load(residual_ptrs, mask, other=0.0).to(tl.float32)
        tl.store(residual_ptrs, x.to(residual_ptr.dtype.element_ty), mask)
    centred = tl.where(mask, x - tl.sum(x) / HIDDEN_SIZE, 0.0)
    normalised = centred * tl.rsqrt(tl.sum(centred * centred) / HIDDEN_SIZE + eps) * weight
    if HAS_BIAS:
        normalised += tl.load(bias_ptr + columns, mask, other=0.0).to(tl.float32)
    tl.store(output_ptr + row * HIDDEN_SIZE + columns, normalised.to(output_ptr.dtype.element_ty), mask)


def layer_norm_triton(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> torch.Tensor:
    """`layer_norm` by the Triton kernel."""
    return _launch(hidden.reshape(-1, hidden.shape[-1]), None, weight, bias, eps).view(hidden.shape)


def add_layer_norm_triton(
    hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_layer_norm` by the Triton kernel."""
    return _launch(hidden, residual, weight, bias, eps), residual


def _launch(
    hidden: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
) -> torch.Tensor:
    check_norm_arguments(hidden, residual, weight, bias)
    check_fits_registers(hidden)
    num_rows, hidden_size = hidden.shape
    output = hidden.new_empty(num_rows, hidden_size)
    block = next_power_of_2(hidden_size)
    summand = hidden if residual is None else residual
    _layer_norm_kernel[(num_rows,)](
        output, hidden, summand, weight, weight if bias is None else bias,
        eps, hidden.stride(0), summand.stride(0),
        HIDDEN_SIZE=hidden_size, ADD_RESIDUAL=residual is not None, HAS_BIAS=bias is not None, BLOCK=block,
        num_warps=LAUNCH[variant_of(hidden.device)].num_warps(block), num_stages=1, **pdl_options(hidden.device),
    )  # fmt: skip
    return output


def example_inputs(
    num_tokens: int, hidden_size: int = 768, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Arguments of `layer_norm`, with rows of very different magnitude and a mean of their own."""
    hidden = (torch.randn(num_tokens, hidden_size) + 1) * torch.logspace(-3, 3, num_tokens)[:, None]
    return hidden.to(dtype), torch.randn(hidden_size).to(dtype), torch.randn(hidden_size).to(dtype), 1e-5


def compile_examples(variant: str) -> list[CompileExample]:
    """The fused norm of small, usual and large models in bfloat16, and the plain one."""
    return [_compile_example(variant, size, add=True) for size in (768, 4096, 5120, 16_384)] + [
        _compile_example(variant, 4096, add=False)
    ]


def _compile_example(variant: str, hidden_size: int, *, add: bool) -> CompileExample:
    block = next_power_of_2(hidden_size)
    pointers = dict.fromkeys(("output_ptr", "hidden_ptr", "residual_ptr", "weight_ptr", "bias_ptr"), "*bf16")
    return CompileExample(
        name=f"{'add_' if add else ''}layer_norm hidden_size={hidden_size}",
        function=_layer_norm_kernel,
        signature=pointers | {"eps": "fp32", "hidden_row_stride": "i32", "residual_row_stride": "i32"},
        constexprs={
            "HIDDEN_SIZE": hidden_size,
            "ADD_RESIDUAL": add,
            "HAS_BIAS": True,
            "BLOCK": block,
            "USE_PDL": variant in PDL_VARIANTS,
        },
        num_warps=LAUNCH[variant].num_warps(block),
        num_stages=1,
    )
