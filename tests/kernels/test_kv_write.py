"""KV writes land in their slots and nowhere else."""

import pytest
import torch
from octavo_kernels.ops.kv_write import example_inputs, write_kv


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
