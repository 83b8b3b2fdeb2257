"""Root mean square normalisation, alone and fused with the addition of the residual stream."""
# Triton's kernels: untyped arguments, constexprs in capitals.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from octavo_kernels.launch import VARIANTS, CompileExample, next_power_of_2, runs_triton, variant_of
from octavo_kernels.native import kernels_for
from octavo_kernels.pdl import PDL_VARIANTS, launch_next, pdl_options, wait_for_previous

# A row is held in registers.
MAX_HIDDEN_SIZE = 16_384


@dataclass(frozen=True, slots=True)
class Launch:
    """columns_per_thread: what one thread holds of a row, until the row has `max_warps` warps."""

    columns_per_thread: int = 8
    max_warps: int = 16

    def num_warps(self, block: int) -> int:
        """Warps for a tile of `block` columns, both powers of two."""
        return min(max(block // (32 * self.columns_per_thread), 1), self.max_warps)


LAUNCH: Mapping[str, Launch] = dict.fromkeys(VARIANTS, Launch())


def rms_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32, in the type of `hidden`.

    hidden: [..., hidden_size], last dimension contiguous
    weight: [hidden_size]
    Raises ValueError on a GPU if the shapes do not fit or a row exceeds MAX_HIDDEN_SIZE.
    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (https://arxiv.org/abs/1910.07467), equation 4.
    """
    if runs_triton(hidden):
        return rms_norm_triton(hidden, weight, eps)
    return torch.nn.functional.rms_norm(hidden, weight.shape, weight, eps)


def add_rms_norm(
    hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add `hidden` to the residual stream, then normalise the sum: (normalised, sum).

    hidden, residual: [num_tokens, hidden_size], rows contiguous; `residual` is overwritten with the sum
    weight:           [hidden_size], contiguous
    On a GPU what is normalised is the sum before it is rounded to the residual's type.
    Raises ValueError if the shapes do not fit and, on a GPU, if a row exceeds MAX_HIDDEN_SIZE.
    """
    if runs_triton(hidden):
        return add_rms_norm_triton(hidden, residual, weight, eps)
    check_norm_arguments(hidden, residual, weight)
    kernels = kernels_for(hidden, residual, weight)
    if kernels and hidden.is_contiguous() and residual.is_contiguous():
        return kernels.add_rms_norm(hidden, residual, weight, eps), residual
    residual += hidden
    return rms_norm(residual, weight, eps), residual


def reference(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`rms_norm` in float32, by its formula."""
    wide = hidden.float()
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()


@triton.jit
def _rms_norm_kernel(
    output_ptr, hidden_ptr, residual_ptr, weight_ptr,
    eps, hidden_row_stride, residual_row_stride,
    HIDDEN_SIZE: tl.constexpr, ADD_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
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
    scale = tl.rsqrt(tl.sum(x * x) / HIDDEN_SIZE + eps)
    tl.store(output_ptr + row * HIDDEN_SIZE + columns, (x * scale * weight).to(output_ptr.dtype.element_ty), mask)


def rms_norm_triton(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`rms_norm` by the Triton kernel."""
    return _launch(hidden.reshape(-1, hidden.shape[-1]), None, weight, eps).view(hidden.shape)


def add_rms_norm_triton(
    hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_rms_norm` by the Triton kernel."""
    return _launch(hidden, residual, weight, eps), residual


def _launch(hidden: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float) -> torch.Tensor:
    check_norm_arguments(hidden, residual, weight)
    check_fits_registers(hidden)
    num_rows, hidden_size = hidden.shape
    output = hidden.new_empty(num_rows, hidden_size)
    block = next_power_of_2(hidden_size)
    summand = hidden if residual is None else residual
    _rms_norm_kernel[(num_rows,)](
        output, hidden, summand, weight,
        eps, hidden.stride(0), summand.stride(0),
        HIDDEN_SIZE=hidden_size, ADD_RESIDUAL=residual is not None, BLOCK=block,
        num_warps=LAUNCH[variant_of(hidden.device)].num_warps(block), num_stages=1, **pdl_options(hidden.device),
    )  # fmt: skip
    return output


def check_norm_arguments(hidden: torch.Tensor, residual: torch.Tensor | None, *parameters: torch.Tensor | None) -> None:
    """What every norm over rows asks of its arguments. Raises ValueError.

    hidden, residual: [num_rows, hidden_size], rows contiguous; parameters: [hidden_size], contiguous
    """
    if hidden.ndim != 2 or hidden.stride(1) != 1 or not hidden.shape[1]:
        raise ValueError(f"a norm takes contiguous rows, not {tuple(hidden.shape)} with strides {hidden.stride()}")
    if residual is not None and (residual.shape != hidden.shape or residual.stride(1) != 1):
        raise ValueError(f"residual {tuple(residual.shape)} does not fit hidden {tuple(hidden.shape)}")
    for parameter in parameters:
        if parameter is not None and (parameter.shape != hidden.shape[1:] or not parameter.is_contiguous()):
            raise ValueError(f"parameter {tuple(parameter.shape)} does not fit hidden {tuple(hidden.shape)}")


def check_fits_registers(hidden: torch.Tensor) -> None:
    """What the kernels of norms ask besides. Raises ValueError."""
    if hidden.shape[1] > MAX_HIDDEN_SIZE:
        raise ValueError(f"a norm's kernel takes rows of at most {MAX_HIDDEN_SIZE}, not {hidden.shape[1]}")


def example_inputs(
    num_tokens: int, hidden_size: int = 576, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Arguments of `rms_norm`, with rows of very different magnitude."""
    hidden = torch.randn(num_tokens, hidden_size) * torch.logspace(-3, 3, num_tokens)[:, None]
    return hidden.to(dtype), torch.randn(hidden_size).to(dtype), 1e-5


def compile_examples(variant: str) -> list[CompileExample]:
    """The fused norm of small, usual and large models in bfloat16, and the plain one."""
    return [_compile_example(variant, size, add=True) for size in (576, 4096, 5120, 16_384)] + [
        _compile_example(variant, 4096, add=False)
    ]


def _compile_example(variant: str, hidden_size: int, *, add: bool) -> CompileExample:
    block = next_power_of_2(hidden_size)
    pointers = dict.fromkeys(("output_ptr", "hidden_ptr", "residual_ptr", "weight_ptr"), "*bf16")
    return CompileExample(
        name=f"{'add_' if add else ''}rms_norm hidden_size={hidden_size}",
        function=_rms_norm_kernel,
        signature=pointers | {"eps": "fp32", "hidden_row_stride": "i32", "residual_row_stride": "i32"},
        constexprs={
            "HIDDEN_SIZE": hidden_size,
            "ADD_RESIDUAL": add,
            "BLOCK": block,
            "USE_PDL": variant in PDL_VARIANTS,
        },
        num_warps=LAUNCH[variant].num_warps(block),
        num_stages=1,
    )
