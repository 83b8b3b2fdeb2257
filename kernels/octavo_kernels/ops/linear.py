"""Linear layers: y = x W^T + b with the weight packed once, in the form that its implementation reads fastest.

All treat rows independently, so that a request's result does not depend on what else is in the batch, except that on a
GPU the number of rows decides how sums are rounded. `linear_choice` holds what was measured there. Measured on two
cores of an AMD EPYC (Zen 3) with torch 2.11, milliseconds for the 120 projections of a model with 30 layers of width
576, for 1, 16 and 256 tokens: torch 29.0, 68.9 and 426; onednn-float32 18.5, 41.6 and 363; fbgemm-float16 10.3, 25.7
and 377. fbgemm's int8 arithmetic takes 10.9, 21.3 and 220, but rounds activations to 7 bits: with SmolLM2's outliers
every fifth token changes, so it is not among the choices.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Literal, Protocol

import torch
from torch.nn import functional

from octavo_kernels import linear_choice
from octavo_kernels.launch import CompileExample
from octavo_kernels.linear_choice import Launch, LinearChoices, LinearShape
from octavo_kernels.ops import cublaslt_linear, gemv, small_m_linear, wgmma_linear
from octavo_kernels.ops.silu_and_mul import silu_and_mul

_MAX_WEIGHT = 127
# oneDNN lays a weight out for a number of rows; what suits few serves many nearly as well.
_ONEDNN_ROWS = 16
# What stands for a variant whose GPUs run all on cuBLAS, since none of them was measured.
_EXAMPLES: Final = (
    (gemv.Launch(block_n=8, block_k=1024, num_warps=4), 1, False),
    (small_m_linear.Launch(block_n=64, block_k=128, num_splits=1, num_warps=4, num_stages=3), 1, False),
)

Quantization = Literal["none", "int8"]


class PackedLinear(Protocol):
    """A weight, packed. num_bytes: the memory that it keeps."""

    num_bytes: int

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_tokens, in_features] -> [num_tokens, out_features], contiguous, in the type of `hidden`."""


@dataclass(frozen=True, slots=True)
class LinearKernel:
    """An implementation: `pack(weight [out_features, in_features], bias [out_features] or None)` makes the layer.

    is_copy: whether that takes memory of its own, beside the weight's
    """

    name: str
    is_quantized: bool
    is_copy: bool
    pack: Callable[[torch.Tensor, torch.Tensor | None], PackedLinear]


class TorchLinear:
    """torch's own, on the weight as it lies in memory; it keeps a reference, no copy."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.num_bytes = weight.nbytes + (0 if bias is None else bias.nbytes)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """As `PackedLinear`."""
        return functional.linear(hidden, self.weight, self.bias)


class OneDnnLinear:
    """float32 on a CPU, packed by oneDNN: torch would pack the weight anew for each multiplication."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, _ONEDNN_ROWS)
        self._bias = bias
        self.num_bytes = weight.nbytes + (0 if bias is None else bias.nbytes)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """As `PackedLinear`."""
        output: torch.Tensor = torch.ops.mkldnn._linear_pointwise(hidden, self._weight, self._bias, "none", [], "")
        return output


class FbgemmFloat16Linear:
    """float16 weights on a CPU, packed by fbgemm and multiplied in float32: half of float32's bytes for each token."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        wide_bias = None if bias is None else bias.float()
        self._packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), wide_bias)
        self.num_bytes = weight.nbytes + (0 if bias is None else bias.nbytes)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """As `PackedLinear`; `hidden` is float32."""
        output: torch.Tensor = torch.ops.quantized.linear_dynamic_fp16(hidden, self._packed)
        return output


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 with one scale per output channel: weight ~ integers * scales[:, None].

    Returns integers [out_features, in_features] int8 and scales [out_features] float32. A row of zeros gets scale 1.
    """
    scales = weight.float().abs().amax(dim=1) / _MAX_WEIGHT
    scales = torch.where(scales > 0, scales, 1.0)
    return torch.round(weight.float() / scales[:, None]).to(torch.int8), scales


