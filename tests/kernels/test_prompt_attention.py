"""Prompts that cuDNN attends to, among decodes and chunks that it does not."""

import pytest
import torch
from attention_reference import dense_attention, move_attention
from octavo_kernels.ops import prompt_attention
from octavo_kernels.ops.attention_metadata import AttentionMetadata, Scoring
from octavo_kernels.ops.paged_attention import example_inputs, run_attention
from octavo_kernels.ops.paged_attention_triton import plan_triton_attention
from octavo_kernels.ops.prompt_attention import PromptRows, find_prompts

CACHE = torch.zeros(1, 2, 16, 2, 64, dtype=torch.bfloat16)


def new_keys_and_values(cache: torch.Tensor, metadata: AttentionMetadata) -> tuple[torch.Tensor, torch.Tensor]:
    """What the cache holds of this step."""
    block_size = cache.shape[2]
    kv = cache[metadata.slot_mapping // block_size, :, metadata.slot_mapping % block_size]
    return kv[:, 0], kv[:, 1]


def test_takes_whole_granules_of_prompts_from_their_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_attention, "VARIANTS", {"generic"})
    lens, contexts = (1, 2500, 1024, 1023, 4096, 5000), (9, 2500, 1024, 1023, 4097, 5000)
    found = find_prompts(CACHE, torch.bfloat16, lens, contexts)
    assert found == [None, PromptRows(1, 2048), PromptRows(2501, 1024), None, None, PromptRows(8644, 4096)]


@pytest.mark.parametrize(
    ("cache", "dtype"),
    [
        (CACHE.float(), torch.float32),
        (CACHE.to(torch.float8_e4m3fn), torch.bfloat16),
        (torch.zeros(1, 2, 16, 2, 256, dtype=torch.bfloat16), torch.bfloat16),
    ],
)
def test_leaves_the_rest_to_the_paged_kernels(
    monkeypatch: pytest.MonkeyPatch, cache: torch.Tensor, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(prompt_attention, "VARIANTS", {"generic"})
    assert find_prompts(cache, dtype, [2048], [2048]) == [None]


def test_scores_that_are_more_than_scaled_are_not_plain() -> None:
    assert Scoring(0.3).is_plain
    assert not Scoring(0.3, softcap=30.0).is_plain
    assert not Scoring(0.3, alibi_slopes=torch.ones(2)).is_plain
    assert not Scoring(0.3, v_scale=2.0).is_plain


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("lens", "contexts"),
    [
        ([1, 1, 2100, 40, 1024], [70, 3000, 2100, 90, 1024]),
        ([1024], [1024]),
        ([1, 3072, 1500], [1, 3072, 1500]),
    ],
)
def test_equals_the_reference(lens: list[int], contexts: list[int], head_dim: int) -> None:
    torch.manual_seed(0)
    example = example_inputs(lens, contexts, num_heads=8, num_kv_heads=2, head_dim=head_dim, block_size=16)
    device, scoring = torch.device("cuda"), Scoring(head_dim**-0.5)
    query, cache, metadata, scoring = move_attention(
        device, example[0].bfloat16(), example[1].bfloat16(), example[2], scoring
    )
    plan = plan_triton_attention(metadata, cache, query.dtype)
    assert plan.prompts
    new_kv = new_keys_and_values(cache, metadata)
    output = run_attention(query, cache, plan, scale=scoring.scale, new_kv=new_kv).cpu()
    expected = dense_attention(query, cache, metadata, scoring, None)
    torch.testing.assert_close(output.double(), expected.cpu(), atol=2e-2, rtol=2e-2)
