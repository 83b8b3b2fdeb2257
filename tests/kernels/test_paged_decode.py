"""Paged decode on the GPU against a dense float64 reference; without a GPU, its kernels in Triton's interpreter."""

from dataclasses import replace

import pytest
import torch
from attention_reference import dense_attention, move_attention
from octavo_kernels.launch import VARIANTS, compile_example
from octavo_kernels.ops import paged_decode
from octavo_kernels.ops.attention_metadata import AttentionMetadata, Scoring
from octavo_kernels.ops.paged_attention import example_inputs, plan_attention, run_attention
from octavo_kernels.ops.paged_decode import LAUNCH, Launch, compile_examples, plan_decodes, run_decodes

# Tiles of 16 tokens at the sizes below, so that short contexts have many and a few workers share them.
SMALL_TILES = Launch(16, 1, 1, num_warps=4, num_stages=3)
TOLERANCES = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}


def decode(
    device: torch.device,
    query: torch.Tensor,
    cache: torch.Tensor,
    metadata: AttentionMetadata,
    scoring: Scoring,
    window: int | None = None,
    launch: Launch = SMALL_TILES,
) -> torch.Tensor:
    """Run twice over one plan, as two layers do, into poisoned outputs."""
    query, cache, metadata, scoring = move_attention(device, query, cache, metadata, scoring)
    plan = plan_decodes(metadata, cache, query.dtype, window, launch)
    first, second = (torch.full(query.shape, torch.nan, dtype=query.dtype, device=device) for _ in range(2))
    run_decodes(first, query, cache, plan, scoring)
    run_decodes(second, query, cache, plan, scoring)
    torch.testing.assert_close(first, second, atol=0, rtol=0)
    return first.cpu()


def check(
    device: torch.device,
    query: torch.Tensor,
    cache: torch.Tensor,
    metadata: AttentionMetadata,
    scoring: Scoring,
    window: int | None = None,
    launch: Launch = SMALL_TILES,
) -> None:
    output = decode(device, query, cache, metadata, scoring, window, launch)
    assert output.dtype == query.dtype
    expected = dense_attention(query, cache, metadata, scoring, window)
    tolerance = TOLERANCES[query.dtype]
    torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)


CONTEXTS = {
    "one token": [1],
    "one block": [8],
    "one tile": [16],
    "a token past a tile": [17],
    "one request for all workers": [150],
    "one tile for each worker": [64],
    "mixed": [1, 150, 16, 3, 33],
    "long last": [5, 16, 8, 250],
    "more requests than workers": [7, 16, 1, 20, 40, 3, 9, 2, 31],
}


@pytest.mark.parametrize("window", [None, 1, 20], ids=lambda window: f"window-{window}")
@pytest.mark.parametrize("contexts", CONTEXTS.values(), ids=CONTEXTS)
def test_equals_dense_reference(device: torch.device, contexts: list[int], window: int | None) -> None:
    torch.manual_seed(0)
    inputs = example_inputs([1] * len(contexts), contexts, num_heads=6, num_kv_heads=2, block_size=8)
    check(device, *inputs, Scoring(0.3), window)


@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (5, 1), (20, 1), (8, 4)])
@pytest.mark.parametrize("head_dim", [16, 40])
def test_group_and_head_sizes(device: torch.device, num_heads: int, num_kv_heads: int, head_dim: int) -> None:
    torch.manual_seed(0)
    contexts = [90, 4, 17]
    inputs = example_inputs(
        [1] * 3, contexts, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, block_size=8
    )
    check(device, *inputs, Scoring(0.3))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_real_heads_with_real_launch_parameters(device: torch.device, head_dim: int) -> None:
    torch.manual_seed(0)
    query, cache, metadata = example_inputs(
        [1, 1], [300, 30], num_heads=4, num_kv_heads=1, head_dim=head_dim, block_size=16
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
    query, cache, metadata = example_inputs([1, 1, 1], [70, 16, 1], block_size=8)
    check(device, query.to(query_dtype), cache.to(cache_dtype), metadata, Scoring(0.3))


@pytest.mark.parametrize("query_dtype", [torch.float32, torch.float16])
def test_an_8_bit_cache_is_read_through_its_scales(device: torch.device, query_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query, cache, metadata = example_inputs([1, 1, 1], [70, 16, 1], block_size=8)
    cache = (cache / 0.02).to(torch.float8_e4m3fn)
    check(device, query.to(query_dtype), cache, metadata, Scoring(0.3, k_scale=0.02, v_scale=0.02))


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("has_alibi", [False, True])
def test_scores_can_be_biased_and_capped(
    device: torch.device, window: int | None, softcap: float, has_alibi: bool
) -> None:
    torch.manual_seed(0)
    inputs = example_inputs([1, 1, 1], [90, 2, 16], block_size=8)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625, 2.0, 0.0]) if has_alibi else None
    check(device, *inputs, Scoring(0.4, alibi_slopes=slopes, softcap=softcap), window)


