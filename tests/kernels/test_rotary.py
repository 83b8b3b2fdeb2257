"""Rotary embedding: the rotation against complex numbers, the frequencies against their formulas."""

import math

import pytest
import torch
from octavo_kernels.ops.rotary import (
    RopeScaling,
    apply_rotary,
    example_inputs,
    rotary_cos_sin,
    rotary_frequencies,
)


def rotate_by_complex_numbers(heads: torch.Tensor, positions: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    half = len(frequencies)
    pairs = torch.complex(heads[..., :half].double(), heads[..., half : 2 * half].double())
    angles = positions.double()[:, None, None] * frequencies.double()
    turned = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((turned.real, turned.imag, heads[..., 2 * half :].double()), dim=-1)


@pytest.mark.parametrize("rotary_dim", [16, 8], ids=["whole head", "partial"])
@pytest.mark.parametrize("num_tokens", [1, 63, 300])
def test_rotates_pairs_half_a_head_apart(num_tokens: int, rotary_dim: int) -> None:
    torch.manual_seed(0)
    heads, cos, sin = example_inputs(num_tokens, rotary_dim=rotary_dim)
    frequencies, _ = rotary_frequencies(rotary_dim, 10_000.0, RopeScaling())
    expected = rotate_by_complex_numbers(heads, torch.arange(num_tokens) * 17, frequencies)
    torch.testing.assert_close(apply_rotary(heads, cos, sin).double(), expected, atol=2e-3, rtol=1e-3)


def test_position_zero_changes_nothing() -> None:
    heads, _, _ = example_inputs(1)
    frequencies, factor = rotary_frequencies(16, 10_000.0, RopeScaling())
    cos, sin = rotary_cos_sin(torch.zeros(1, dtype=torch.int64), frequencies, factor, torch.float32)
    torch.testing.assert_close(apply_rotary(heads, cos, sin), heads)


def test_scores_depend_on_distance_only() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 16), torch.randn(1, 1, 16)
    frequencies, factor = rotary_frequencies(16, 10_000.0, RopeScaling())

    def score(query_position: int, key_position: int) -> float:
        turned = [
            apply_rotary(heads, *rotary_cos_sin(torch.tensor([position]), frequencies, factor, torch.float32))
            for heads, position in ((query, query_position), (key, key_position))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(3, 1) == pytest.approx(score(103, 101), abs=1e-4)


def test_linear_divides_every_frequency() -> None:
    plain, _ = rotary_frequencies(16, 10_000.0, RopeScaling())
    scaled, factor = rotary_frequencies(16, 10_000.0, RopeScaling("linear", factor=4.0))
    torch.testing.assert_close(scaled, plain / 4)
    assert factor == 1.0


def test_llama3_keeps_short_wavelengths_and_stretches_long_ones() -> None:
    scaling = RopeScaling("llama3", factor=8.0, original_max_position=8192, low_freq_factor=1.0, high_freq_factor=4.0)
    plain, _ = rotary_frequencies(128, 500_000.0, RopeScaling())
    scaled, _ = rotary_frequencies(128, 500_000.0, scaling)
    wavelengths = 2 * math.pi / plain
    torch.testing.assert_close(scaled[wavelengths < 8192 / 4], plain[wavelengths < 8192 / 4])
    torch.testing.assert_close(scaled[wavelengths > 8192], plain[wavelengths > 8192] / 8)
    assert bool((scaled[:-1] > scaled[1:]).all())


def test_dynamic_leaves_the_original_context_alone() -> None:
    scaling = RopeScaling("dynamic", factor=2.0, original_max_position=2048)
    plain, _ = rotary_frequencies(64, 10_000.0, RopeScaling())
    within, _ = rotary_frequencies(64, 10_000.0, scaling, max_position=2048)
    beyond, _ = rotary_frequencies(64, 10_000.0, scaling, max_position=4096)
    torch.testing.assert_close(within, plain)
    assert bool((beyond[1:] < plain[1:]).all())


def test_factors_divide_one_frequency_each() -> None:
    plain, _ = rotary_frequencies(8, 10_000.0, RopeScaling())
    scaled, _ = rotary_frequencies(8, 10_000.0, RopeScaling("factors", frequency_factors=(1.0, 2.0, 4.0, 8.0)))
    torch.testing.assert_close(scaled, plain / torch.tensor([1.0, 2.0, 4.0, 8.0]))


def test_factors_must_fit_the_head() -> None:
    with pytest.raises(ValueError, match="3 frequency factors for 4 frequencies"):
        rotary_frequencies(8, 10_000.0, RopeScaling("factors", frequency_factors=(1.0, 2.0, 4.0)))
