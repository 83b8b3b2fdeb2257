"""Rotary embedding: the rotation against complex numbers, the frequencies against their formulas."""

import math

import pytest
import torch
from octavo_kernels.ops.rotary import (
    RopeScaling,
    apply_rotary,
    apply_rotary_,
    example_inputs,
    rotary_cos_sin,
    rotary_cos_sin_triton,
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


def test_interleaved_pairs_are_neighbours() -> None:
    torch.manual_seed(0)
    heads, cos, sin = example_inputs(5, rotary_dim=8)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7, *range(8, 16)])  # from neighbours to halves
    expected = torch.empty_like(heads)
    expected[..., order] = apply_rotary(heads[..., order], cos, sin)
    torch.testing.assert_close(apply_rotary(heads, cos, sin, interleaved=True), expected)
    apply_rotary_(heads, 2, cos, sin, interleaved=True)
    torch.testing.assert_close(heads[:, :2], expected[:, :2])


def test_rotates_in_float32_whatever_the_type_of_the_heads() -> None:
    torch.manual_seed(0)
    heads, cos, sin = example_inputs(5)
    narrow = heads.bfloat16()
    expected = apply_rotary(narrow.float(), cos, sin).bfloat16()
    apply_rotary_(narrow, heads.shape[1], cos, sin)
    torch.testing.assert_close(narrow, expected)


@pytest.mark.parametrize("position_type", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 1e-3)], ids=str)
@pytest.mark.parametrize("rotary_dim", [2, 20, 128])
def test_table_kernel_equals_float64(
    rotary_dim: int, dtype: torch.dtype, tolerance: float, position_type: torch.dtype, device: torch.device
) -> None:
    frequencies, _ = rotary_frequencies(rotary_dim, 10_000.0, RopeScaling())
    positions = torch.tensor([0, 1, 17, 4095, 131_071, 1_000_003], dtype=position_type, device=device)
    frequencies = frequencies.to(device)
    cos, sin = rotary_cos_sin_triton(positions, frequencies, 1.5, dtype)
    angles = (positions.float()[:, None] * frequencies).double()  # rounded as models were trained
    assert cos.shape == sin.shape == (6, 1, rotary_dim)
    assert cos.dtype == sin.dtype == dtype
    expected_cos, expected_sin = 1.5 * angles.cos(), 1.5 * angles.sin()
    for table, halves in ((cos, (expected_cos, expected_cos)), (sin, (-expected_sin, expected_sin))):
        torch.testing.assert_close(table[:, 0].double(), torch.cat(halves, dim=-1), atol=tolerance, rtol=tolerance)


def test_table_kernel_refuses_positions_of_two_dimensions(device: torch.device) -> None:
    with pytest.raises(ValueError, match="list of integers"):
        rotary_cos_sin_triton(
            torch.zeros(3, 4, dtype=torch.int64, device=device), torch.zeros(8, device=device), 1.0, torch.float32
        )
