"""KV writes land in their slots and nowhere else."""

import pytest
import torch
from octavo_kernels.ops.kv_write import (
    example_inputs,
    locate_rows,
    reference,
    write_kv,
    write_kv_rows,
)


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


@pytest.mark.parametrize("part", ["key", "value", "slots"])
def test_refuses_what_does_not_fit(part: str) -> None:
    inputs = dict(zip(("key", "value", "cache", "slots"), example_inputs(3), strict=True))
    inputs[part] = inputs[part][:2]
    with pytest.raises(ValueError, match=r"differ|does not fit 3 tokens"):
        write_kv(*inputs.values())


def test_refuses_a_cache_of_other_heads() -> None:
    key, value, cache, slots = example_inputs(3)
    with pytest.raises(ValueError, match=r"a cache of 64 blocks of 16 slots for heads \[1, 8\]"):
        write_kv(key[:, :1], value[:, :1], cache, slots)


def test_refuses_blocks_with_gaps() -> None:
    key, value, cache, slots = example_inputs(3, block_size=32)
    with pytest.raises(ValueError, match="one piece"):
        write_kv(key, value, cache[:, :, ::2], slots // 2)


def test_slots_may_be_32_bit_integers() -> None:
    torch.manual_seed(0)
    key, value, cache, _ = example_inputs(4)
    slots = torch.tensor([5, 0, 40, 7], dtype=torch.int32)
    expected = cache.clone()
    write_kv(key, value, cache, slots)
    reference(key, value, expected, slots)
    torch.testing.assert_close(cache, expected, equal_nan=True)
