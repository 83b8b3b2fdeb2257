import pytest
from octavo_engine.bench.allocation import CacheShape, allocate_blocks, reserve_exactly, reserve_maximum
from octavo_engine.bench.workloads import make_lengths, named

SHAREGPT = make_lengths(named("sharegpt"), 0, 300)
CACHE = CacheShape(num_tokens=16_384)


def test_reservation_by_hand() -> None:
    # 20 slots, 10 a region: two requests at once. Each starts with its prompt in the cache and gains a token a step.
    # Steps with someone waiting: (4, 2) filled, then (5, 3), then, the first having ended, nobody waits.
    result = reserve_maximum([(4, 2), (2, 4), (3, 1)], CacheShape(num_tokens=20, max_model_len=10))
    assert [each.num_running for each in result.timeline] == [2, 2, 2, 1]
    assert [each.num_slots_filled for each in result.timeline] == [6, 8, 4 + 3, 5]
    assert result.mean_running == 2
    assert result.wasted_share == pytest.approx((20 - 7) / 20)
    assert result.idle_share == 0
    assert result.num_steps == 4


def test_reservation_of_the_final_length_by_hand() -> None:
    # Regions of 6, 6 and 4 slots in 13: the third starts when the first ends.
    result = reserve_exactly([(4, 2), (2, 4), (3, 1)], CacheShape(num_tokens=13))
    assert [each.num_running for each in result.timeline] == [2, 2, 2, 1]
    assert result.idle_share == pytest.approx(1 / 13)
    assert result.wasted_share == pytest.approx((12 - 7) / 13)


def test_a_block_on_demand_wastes_only_its_own_unfilled_slots() -> None:
    # One request of 5 + 3 tokens in blocks of 4. The last token is never computed: 5, 6, 7 slots are filled in turn.
    result = allocate_blocks([(5, 3)], CacheShape(num_tokens=16, block_size=4, max_model_len=16))
    assert [(each.num_slots_held, each.num_slots_filled) for each in result.timeline] == [(8, 5), (8, 6), (8, 7)]
    assert result.wasted_share == pytest.approx(2 / 16)


def test_blocks_hold_at_least_twice_the_requests_and_waste_under_4_percent() -> None:
    blocks, reserved = allocate_blocks(SHAREGPT, CACHE), reserve_maximum(SHAREGPT, CACHE)
    assert blocks.mean_running >= 2 * reserved.mean_running
    assert blocks.max_running >= 4 * reserved.max_running
    assert blocks.wasted_share < 0.04


def test_blocks_beat_even_a_foreseen_length() -> None:
    blocks, foreseen = allocate_blocks(SHAREGPT, CACHE), reserve_exactly(SHAREGPT, CACHE)
    assert blocks.mean_running > foreseen.mean_running
    assert blocks.num_steps < foreseen.num_steps


def test_no_way_of_allocation_exceeds_the_cache() -> None:
    for result in (
        allocate_blocks(SHAREGPT, CACHE),
        reserve_maximum(SHAREGPT, CACHE),
        reserve_exactly(SHAREGPT, CACHE),
    ):
        assert all(each.num_slots_filled <= each.num_slots_held <= CACHE.num_tokens for each in result.timeline)