@pytest.mark.parametrize("padding", [[True, False, False], [False, False, True], [True, True, True]])
def test_padding_is_finite_and_disturbs_nobody(device: torch.device, padding: list[bool]) -> None:
    torch.manual_seed(0)
    query, cache, metadata = example_inputs([1] * 3, [90, 33, 5], block_size=8)
    is_padding = torch.tensor(padding)
    contexts = metadata.seq_lens.masked_fill(is_padding, 0)
    # The table of a padding row may name any block: none is read.
    tables = metadata.block_tables.masked_fill(is_padding[:, None], 10_000)
    padded = replace(metadata, seq_lens=contexts, block_tables=tables, context_lens=tuple(contexts.tolist()))
    output = decode(device, query, cache, padded, Scoring(0.3))
    expected = dense_attention(query, cache, padded, Scoring(0.3))
    assert output.isfinite().all()
    torch.testing.assert_close(output[~is_padding].double(), expected[~is_padding], atol=1e-5, rtol=1e-5)


def test_entries_of_the_table_past_the_length_are_not_followed(device: torch.device) -> None:
    torch.manual_seed(0)
    query, cache, metadata = example_inputs([1, 1], [33, 150], block_size=8)
    tables = metadata.block_tables.clone()
    tables[0, 5:] = 10_000
    check(device, query, cache, replace(metadata, block_tables=tables), Scoring(0.3))


def test_blocks_behind_the_window_are_not_read(device: torch.device) -> None:
    torch.manual_seed(0)
    query, cache, metadata = example_inputs([1, 1], [33, 150], block_size=8)
    expected = dense_attention(query, cache, metadata, Scoring(0.3), window=20)
    tables = metadata.block_tables.clone()
    tables[1, : (150 - 20) // 8] = 10_000
    output = decode(device, query, cache, replace(metadata, block_tables=tables), Scoring(0.3), window=20)
    torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)


def test_tables_may_hold_32_bit_integers_and_queries_may_be_strided(device: torch.device) -> None:
    torch.manual_seed(0)
    query, cache, metadata = example_inputs([1, 1, 1], [70, 16, 1], block_size=8)
    narrow = replace(metadata, block_tables=metadata.block_tables.int(), seq_lens=metadata.seq_lens.int())
    fused = torch.cat((query, query.new_full((3, 4, 16), torch.nan)), dim=1)
    check(device, fused[:, :6], cache, narrow, Scoring(0.3))


def test_a_worker_gets_no_less_than_the_minimum(device: torch.device) -> None:
    torch.manual_seed(0)
    inputs = example_inputs([1, 1], [150, 30], block_size=8)
    check(device, *inputs, Scoring(0.3), launch=replace(SMALL_TILES, min_tiles=7))