class TorchInt8Linear:
    """int8 weights, widened at each use: a quarter of float32's memory, no faster. Activations stay as they are."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.integers, self.scales = quantize_rows(weight)
        self.bias = bias
        self.num_bytes = self.integers.nbytes + self.scales.nbytes + (0 if bias is None else bias.nbytes)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """As `PackedLinear`."""
        output = functional.linear(hidden, self.integers.to(hidden.dtype)) * self.scales.to(hidden.dtype)
        return output if self.bias is None else output + self.bias


class GpuLinear:
    """16-bit floats on a GPU: for each number of tokens what `linear_choice` holds for that GPU, often cuBLAS.

    It keeps a reference to the weight, no copy. Calls of one layer must not overlap on several streams.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, choices: LinearChoices | None = None) -> None:
        """choices: for tests and measurements; by default those of the weight's GPU."""
        self.weight, self.bias = weight, bias
        self.num_bytes = weight.nbytes + (0 if bias is None else bias.nbytes)
        choices = linear_choice.choices_for(weight.device) if choices is None else choices
        out_features, in_features = weight.shape
        shape = LinearShape(out_features, in_features)
        self._launches = linear_choice.launches_for(choices, shape)
        self._gated_launches = linear_choice.launches_for(choices, replace(shape, is_gated=True))
        num_arrivals = max(
            (
                launch.num_arrivals(out_features)
                for launch in (*self._launches, *self._gated_launches)
                if isinstance(launch, small_m_linear.Launch)
            ),
            default=0,
        )
        self._arrivals = torch.zeros(num_arrivals, dtype=torch.int32, device=weight.device)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """As `PackedLinear`."""
        launch = self._launches[hidden.shape[0]] if hidden.shape[0] < len(self._launches) else None
        return run_launch(launch, hidden, self.weight, self.bias, self._arrivals, is_gated=False)

    def silu_and_mul(self, hidden: torch.Tensor) -> torch.Tensor:
        """As `linear_silu_and_mul`."""
        num_tokens = hidden.shape[0]
        launch = self._gated_launches[num_tokens] if num_tokens < len(self._gated_launches) else None
        if launch is None:
            return silu_and_mul(self(hidden))
        return run_launch(launch, hidden, self.weight, self.bias, self._arrivals, is_gated=True)


def run_launch(
    launch: Launch | None,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    arrivals: torch.Tensor,
    *,
    is_gated: bool,
) -> torch.Tensor:
    """The layer, or silu(gate) * up of it, by a launch; by cuBLAS for None. arrivals: as of `small_m_linear`"""
    if isinstance(launch, gemv.Launch):
        return gemv.gemv(hidden, weight, bias, launch, is_gated=is_gated)
    if isinstance(launch, small_m_linear.Launch):
        return small_m_linear.small_m_linear(hidden, weight, bias, launch, arrivals, is_gated=is_gated)
    if isinstance(launch, wgmma_linear.Launch):
        return wgmma_linear.wgmma_linear(hidden, weight, bias, launch, is_gated=is_gated)
    if launch is None:
        output = functional.linear(hidden, weight, bias)
    else:
        output = cublaslt_linear.cublaslt_linear(hidden, weight, launch)
        if bias is not None:
            output += bias
    return silu_and_mul(output) if is_gated else output


def linear_silu_and_mul(packed: PackedLinear, hidden: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of a layer that stacks both, in one kernel where that is faster.

    hidden:  [num_tokens, in_features]
    Returns  [num_tokens, out_features / 2], contiguous
    """
    return packed.silu_and_mul(hidden) if isinstance(packed, GpuLinear) else silu_and_mul(packed(hidden))


TORCH = LinearKernel("torch", False, False, TorchLinear)
ONEDNN_FLOAT32 = LinearKernel("onednn-float32", False, True, OneDnnLinear)
FBGEMM_FLOAT16 = LinearKernel("fbgemm-float16", False, True, FbgemmFloat16Linear)
TORCH_INT8 = LinearKernel("torch-int8", True, True, TorchInt8Linear)
GPU = LinearKernel("gpu", False, False, GpuLinear)


def choose_linear(device: torch.device, dtype: torch.dtype, quantization: Quantization) -> LinearKernel:
    """The fastest implementation for a device, a type of weights and a quantisation."""
    if quantization == "int8":
        return TORCH_INT8
    if device.type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return GPU
    if device.type == "cpu" and dtype == torch.float32 and torch._C._has_mkldnn:
        return ONEDNN_FLOAT32
    if device.type == "cpu" and dtype == torch.float16 and "fbgemm" in torch.backends.quantized.supported_engines:
        return FBGEMM_FLOAT16
    return TORCH


def activation_dtype(weight_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The weights' type; float32 beside float16 weights on a CPU, which has no float16 arithmetic."""
    return torch.float32 if device.type == "cpu" and weight_dtype == torch.float16 else weight_dtype


def compile_examples(variant: str) -> list[CompileExample]:
    """Triton's kernels as a variant's GPUs launch them: for what was measured, and for a weight that follows it.

    Such a weight may end in a partial tile of columns and have a bias.
    """
    launches = {
        (launch, num_tokens, shape.is_gated)
        for shape, num_tokens, launch in linear_choice.shipped_launches(variant)
        if isinstance(launch, gemv.Launch | small_m_linear.Launch)
    }
    examples: dict[str, CompileExample] = {}
    for launch, num_tokens, is_gated in sorted(launches or _EXAMPLES, key=repr):
        for is_even_k in (True, False):
            flags = {"is_gated": is_gated, "is_even_k": is_even_k, "has_bias": not is_even_k}
            if isinstance(launch, gemv.Launch):
                example = gemv.compile_example(variant, launch, num_tokens, **flags)
            else:
                example = small_m_linear.compile_example(variant, launch, num_tokens, **flags)
            examples[example.name] = example
    return list(examples.values())


def example_inputs(
    num_tokens: int, *, in_features: int = 64, out_features: int = 48, bias: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Hidden states of very different magnitude, a weight and a bias."""
    hidden = torch.randn(num_tokens, in_features) * torch.logspace(-2, 2, num_tokens)[:, None]
    return hidden, torch.randn(out_features, in_features) * 0.1, torch.randn(out_features) if bias else None
