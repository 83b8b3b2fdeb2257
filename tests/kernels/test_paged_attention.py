"""Paged attention in torch and in the C kernel, against a dense float64 reference."""

from dataclasses import replace

import pytest
import torch
from attention_reference import dense_attention
from octavo_kernels.ops.attention_metadata import Scoring
from octavo_kernels.ops.paged_attention import example_inputs, paged_attention, plan_attention, run_attention

BATCHES = {
    "one decode": ([1], [1]),
    "one decode, full block": ([1], [8]),
    "decodes of one length": ([1, 1, 1], [13, 13, 13]),
    "decodes of mixed lengths": ([1, 1, 1, 1], [1, 9, 30, 4]),
    "decodes of very mixed lengths": ([1, 1, 1, 1], [200, 3, 5, 201]),
    "first chunk": ([7], [7]),
    "later chunk": ([7], [20]),
    "odd chunks": ([63, 5, 2], [63, 18, 2]),
    "decodes and chunks": ([1, 1, 1, 3, 12], [100, 7, 2, 3, 40]),
    "single-token prompts": ([1, 1], [1, 1]),
}


@pytest.mark.parametrize(("query_lens", "context_lens"), BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("window", [None, 1, 4, 10], ids=lambda window: f"window-{window}")
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(6, 2), (4, 4), (5, 1)])
def test_equals_dense_reference(query_lens, context_lens, window, num_heads, num_kv_heads) -> None:
    torch.manual_seed(0)
    query, cache, metadata = example_inputs(
        query_lens, context_lens, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=24, block_size=4
    )
    output = paged_attention(query, cache, metadata, scale=0.3, sliding_window=window)
    assert output.shape == query.shape
    expected = dense_attention(query, cache, metadata, Scoring(0.3), window)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-4)


def test_bfloat16_stays_within_its_precision() -> None:
    torch.manual_seed(0)
    query, cache, metadata = example_inputs([1, 1, 5], [17, 40, 33])
    expected = dense_attention(query.bfloat16(), cache.bfloat16(), metadata, Scoring(0.25))
    output = paged_attention(query.bfloat16(), cache.bfloat16(), metadata, scale=0.25)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.double(), expected, atol=2e-2, rtol=2e-2)


def test_cache_may_be_narrower_than_the_query() -> None:
    torch.manual_seed(0)
    query, cache, metadata = example_inputs([1, 5], [17, 33])
    cache = cache.bfloat16()
    output = paged_attention(query, cache, metadata, scale=0.25)
    expected = dense_attention(query, cache, metadata, Scoring(0.25))
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-4)


def test_a_request_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(0)
    query, cache, metadata = example_inputs([1, 1, 1], [70, 9, 33])
    together = paged_attention(query, cache, metadata, scale=0.25)
    for seq in range(3):
        alone = replace(
            metadata,
            block_tables=metadata.block_tables[seq : seq + 1],
            seq_lens=metadata.seq_lens[seq : seq + 1],
            num_decodes=1,
            query_lens=(1,),
            context_lens=metadata.context_lens[seq : seq + 1],
        )
        output = paged_attention(query[seq : seq + 1], cache, alone, scale=0.25)
        torch.testing.assert_close(output[0], together[seq], atol=1e-6, rtol=1e-5)


def test_decodes_after_chunks_are_answered_in_their_rows() -> None:
    torch.manual_seed(0)
    query, cache, metadata = example_inputs([4, 1, 3, 1], [9, 12, 3, 50])
    output = paged_attention(query, cache, metadata, scale=0.25)
    expected = dense_attention(query, cache, metadata, Scoring(0.25))
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(3, 3, 64), (20, 1, 32), (8, 2, 128), (6, 2, 20)])
def test_decodes_over_odd_lengths(num_heads: int, num_kv_heads: int, head_dim: int, window: int | None) -> None:
    torch.manual_seed(0)
    contexts = [1, 2, 15, 16, 17, 63, 250]
    query, cache, metadata = example_inputs(
        [1] * len(contexts), contexts, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=16
    )
    output = paged_attention(query, cache, metadata, scale=0.25, sliding_window=window)
    expected = dense_attention(query, cache, metadata, Scoring(0.25), window)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-4)


