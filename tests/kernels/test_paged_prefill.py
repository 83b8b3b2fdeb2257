"""Paged attention of chunks on the GPU against a dense float64 reference; without a GPU, in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
from attention_reference import dense_attention, move_attention
from octavo_kernels.launch import VARIANTS, compile_example
from octavo_kernels.ops.attention_metadata import AttentionMetadata, Scoring
from octavo_kernels.ops.paged_attention import example_inputs, plan_attention, run_attention
from octavo_kernels.ops.paged_attention_triton import plan_triton_attention
from octavo_kernels.ops.paged_prefill import LAUNCH, Launch, compile_examples, plan_chunks, run_chunks

# Tiles of 32 rows and 16 tokens at the sizes below, so that short chunks have several.
SMALL_TILES = Launch(32, 16, num_warps=4, num_stages=2)
TOLERANCES = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def attend(
    device: torch.device,
    query: torch.Tensor,
    cache: torch.Tensor,
    metadata: AttentionMetadata,
    scoring: Scoring,
    window: int | None = None,
    launch: Launch = SMALL_TILES,
) -> torch.Tensor:
    """Rows of the chunks, from a poisoned output; those of the decodes stay poisoned."""
    query, cache, metadata, scoring = move_attention(device, query, cache, metadata, scoring)
    plan = plan_chunks(metadata, cache, query.dtype, window, launch)
    output = torch.full(query.shape, torch.nan, dtype=query.dtype, device=device)
    run_chunks(output, query, cache, plan, scoring)
    return output.cpu()


def check(
    device: torch.device,
    query: torch.Tensor,
    cache: torch.Tensor,
    metadata: AttentionMetadata,
    scoring: Scoring,
    window: int | None = None,
    launch: Launch = SMALL_TILES,
) -> None:
    output = attend(device, query, cache, metadata, scoring, window, launch)
    assert output.dtype == query.dtype
    assert output[: metadata.num_decodes].isnan().all()
    expected = dense_attention(query, cache, metadata, scoring, window)
    tolerance, rows = TOLERANCES[query.dtype], slice(metadata.num_decodes, None)
    torch.testing.assert_close(output.double()[rows], expected[rows], atol=tolerance, rtol=tolerance)


BATCHES = {
    "first chunk": ([7], [7]),
    "one tile of queries": ([10], [10]),
    "later chunk": ([25], [60]),
    "ends with a block and a tile": ([16], [64]),
    "starts with a tile": ([5], [37]),
    "short chunks": ([2, 3, 2], [90, 3, 33]),
    "odd chunks": ([63, 5, 2], [63, 18, 2]),
    "behind decodes": ([1, 1, 12, 3], [100, 7, 40, 3]),
    "one token behind chunks": ([4, 1, 3, 1], [9, 12, 3, 50]),
}


@pytest.mark.parametrize("window", [None, 1, 20, 37], ids=lambda window: f"window-{window}")
@pytest.mark.parametrize(("query_lens", "context_lens"), BATCHES.values(), ids=BATCHES)
def test_equals_dense_reference(
    device: torch.device, query_lens: list[int], context_lens: list[int], window: int | None
) -> None:
    torch.manual_seed(0)
    inputs = example_inputs(query_lens, context_lens, num_heads=6, num_kv_heads=2, block_size=8)
    check(device, *inputs, Scoring(0.3), window)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (5, 1), (35, 1), (8, 4)])
@pytest.mark.parametrize("head_dim", [16, 40])
def test_group_and_head_sizes(device: torch.device, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    torch.manual_seed(0)
    inputs = example_inputs(
        [9, 3], [40, 3], num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=8
    )
    check(device, *inputs, Scoring(0.3))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("query_len", [3, 15, 50], ids=lambda length: f"{length}-tokens")
def test_real_heads_with_real_launch_parameters(device: torch.device, head_dim: int, query_len: int) -> None:
    torch.manual_seed(0)
    query, cache, metadata = example_inputs(
        [query_len], [query_len + 90], num_heads=4, num_kv_heads=1, head_dim=head_dim, block_size=16
    )
    check(device, query.half(), cache.half(), metadata, Scoring(head_dim**-0.5), launch=LAUNCH["hopper"])


@pytest.mark.parametrize(
    ("query_dtype", "cache_dtype"),
    [
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float32),
        # The interpreter multiplies bfloat16 wrongly.
        pytest.param(torch.bfloat16, torch.bfloat16, marks=pytest.mark.gpu),
    ],
)
def test_types(device: torch.device, query_dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query, cache, metadata = example_inputs([20, 2], [50, 16], block_size=8)
    check(device, query.to(query_dtype), cache.to(cache_dtype), metadata, Scoring(0.3))


@pytest.mark.parametrize("query_dtype", [torch.float32, torch.float16])
def test_an_8_bit_cache_is_read_through_its_scales(device: torch.device, query_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query, cache, metadata = example_inputs([20, 2], [50, 16], block_size=8)
    cache = (cache / 0.02).to(torch.float8_e4m3fn)
    check(device, query.to(query_dtype), cache, metadata, Scoring(0.3, k_scale=0.02, v_scale=0.02))


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("has_alibi", [False, True])
def test_scores_can_be_biased_and_capped(
    device: torch.device, window: int | None, softcap: float, has_alibi: bool
) -> None:
    torch.manual_seed(0)
    inputs = example_inputs([30, 2], [70, 16], block_size=8)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625, 2.0, 0.0]) if has_alibi else None
    check(device, *inputs, Scoring(0.4, alibi_slopes=slopes, softcap=softcap), window)


def test_only_blocks_that_some_token_sees_are_read(device: torch.device) -> None:
    torch.manual_seed(0)
    query, cache, metadata = example_inputs([20, 12], [50, 90], block_size=8)
    expected = dense_attention(query, cache, metadata, Scoring(0.3), window=20)
    tables = metadata.block_tables.clone()
    tables[0, 7:] = 10_000
    tables[1, : (90 - 12 - 19) // 8] = 10_000
    output = attend(device, query, cache, replace(metadata, block_tables=tables), Scoring(0.3), window=20)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)


def test_tables_may_hold_32_bit_integers_and_queries_may_be_strided(device: torch.device) -> None:
    torch.manual_seed(0)
    query, cache, metadata = example_inputs([20, 2], [50, 16], block_size=8)
    narrow = replace(
        metadata,
        block_tables=metadata.block_tables.int(),
        seq_lens=metadata.seq_lens.int(),
        query_start_loc=metadata.query_start_loc.int(),
    )
    fused = torch.cat((query, query.new_full((22, 4, 16), torch.nan)), dim=1)
    check(device, fused[:, :6], cache, narrow, Scoring(0.3))


@pytest.mark.parametrize("seed", range(3))
def test_random_batches(device: torch.device, seed: int) -> None:
    torch.manual_seed(seed)
    query_lens = torch.randint(2, 40, (5,))
    contexts = query_lens + torch.randint(0, 60, (5,))
    inputs = example_inputs(query_lens.tolist(), contexts.tolist(), num_heads=4, num_kv_heads=1, block_size=16)
    check(device, *inputs, Scoring(0.3))


@pytest.mark.parametrize(
    ("query_lens", "context_lens"),
    [([1, 1, 1], [30, 1, 16]), ([1, 1, 9, 2], [30, 1, 40, 2]), ([9, 2], [40, 2])],
    ids=["decodes", "both", "chunks"],
)
def test_decodes_and_chunks_write_one_output(
    device: torch.device, query_lens: list[int], context_lens: list[int]
) -> None:
    torch.manual_seed(0)
    inputs = example_inputs(query_lens, context_lens, block_size=8)
    query, cache, metadata, scoring = move_attention(device, *inputs, Scoring(0.3))
    # Nothing but the lengths of the chunks may be read on the host.
    plan = plan_triton_attention(replace(metadata, context_lens=()), cache, query.dtype, 20)
    output = plan.run(query, cache, scoring)
    expected = dense_attention(*inputs, scoring, window=20)
    torch.testing.assert_close(output.cpu().double(), expected, atol=1e-5, rtol=1e-5)


def test_arguments_that_no_kernel_takes_are_refused(device: torch.device) -> None:
    query, cache, metadata = example_inputs([5], [5], block_size=8)
    with pytest.raises(ValueError, match="block size 4"):
        plan_chunks(metadata, cache[:, :, :4], query.dtype)
    plan = plan_chunks(metadata, cache, query.dtype)
    with pytest.raises(ValueError, match="do not fit"):
        run_chunks(query, query[:, :5], cache, plan, Scoring(1.0))


def test_every_variant_has_examples_to_compile() -> None:
    assert set(LAUNCH) == set(VARIANTS)
    assert all(compile_examples(variant) for variant in VARIANTS)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_full_size_batches_on_the_gpu(
    device: torch.device, head_dim: int, cache_dtype: torch.dtype, window: int | None
) -> None:
    torch.manual_seed(0)
    query, cache, metadata = example_inputs(
        [1, 1, 1000, 17, 2, 256], [700, 16, 1000, 900, 2, 512], num_heads=16, num_kv_heads=4, head_dim=head_dim,
        block_size=16,
    )  # fmt: skip
    query, cache, metadata, scoring = move_attention(device, query.bfloat16(), cache, metadata, Scoring(0.1))
    cache = cache.to(cache_dtype)
    plan = plan_attention(metadata, cache, query.dtype, window)
    output = run_attention(query, cache, plan, scale=scoring.scale)
    expected = dense_attention(query, cache, metadata, scoring, window)
    torch.testing.assert_close(output.cpu().double(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
def test_examples_compile_for_this_gpu(device: torch.device) -> None:
    major, minor = torch.cuda.get_device_capability()
    for example in compile_examples("hopper"):
        compile_example(example, 10 * major + minor)


def test_rows_that_are_done_are_left_out(device: torch.device) -> None:
    torch.manual_seed(0)
    query, cache, metadata = example_inputs([1, 25, 9, 16], [40, 25, 30, 16], num_heads=4, num_kv_heads=2, block_size=8)
    query, cache, metadata, scoring = move_attention(device, query, cache, metadata, Scoring(0.3))
    plan = plan_chunks(metadata, cache, query.dtype, None, SMALL_TILES, num_done=[16, 0, 16])
    output = torch.full(query.shape, torch.nan, dtype=query.dtype, device=device)
    run_chunks(output, query, cache, plan, scoring)
    is_left_out = torch.zeros(51, dtype=torch.bool)
    is_left_out[[0, *range(1, 17), *range(35, 51)]] = True
    assert torch.equal(output.isnan().all(dim=(1, 2)).cpu(), is_left_out)
    expected = dense_attention(query, cache, metadata, scoring, None)
    tolerance = TOLERANCES[query.dtype]
    torch.testing.assert_close(
        output.double()[~is_left_out], expected[~is_left_out], atol=tolerance, rtol=tolerance, check_device=False
    )


def test_a_captured_step_reads_its_chunks_on_the_device(device: torch.device) -> None:
    torch.manual_seed(0)
    query, cache, metadata = example_inputs([1, 25, 9], [40, 25, 30], num_heads=4, num_kv_heads=2, block_size=8)
    query, cache, metadata, scoring = move_attention(device, query, cache, metadata, Scoring(0.3))
    num_tokens, num_absent = len(query), 2
    padding = torch.zeros(num_absent, metadata.block_tables.shape[1], dtype=torch.int64, device=device)
    tables, absent = metadata.block_tables, torch.full((num_absent,), -1, device=device)
    ends = torch.full((num_absent,), num_tokens, device=device)
    captured = AttentionMetadata(
        block_tables=torch.cat((tables[:1], padding, tables[1:], padding)),
        seq_lens=torch.cat((metadata.seq_lens[:1], absent, metadata.seq_lens[1:], absent)),
        query_start_loc=torch.cat((metadata.query_start_loc[:1], absent, metadata.query_start_loc[1:], ends)),
        slot_mapping=metadata.slot_mapping,
        num_decodes=1 + num_absent,
        query_lens=(1,) * (3 + 2 * num_absent),
        context_lens=(),
        max_chunk_tokens=64,
    )
    padded = torch.cat((query, torch.full((3, *query.shape[1:]), torch.nan, dtype=query.dtype, device=device)))
    output = plan_triton_attention(captured, cache, query.dtype).run(padded, cache, scoring)
    assert not output[num_tokens:].any()
    expected = dense_attention(query, cache, metadata, scoring, None)
    tolerance = TOLERANCES[query.dtype]
    torch.testing.assert_close(
        output[:num_tokens].double(), expected, atol=tolerance, rtol=tolerance, check_device=False
    )
