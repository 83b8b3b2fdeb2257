"""Rotary position embedding, NeoX style, and the frequency scalings that stretch a model's context."""

import math
from dataclasses import dataclass
from typing import Literal

import torch

from octavo_kernels.native import kernels_for

RopeType = Literal["default", "linear", "dynamic", "llama3", "yarn", "factors"]


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

    positions:   [num_tokens] int64
    frequencies: [rotary_dim / 2] float32
    The first half of the sine is negated, so that the rotation is x * cos + swap_halves(x) * sin.
    """
    angles = positions.float()[:, None] * frequencies
    cos, sin = angles.cos() * factor, angles.sin() * factor
    return (
        torch.cat((cos, cos), dim=-1).to(dtype).unsqueeze(1),
        torch.cat((-sin, sin), dim=-1).to(dtype).unsqueeze(1),
    )


def apply_rotary(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate queries or keys (or both, side by side): (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin).

    heads:    [num_tokens, num_heads, head_dim], last dimension contiguous
    cos, sin: from `rotary_cos_sin`; where rotary_dim < head_dim, the dimensions past it are left as they are
    Returns   [num_tokens, num_heads, head_dim], contiguous
    Source: RoFormer (https://arxiv.org/abs/2104.09864) with the pairs half a head apart, as in GPT-NeoX.
    """
    rotary_dim = cos.shape[-1]
    rotated = heads[..., :rotary_dim]
    first, second = rotated.chunk(2, dim=-1)
    turned = torch.addcmul(rotated * cos, torch.cat((second, first), dim=-1), sin)
    if rotary_dim == heads.shape[-1]:
        return turned
    return torch.cat((turned, heads[..., rotary_dim:]), dim=-1)


def apply_rotary_(heads: torch.Tensor, num_rotated: int, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """`apply_rotary` on the first `num_rotated` heads of each token, in place.

    heads: [num_tokens, num_heads, head_dim], contiguous: queries, keys and values as one projection makes them
    """
    if kernels := kernels_for(heads, cos, sin):
        kernels.rotate_(heads, num_rotated, cos, sin)
    else:
        heads[:, :num_rotated] = apply_rotary(heads[:, :num_rotated], cos, sin)


def example_inputs(
    num_tokens: int, *, num_heads: int = 3, head_dim: int = 16, rotary_dim: int = 16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Arguments of `apply_rotary`, at positions far apart."""
    frequencies, factor = rotary_frequencies(rotary_dim, 10_000.0, RopeScaling())
    positions = torch.arange(num_tokens) * 17
    cos, sin = rotary_cos_sin(positions, frequencies, factor, torch.float32)
    return torch.randn(num_tokens, num_heads, head_dim), cos, sin