def test_queries_may_have_their_heads_apart() -> None:
    torch.manual_seed(0)
    query, cache, metadata = example_inputs([1, 1], [17, 40])
    apart = query.transpose(0, 1).contiguous().transpose(0, 1)
    output = paged_attention(apart, cache, metadata, scale=0.25)
    torch.testing.assert_close(output, paged_attention(query, cache, metadata, scale=0.25))


def test_refuses_queries_of_other_heads_and_blocks_with_gaps() -> None:
    query, cache, metadata = example_inputs([1, 1], [17, 40])
    for other in (query[..., :8], query[:, :5]):
        with pytest.raises(ValueError, match="do not fit 2 KV heads of 16"):
            paged_attention(other, cache, metadata, scale=0.25)
    with pytest.raises(ValueError, match="one piece"):
        paged_attention(query, cache[:, :, ::2], metadata, scale=0.25)


@pytest.mark.parametrize("contexts", [[17, 0, 40, 0], [0, 0]], ids=["some", "all"])
def test_padding_among_decodes_is_zeros(contexts: list[int]) -> None:
    torch.manual_seed(0)
    query, cache, metadata = example_inputs([1] * len(contexts), [max(context, 1) for context in contexts])
    metadata = replace(metadata, seq_lens=torch.tensor(contexts), context_lens=tuple(contexts))
    output = paged_attention(query, cache, metadata, scale=0.25)
    expected = dense_attention(query, cache, metadata, Scoring(0.25))
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-4)


SCORINGS = {
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 0.0625, 2.0, 0.0])},
    "softcap": {"softcap": 3.0},
    "alibi and softcap": {"alibi_slopes": torch.full((6,), 0.3), "softcap": 1.5},
    "cache scales": {"k_scale": 2.0, "v_scale": 0.5},
}


@pytest.mark.parametrize("scoring", SCORINGS.values(), ids=SCORINGS)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize(("query_lens", "context_lens"), BATCHES.values(), ids=BATCHES)
def test_scores_can_be_biased_capped_and_scaled(query_lens, context_lens, window, scoring) -> None:
    torch.manual_seed(0)
    query, cache, metadata = example_inputs(query_lens, context_lens, head_dim=24)
    plan = plan_attention(metadata, cache, query.dtype, window)
    output = run_attention(query, cache, plan, scale=0.4, **scoring)
    expected = dense_attention(query, cache, metadata, Scoring(0.4, **scoring), window)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-4)


def test_layers_of_one_plan_may_score_differently() -> None:
    torch.manual_seed(0)
    query, cache, metadata = example_inputs([1, 1, 3], [17, 40, 9], head_dim=24)
    plan = plan_attention(metadata, cache, query.dtype)
    for softcap in (0.0, 2.0, 0.0):
        output = run_attention(query, cache, plan, scale=0.4, softcap=softcap)
        expected = dense_attention(query, cache, metadata, Scoring(0.4, softcap=softcap))
        torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-4)


def test_an_8_bit_cache_is_read_through_its_scales() -> None:
    torch.manual_seed(0)
    query, cache, metadata = example_inputs([1, 1, 5], [17, 40, 33])
    cache = (cache / 0.02).to(torch.float8_e4m3fn)
    plan = plan_attention(metadata, cache, query.dtype)
    output = run_attention(query, cache, plan, scale=0.25, k_scale=0.02, v_scale=0.02)
    expected = dense_attention(query, cache, metadata, Scoring(0.25, k_scale=0.02, v_scale=0.02))
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-4)


def test_tables_may_hold_32_bit_integers() -> None:
    torch.manual_seed(0)
    query, cache, metadata = example_inputs([1, 1, 5], [17, 40, 33])
    narrow = replace(metadata, block_tables=metadata.block_tables.int(), seq_lens=metadata.seq_lens.int())
    output = paged_attention(query, cache, narrow, scale=0.25)
    torch.testing.assert_close(output, paged_attention(query, cache, metadata, scale=0.25))
