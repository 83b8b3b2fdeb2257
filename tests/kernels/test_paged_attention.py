"""Paged attention against a naive float32 reference: one query token, one head at a time."""

from dataclasses import replace

import pytest
import torch
from octavo_kernels.ops.attention_metadata import AttentionMetadata
from octavo_kernels.ops.paged_attention import example_inputs, paged_attention


def naive_attention(
    query: torch.Tensor, cache: torch.Tensor, metadata: AttentionMetadata, scale: float, window: int | None
) -> torch.Tensor:
    """Written from the definition, with a Python loop per token and head."""
    _, _, block_size, num_kv_heads, _ = cache.shape
    output = torch.full(query.shape, torch.nan)
    row = 0
    for seq, (query_len, context) in enumerate(zip(metadata.query_lens, metadata.context_lens, strict=True)):
        for position in range(context - query_len, context):
            first = 0 if window is None else max(0, position - window + 1)
            seen = torch.arange(first, position + 1)
            blocks = metadata.block_tables[seq, seen // block_size]
            for head in range(query.shape[1]):
                kv_head = head // (query.shape[1] // num_kv_heads)
                keys, values = (cache[blocks, which, seen % block_size, kv_head].float() for which in (0, 1))
                weights = torch.softmax(keys @ query[row, head].float() * scale, dim=0)
                output[row, head] = weights @ values
            row += 1
    return output


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
def test_equals_naive_reference(query_lens, context_lens, window, num_heads, num_kv_heads) -> None:
    torch.manual_seed(0)
    query, cache, metadata = example_inputs(
        query_lens, context_lens, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=24, block_size=4
    )
    output = paged_attention(query, cache, metadata, scale=0.3, sliding_window=window)
    assert output.shape == query.shape
    torch.testing.assert_close(output, naive_attention(query, cache, metadata, 0.3, window), atol=1e-5, rtol=1e-4)


def test_bfloat16_stays_within_its_precision() -> None:
    torch.manual_seed(0)
    query, cache, metadata = example_inputs([1, 1, 5], [17, 40, 33])
    expected = naive_attention(query.bfloat16(), cache.bfloat16(), metadata, 0.25, None)
    output = paged_attention(query.bfloat16(), cache.bfloat16(), metadata, scale=0.25)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, atol=2e-2, rtol=2e-2)


def test_cache_may_be_narrower_than_the_query() -> None:
    torch.manual_seed(0)
    query, cache, metadata = example_inputs([1, 5], [17, 33])
    cache = cache.bfloat16()
    output = paged_attention(query, cache, metadata, scale=0.25)
    torch.testing.assert_close(output, naive_attention(query, cache, metadata, 0.25, None), atol=1e-5, rtol=1e-4)


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
    torch.testing.assert_close(output, naive_attention(query, cache, metadata, 0.25, None), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(3, 3, 64), (20, 1, 32), (8, 2, 128), (6, 2, 20)])
def test_decodes_over_odd_lengths(num_heads: int, num_kv_heads: int, head_dim: int, window: int | None) -> None:
    torch.manual_seed(0)
    contexts = [1, 2, 15, 16, 17, 63, 250]
    query, cache, metadata = example_inputs(
        [1] * len(contexts), contexts, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=16
    )
    output = paged_attention(query, cache, metadata, scale=0.25, sliding_window=window)
    torch.testing.assert_close(output, naive_attention(query, cache, metadata, 0.25, window), atol=1e-5, rtol=1e-4)
