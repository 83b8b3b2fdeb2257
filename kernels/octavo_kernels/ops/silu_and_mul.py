"""The gate of a gated MLP: SiLU of one half times the other."""
# Triton's kernels: untyped arguments, constexprs in capitals.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from octavo_kernels.launch import VARIANTS, CompileExample, cdiv, runs_triton, variant_of
from octavo_kernels.native import kernels_for
from octavo_kernels.pdl import PDL_VARIANTS, begin, pdl_options


@dataclass(frozen=True, slots=True)
class Launch:
    """block: elements of the output that one program makes."""

    block: int = 1024
    num_warps: int = 4


LAUNCH: Mapping[str, Launch] = dict.fromkeys(VARIANTS, Launch())


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, where `gate_up` holds both side by side.

    gate_up: [num_tokens, 2 * intermediate_size], rows contiguous
    Returns  [num_tokens, intermediate_size], contiguous
    On a GPU computed in float32 and rounded once. Raises ValueError if the shape does not fit.
    Source: Shazeer, "GLU Variants Improve Transformer" (https://arxiv.org/abs/2002.05202), SwiGLU.
    """
    if runs_triton(gate_up):
        return silu_and_mul_triton(gate_up)
    check_gate_up(gate_up)
    if gate_up.is_contiguous() and (kernels := kernels_for(gate_up)):
        return kernels.silu_and_mul(gate_up)
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)


def reference(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu_and_mul` in float32, by its formula."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


@triton.jit
def _silu_and_mul_kernel(
    output_ptr, gate_up_ptr, row_stride, SIZE: tl.constexpr, BLOCK: tl.constexpr, USE_PDL: tl.constexpr
):
    """One program per row and BLOCK of its columns; output rows are contiguous."""
    begin(USE_PDL)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < SIZE
    gate_ptrs = gate_up_ptr + row * row_stride + columns
    gate = tl.load(gate_ptrs, mask, other=0.0).to(tl.float32)  # [BLOCK]
    up = tl.load(gate_ptrs + SIZE, mask, other=0.0).to(tl.float32)  # [BLOCK]
    tl.store(output_ptr + row * SIZE + columns, (gate * tl.sigmoid(gate) * up).to(output_ptr.dtype.element_ty), mask)


def silu_and_mul_triton(gate_up: torch.Tensor) -> torch.Tensor:
    """`silu_and_mul` by the Triton kernel. Rows may lie apart."""
    num_rows, size = check_gate_up(gate_up)
    launch = LAUNCH[variant_of(gate_up.device)]
    output = gate_up.new_empty(num_rows, size)
    _silu_and_mul_kernel[(num_rows, cdiv(size, launch.block))](
        output, gate_up, gate_up.stride(0),
        SIZE=size, BLOCK=launch.block, num_warps=launch.num_warps, num_stages=1, **pdl_options(gate_up.device),
    )  # fmt: skip
    return output


def check_gate_up(gate_up: torch.Tensor) -> tuple[int, int]:
    """(num_tokens, intermediate_size). Raises ValueError if `gate_up` is not two halves side by side."""
    if gate_up.ndim != 2 or gate_up.shape[1] % 2 or gate_up.stride(1) != 1:
        raise ValueError(
            f"a gate takes contiguous rows of even length, not {tuple(gate_up.shape)} with strides {gate_up.stride()}"
        )
    return gate_up.shape[0], gate_up.shape[1] // 2


def example_inputs(
    num_tokens: int, intermediate_size: int = 1536, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor]:
    """Arguments of `silu_and_mul`."""
    return (torch.randn(num_tokens, 2 * intermediate_size).to(dtype),)


def compile_examples(variant: str) -> list[CompileExample]:
    """The gates of a small and a usual model in bfloat16."""
    launch = LAUNCH[variant]
    return [
        CompileExample(
            name=f"silu_and_mul intermediate_size={size}",
            function=_silu_and_mul_kernel,
            signature={"output_ptr": "*bf16", "gate_up_ptr": "*bf16", "row_stride": "i32"},
            constexprs={"SIZE": size, "BLOCK": launch.block, "USE_PDL": variant in PDL_VARIANTS},
            num_warps=launch.num_warps,
            num_stages=1,
        )
        for size in (1536, 14_336)
    ]
