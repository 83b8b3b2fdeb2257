import hashlib

import numpy as np
import pytest
from octavo_engine.bench.workloads import (
    FIRST_TOKEN_ID,
    WORKLOADS,
    fixed,
    make_lengths,
    make_requests,
    named,
    poisson_arrivals,
)
from octavo_engine.errors import ConfigError


@pytest.mark.parametrize("name", WORKLOADS)
def test_equal_seeds_make_equal_requests(name: str) -> None:
    assert make_requests(named(name), 7, num_requests=5) == make_requests(named(name), 7, num_requests=5)


def test_other_seeds_make_other_prompts() -> None:
    first, second = (make_requests(fixed(16, 4, 2), seed) for seed in (1, 2))
    assert first[0].prompt_token_ids != second[0].prompt_token_ids


def test_arrival_rate_changes_neither_prompts_nor_lengths() -> None:
    at_once = make_requests(named("sharegpt"), 3, num_requests=20)
    spread_out = make_requests(named("sharegpt"), 3, num_requests=20, requests_per_second=2.0)
    assert [each.prompt_token_ids for each in at_once] == [each.prompt_token_ids for each in spread_out]
    assert all(each.arrival_s == 0 for each in at_once)


def test_token_ids_stay_within_the_vocabulary() -> None:
    ids = [id_ for each in make_requests(fixed(200, 1, 10), 0, vocab_size=1000) for id_ in each.prompt_token_ids]
    assert min(ids) >= FIRST_TOKEN_ID
    assert max(ids) < 1000


def test_a_tiny_vocabulary_is_used_whole() -> None:
    ids = {id_ for each in make_requests(fixed(500, 1, 4), 0, vocab_size=32) for id_ in each.prompt_token_ids}
    assert ids == set(range(32))


def test_sharegpt_lengths_have_the_published_means_and_bounds() -> None:
    lengths = make_lengths(named("sharegpt"), 0, 20_000)
    inputs, outputs = zip(*lengths, strict=True)
    # Clipping at 1024 takes a little off the means of 220 and 205.
    assert 195 < sum(inputs) / len(inputs) < 225
    assert 190 < sum(outputs) / len(outputs) < 210
    assert min(*inputs, *outputs) >= 4
    assert max(*inputs, *outputs) <= 1024


def test_shared_prefix_is_shared_and_the_rest_is_not() -> None:
    first, second = make_requests(named("shared-prefix"), 0, num_requests=2)
    assert len(first.prompt_token_ids) == 2048 + 128
    assert first.prompt_token_ids[:2048] == second.prompt_token_ids[:2048]
    assert first.prompt_token_ids[2048:] != second.prompt_token_ids[2048:]


def test_poisson_arrivals_are_seeded_rising_and_of_the_rate() -> None:
    arrivals = poisson_arrivals(4.0, 4000, seed=5)
    assert arrivals == poisson_arrivals(4.0, 4000, seed=5)
    assert list(arrivals) == sorted(arrivals)
    assert arrivals[-1] / len(arrivals) == pytest.approx(1 / 4.0, rel=0.05)


def test_unknown_workload_names_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="sharegpt"):
        named("share-gpt")


@pytest.mark.parametrize(
    ("name", "digest"),
    [("T0", "7af5d7567f96d51b"), ("W3", "702e82e46865b3e9"), ("W5", "34d16f31f996f11f"), ("D4", "e407d91d8a490e39")],
)
def test_peer_workloads_have_the_very_prompts_of_the_peer_comparison(name: str, digest: str) -> None:
    # SHA-256 over the ids, as little-endian int64, of the comparison's own generator: repeat 3, vocabulary 128,256.
    requests = make_requests(named(name), 3, vocab_size=128_256)
    ids = np.array([each.prompt_token_ids for each in requests], dtype="<i8")
    assert hashlib.sha256(ids.tobytes()).hexdigest()[:16] == digest


def test_fewer_requests_of_a_peer_workload_are_its_first_ones() -> None:
    assert make_requests(named("D16"), 1, num_requests=5) == make_requests(named("D16"), 1)[:5]


def test_the_longest_context_counts_prefix_prompt_and_answer() -> None:
    assert named("W5").longest_context == 2048 + 128 + 128
    assert named("sharegpt").longest_context == 2048
