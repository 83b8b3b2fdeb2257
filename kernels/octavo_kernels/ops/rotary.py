"""Rotary position embedding, and the frequency scalings that stretch a model's context."""
# Triton's kernels: untyped arguments, constexprs in capitals.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import triton
import triton.language as tl

from octavo_kernels.launch import VARIANTS, CompileExample, next_power_of_2, runs_triton, variant_of
from octavo_kernels.native import kernels_for
from octavo_kernels.pdl import PDL_VARIANTS, begin, pdl_options

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn", "factors"]


@dataclass(frozen=True, slots=True)
class Launch:
    """One program makes the tables of one token."""

    num_warps: int = 1


LAUNCH: Mapping[str, Launch] = dict.fromkeys(VARIANTS, Launch())


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How a model's rotary frequencies are stretched.

    factor:                context length after over before the stretching (linear, dynamic, llama3, yarn)
    original_max_position: context length that the model was first trained with (dynamic, llama3, yarn)
    low_freq_factor, high_freq_factor: bounds of the wavelengths that llama3 leaves alone
    beta_fast, beta_slow, attention_factor, mscale, mscale_all_dim, truncate: yarn's, as its paper and configurations
                           name them
    frequency_factors:     divisor of each frequency (factors; GGUF stores llama3's scaling this way)
    """

    rope_type: RopeType = "default"
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    frequency_factors: tuple[float, ...] = ()


def rotary_frequencies(
    rotary_dim: int, theta: float, scaling: RopeScaling, max_position: int = 0
) -> tuple[torch.Tensor, float]:
    """Radians per position of each pair of dimensions, float32 [rotary_dim / 2], and the factor on cosine and sine.

    theta^(-2i / rotary_dim), scaled as `scaling` says. `max_position` is the longest context that will be served:
    dynamic scaling is fixed for it, since keys in a cache cannot be rotated again when a request grows.
    Raises ValueError if the frequency factors do not fit rotary_dim.
    Sources: RoFormer (https://arxiv.org/abs/2104.09864) equation 15; YaRN (https://arxiv.org/abs/2309.00071) section 3;
    the Llama 3.1 model card's rope scaling.
    """
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
    frequencies = 1.0 / theta**exponents
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor, 1.0
    if scaling.rope_type == "dynamic":
        return _dynamic(rotary_dim, theta, scaling, max_position), 1.0
    if scaling.rope_type == "llama3":
        return _llama3(frequencies, scaling), 1.0
    if scaling.rope_type == "yarn":
        return _yarn(frequencies, theta, scaling), _yarn_attention_factor(scaling)
    if scaling.rope_type == "factors":
        factors = torch.tensor(scaling.frequency_factors, dtype=torch.float32)
        if factors.shape != frequencies.shape:
            raise ValueError(f"{len(factors)} frequency factors for {len(frequencies)} frequencies")
        return frequencies / factors, 1.0
    return frequencies, 1.0


def _dynamic(rotary_dim: int, theta: float, scaling: RopeScaling, max_position: int) -> torch.Tensor:
    """The base grows with the context beyond the original one ("NTK-aware")."""
    length = max(max_position, scaling.original_max_position)
    stretch = scaling.factor * length / scaling.original_max_position - (scaling.factor - 1)
    base = theta * stretch ** (rotary_dim / (rotary_dim - 2))
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).float() / rotary_dim
    return 1.0 / torch.pow(base, exponents)


def _llama3(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Long wavelengths are stretched by `factor`, short ones stay, those between are blended."""
    wavelengths = 2 * math.pi / frequencies
    turns = scaling.original_max_position / wavelengths
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = blend.clamp(0, 1)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def _yarn(frequencies: torch.Tensor, theta: float, scaling: RopeScaling) -> torch.Tensor:
    """Dimensions that turn often within the original context stay, those that turn seldom are stretched."""
    num_pairs = len(frequencies)

    def dimension_that_turns(num_turns: float) -> float:
        wavelength = scaling.original_max_position / (num_turns * 2 * math.pi)
        return num_pairs * math.log(wavelength) / math.log(theta)

    low, high = dimension_that_turns(scaling.beta_fast), dimension_that_turns(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * num_pairs - 1)
    ramp = (torch.arange(num_pairs, dtype=torch.float32) - low) / max(high - low, 0.001)
    stretched = ramp.clamp(0, 1)
    return frequencies / scaling.factor * stretched + frequencies * (1 - stretched)


def _yarn_attention_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def temperature(mscale: float) -> float:
        return 0.1 * mscale * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return temperature(scaling.mscale) / temperature(scaling.mscale_all_dim)
    return temperature(1.0)


def rotary_cos_sin(
    positions: torch.Tensor, frequencies: torch.Tensor, factor: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and signed sine of each token's angles, both [num_tokens, 1, rotary_dim]; the same for every layer.

    positions:   [num_tokens] int64 or int32
    frequencies: [rotary_dim / 2] float32
    The first half of the sine is negated, so that the rotation is x * cos + swap_halves(x) * sin.
    """
    if runs_triton(positions):
        return rotary_cos_sin_triton(positions, frequencies, factor, dtype)
    angles = positions.float()[:, None] * frequencies
    cos, sin = angles.cos() * factor, angles.sin() * factor
    return (
        torch.cat((cos, cos), dim=-1).to(dtype).unsqueeze(1),
        torch.cat((-sin, sin), dim=-1).to(dtype).unsqueeze(1),
    )


@triton.jit
def _rotary_cos_sin_kernel(
    cos_ptr, sin_ptr, positions_ptr, frequencies_ptr, factor,
    NUM_PAIRS: tl.constexpr, BLOCK: tl.constexpr, USE_PDL: tl.constexpr,
):  # fmt: skip
    """One program per token, in float32. The angles are rounded as torch rounds them, and may be large."""
    begin(USE_PDL)
    token = tl.program_id(0).to(tl.int64)
    pairs = tl.arange(0, BLOCK)
    mask = pairs < NUM_PAIRS
    position = tl.load(positions_ptr + token).to(tl.float32)
    angles = position * tl.load(frequencies_ptr + pairs, mask, other=0.0)  # [BLOCK]
    cos, sin = tl.cos(angles) * factor, tl.sin(angles) * factor
    first = token * 2 * NUM_PAIRS + pairs
    tl.store(cos_ptr + first, cos.to(cos_ptr.dtype.element_ty), mask)
    tl.store(cos_ptr + first + NUM_PAIRS, cos.to(cos_ptr.dtype.element_ty), mask)
    tl.store(sin_ptr + first, (-sin).to(sin_ptr.dtype.element_ty), mask)
    tl.store(sin_ptr + first + NUM_PAIRS, sin.to(sin_ptr.dtype.element_ty), mask)


def rotary_cos_sin_triton(
    positions: torch.Tensor, frequencies: torch.Tensor, factor: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rotary_cos_sin` by the Triton kernel, in one launch. Raises ValueError if the arguments do not fit."""
    if positions.ndim != 1 or not positions.is_contiguous() or positions.is_floating_point():
        raise ValueError(f"positions are a contiguous list of integers, not {positions.dtype} {tuple(positions.shape)}")
    if frequencies.ndim != 1 or not frequencies.is_contiguous() or frequencies.dtype != torch.float32:
        raise ValueError(f"frequencies are a contiguous float32 list, not {frequencies.dtype} {frequencies.shape}")
    num_tokens, num_pairs = len(positions), len(frequencies)
    cos = torch.empty(num_tokens, 1, 2 * num_pairs, dtype=dtype, device=positions.device)
    sin = torch.empty_like(cos)
    _rotary_cos_sin_kernel[(num_tokens,)](
        cos, sin, positions, frequencies, factor,
        NUM_PAIRS=num_pairs, BLOCK=next_power_of_2(num_pairs),
        num_warps=LAUNCH[variant_of(positions.device)].num_warps, num_stages=1, **pdl_options(positions.device),
    )  # fmt: skip
    return cos, sin


def apply_rotary(
    heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = False
) -> torch.Tensor:
    """Rotate queries or keys (or both, side by side): (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).

    heads:       [num_tokens, num_heads, head_dim], last dimension contiguous
    cos, sin:    from `rotary_cos_sin`; where rotary_dim < head_dim, the dimensions past it are left as they are
    interleaved: the pairs are neighbours, as in GPT-J, instead of half a head apart, as in GPT-NeoX
    Returns      [num_tokens, num_heads, head_dim], contiguous, in the wider of the two types
    Source: RoFormer (https://arxiv.org/abs/2104.09864), equation 34.
    """
    rotary_dim = cos.shape[-1]
    rotated = heads[..., :rotary_dim]
    turned = _turn_neighbours(rotated, cos, sin) if interleaved else _turn_halves(rotated, cos, sin)
    if rotary_dim == heads.shape[-1]:
        return turned
    return torch.cat((turned, heads[..., rotary_dim:]), dim=-1)


def _turn_halves(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = heads.chunk(2, dim=-1)
    return torch.addcmul(heads * cos, torch.cat((second, first), dim=-1), sin)


def _turn_neighbours(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = heads[..., 0::2], heads[..., 1::2]
    cos, sin = cos.chunk(2, dim=-1)[0], sin.chunk(2, dim=-1)[1]
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1).flatten(-2)


def apply_rotary_(
    heads: torch.Tensor, num_rotated: int, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = False
) -> None:
    """`apply_rotary` on the first `num_rotated` heads of each token, in place.

    heads: [num_tokens, num_heads, head_dim], contiguous: queries, keys and values as one projection makes them
    """
    if not interleaved and (kernels := kernels_for(heads, cos, sin)):
        kernels.rotate_(heads, num_rotated, cos, sin)
    else:
        heads[:, :num_rotated] = apply_rotary(heads[:, :num_rotated], cos, sin, interleaved=interleaved)


def example_inputs(
    num_tokens: int, *, num_heads: int = 3, head_dim: int = 16, rotary_dim: int = 16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments of `apply_rotary`, at positions far apart."""
    frequencies, factor = rotary_frequencies(rotary_dim, 10_000.0, RopeScaling())
    positions = torch.arange(num_tokens) * 17
    cos, sin = rotary_cos_sin(positions, frequencies, factor, torch.float32)
    return torch.randn(num_tokens, num_heads, head_dim), cos, sin


def compile_examples(variant: str) -> list[CompileExample]:
    """float32 tables for whole heads, and for the part of a head that Phi rotates."""
    pointers = {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "positions_ptr": "*i64", "frequencies_ptr": "*fp32"}
    return [
        CompileExample(
            name=f"rotary_cos_sin rotary_dim={rotary_dim}",
            function=_rotary_cos_sin_kernel,
            signature=pointers | {"factor": "fp32"},
            constexprs={
                "NUM_PAIRS": rotary_dim // 2,
                "BLOCK": next_power_of_2(rotary_dim // 2),
                "USE_PDL": variant in PDL_VARIANTS,
            },
            num_warps=LAUNCH[variant].num_warps,
            num_stages=1,
        )
        for rotary_dim in (128, 20)
    ]