def test_many_requests_leave_the_planner_few_workers_at_a_time(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(paged_decode, "PLANNED_ELEMENTS", 128)
    contexts = torch.randint(1, 40, (40,)).tolist()
    inputs = example_inputs([1] * 40, contexts, num_heads=1, num_kv_heads=1, block_size=8)
    check(device, *inputs, Scoring(0.3), launch=replace(SMALL_TILES, workers_per_multiprocessor=3))


def test_large_groups_are_combined_piece_by_piece(device: torch.device) -> None:
    torch.manual_seed(0)
    inputs = example_inputs([1, 1], [150, 40], num_heads=9, num_kv_heads=1, block_size=8)
    check(
        device, *inputs, Scoring(0.3), launch=replace(SMALL_TILES, workers_per_multiprocessor=3, combined_elements=128)
    )


@pytest.mark.parametrize("seed", range(3))
def test_random_batches(device: torch.device, seed: int) -> None:
    torch.manual_seed(seed)
    contexts = torch.randint(1, 140, (12,)).tolist()
    inputs = example_inputs([1] * 12, contexts, num_heads=4, num_kv_heads=1, block_size=16)
    check(device, *inputs, Scoring(0.3), launch=replace(SMALL_TILES, workers_per_multiprocessor=1 + seed))


@pytest.mark.parametrize("num_workers_per", [1, 2, 5])
def test_parts_of_workers_are_equal(device: torch.device, num_workers_per: int) -> None:
    torch.manual_seed(0)
    contexts = [1, 300, 17, 48, 90]
    query, cache, metadata = example_inputs([1] * 5, contexts, num_heads=2, num_kv_heads=1, block_size=8)
    query, cache, metadata, _ = move_attention(device, query, cache, metadata, Scoring(0.3))
    launch = replace(SMALL_TILES, workers_per_multiprocessor=num_workers_per)
    plan = plan_decodes(metadata, cache, query.dtype, launch=launch)
    tiles = [-(-context // plan.tile) for context in contexts]
    starts = [sum(tiles[:seq]) for seq in range(6)]
    num_workers = len(plan.first_seqs)
    per_worker = -(-sum(tiles) // num_workers)
    firsts = [sum(end <= worker * per_worker for end in starts[1:]) for worker in range(num_workers)]
    assert plan.tile_starts.tolist() == starts
    assert plan.first_seqs.tolist() == firsts
    assert not plan.arrivals.any()


def test_arguments_that_no_kernel_takes_are_refused(device: torch.device) -> None:
    query, cache, metadata = example_inputs([1], [5], block_size=8)
    with pytest.raises(ValueError, match="block size 4"):
        plan_decodes(metadata, cache[:, :, :4], query.dtype)
    with pytest.raises(ValueError, match="float64"):
        plan_decodes(metadata, cache, torch.float64)
    plan = plan_decodes(*move_attention(device, query, cache, metadata, Scoring(1.0))[2:0:-1], query.dtype)
    with pytest.raises(ValueError, match="do not fit"):
        run_decodes(query, query[:, :5], cache, plan, Scoring(1.0))
    with pytest.raises(ValueError, match="slopes"):
        run_decodes(query, query, cache, plan, Scoring(1.0, alibi_slopes=torch.ones(5)))


def test_every_variant_has_examples_to_compile() -> None:
    assert set(LAUNCH) == set(VARIANTS)
    assert all(compile_examples(variant) for variant in VARIANTS)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_full_size_batches_on_the_gpu(device: torch.device, head_dim: int, cache_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    contexts = [1, 16, 5000, 300, 64, 1023, 8192, 129]
    query, cache, metadata = example_inputs(
        [1] * 8, contexts, num_heads=32, num_kv_heads=8, head_dim=head_dim, block_size=16
    )
    query, cache, metadata, scoring = move_attention(device, query.bfloat16(), cache, metadata, Scoring(0.1))
    cache = cache.to(cache_dtype)
    output = run_attention(query, cache, plan_attention(metadata, cache, query.dtype), scale=scoring.scale)
    expected = dense_attention(query, cache, metadata, scoring)
    torch.testing.assert_close(output.cpu().double(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
def test_a_captured_plan_serves_other_lengths(device: torch.device) -> None:
    torch.manual_seed(0)
    query, cache, metadata = example_inputs([1] * 4, [2000, 3000, 1500, 4000], head_dim=64, block_size=16)
    query, cache, metadata, scoring = move_attention(device, query.bfloat16(), cache.bfloat16(), metadata, Scoring(0.1))
    blind = replace(metadata, context_lens=())

    def attend() -> torch.Tensor:
        return run_attention(query, cache, plan_attention(blind, cache, query.dtype), scale=scoring.scale)

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = attend()
    for contexts in ([1, 17, 0, 4000], [2000, 3000, 1500, 4000], [16, 1, 1, 1]):
        metadata.seq_lens.copy_(torch.tensor(contexts))
        graph.replay()
        expected = dense_attention(query, cache, replace(metadata, context_lens=tuple(contexts)), scoring)
        assert output.isfinite().all()
        is_used = torch.tensor(contexts) > 0
        torch.testing.assert_close(output.cpu().double()[is_used], expected[is_used], atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
def test_examples_compile_for_this_gpu(device: torch.device) -> None:
    major, minor = torch.cuda.get_device_capability()
    for example in compile_examples("hopper"):
        compile_example(example, 10 * major + minor)
