"""KV writes land in their slots and nowhere else."""

import pytest
import torch
from octavo_kernels.launch import FLOAT8_VARIANTS, variant_of
from octavo_kernels.ops.kv_write import (
    example_inputs,
    locate_rows,
    reference,
    write_kv,
    write_kv_rows,
    write_kv_triton,
)

# Triton's interpreter cuts bfloat16 off where a GPU rounds it.
ROUNDING = {torch.float32: 0.0, torch.float16: 0.0, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("num_tokens", [1, 4, 63, 1000])
def test_writes_each_slot_and_no_other(num_tokens: int) -> None:
    torch.manual_seed(0)
    key, value, cache, slots = example_inputs(num_tokens)
    write_kv(key, value, cache, slots)
    flat = cache.transpose(1, 2).flatten(0, 1)  # [slots, 2, heads, head_dim]
    written = slots >= 0
    torch.testing.assert_close(flat[slots[written]], torch.stack((key, value), dim=1)[written])
    assert int((~flat.isnan()).all(dim=(1, 2, 3)).sum()) == int(written.sum())


def test_padding_alone_writes_nothing() -> None:
    key, value, cache, slots = example_inputs(3)
    write_kv(key, value, cache, torch.full_like(slots, -1))
    assert bool(cache.isnan().all())


def test_converts_to_the_type_of_the_cache() -> None:
    key, value, cache, slots = example_inputs(3)
    cache = cache.bfloat16()
    write_kv(key, value, cache, slots)
    torch.testing.assert_close(cache.transpose(1, 2).flatten(0, 1)[slots[0], 0], key[0].bfloat16())


def test_writes_through_the_view_of_one_layer() -> None:
    key, value, _, slots = example_inputs(5)
    whole = torch.full((64, 3, 2, 16, 2, 8), torch.nan)
    write_kv(key, value, whole[:, 1], slots)
    assert bool(whole[:, 0].isnan().all())
    assert bool(whole[:, 2].isnan().all())
    assert not bool(whole[:, 1].isnan().all())


def test_float8_is_scaled_and_clamped() -> None:
    torch.manual_seed(0)
    key, value, cache, slots = example_inputs(9)
    key[0, 0, 0] = 1e6
    written, expected = cache.to(torch.float8_e4m3fn), cache.to(torch.float8_e4m3fn)
    write_kv_rows(key, value, written, locate_rows(slots, written), k_scale=0.5, v_scale=2.0)
    reference(key, value, expected, slots, k_scale=0.5, v_scale=2.0)
    torch.testing.assert_close(written.float(), expected.float(), equal_nan=True)
    assert float(written.float().nan_to_num(0).max()) == 448


@pytest.mark.parametrize("cache_type", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_kv_heads", "head_dim"), [(1, 8), (3, 80), (20, 48)])
@pytest.mark.parametrize("num_tokens", [1, 12] + ([1000] if torch.cuda.is_available() else []))
def test_kernel_writes_one_layer_and_nothing_else(
    num_tokens: int, num_kv_heads: int, head_dim: int, cache_type: torch.dtype, device: torch.device
) -> None:
    torch.manual_seed(0)
    key, value, _, slots = example_inputs(num_tokens, num_kv_heads=num_kv_heads, head_dim=head_dim)
    heads = torch.cat((torch.randn(num_tokens, 2, head_dim), key, value), dim=1).to(device)
    key, value = heads[:, 2 : 2 + num_kv_heads], heads[:, 2 + num_kv_heads :]
    whole = torch.full((64, 3, 2, 16, num_kv_heads, head_dim), torch.nan, dtype=cache_type, device=device)
    expected = whole.clone()
    write_kv_triton(key, value, whole[:, 1], slots.to(device))
    reference(key, value, expected[:, 1], slots)
    torch.testing.assert_close(whole, expected, equal_nan=True, atol=0, rtol=ROUNDING[cache_type])


def test_kernel_scales_and_clamps_float8(device: torch.device) -> None:
    if device.type == "cuda" and variant_of(device) not in FLOAT8_VARIANTS:
        pytest.skip("this GPU has no float8")
    torch.manual_seed(0)
    key, value, cache, slots = (each.to(device) for each in example_inputs(9))
    # Numbers that the type has, so that nothing hangs on how the interpreter rounds to it.
    key, value = (each.to(torch.float8_e4m3fn).float() for each in (key, value))
    key[0, 0, 0], value[1, 0, 0] = 1e6, -1e6
    written, expected = cache.to(torch.float8_e4m3fn), cache.to(torch.float8_e4m3fn)
    write_kv_triton(key, value, written, slots, k_scale=0.5, v_scale=0.25)
    reference(key, value, expected, slots, k_scale=0.5, v_scale=0.25)
    torch.testing.assert_close(written.float(), expected.float(), equal_nan=True, atol=0, rtol=0)


def test_kernel_refuses_a_cache_of_other_heads(device: torch.device) -> None:
    key, value, cache, slots = (each.to(device) for each in example_inputs(3))
    with pytest.raises(ValueError, match=r"a cache of 64 blocks of 16 slots for heads \[1, 8\]"):
        write_kv_triton(key[:, :1], value[:, :1], cache, slots)
    with pytest.raises(ValueError, match="does not fit 3 tokens"):
        write_kv_triton(key, value, cache, slots[:2])
