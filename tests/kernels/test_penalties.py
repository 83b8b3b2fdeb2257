"""Penalties, bias and forbidden tokens touch what they name in the rows that ask, and nothing else."""

from collections import Counter

import numpy as np
import pytest
import torch
from octavo_kernels.launch import VARIANTS
from octavo_kernels.ops.penalties import (
    TokenTables,
    add_logit_bias_,
    add_logit_bias_reference,
    add_output_tokens,
    add_output_tokens_reference,
    add_prompt_tokens,
    allocate_tables,
    apply_penalties_,
    apply_penalties_reference,
    compile_examples,
    example_inputs,
    forbid_tokens_,
    reset_slot,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCES = {torch.float32: {"rtol": 1e-6, "atol": 1e-6}, torch.bfloat16: {"rtol": 8e-3, "atol": 8e-3}}


@pytest.fixture(autouse=True)
def implementation() -> str:
    return "triton"


def integers(values: list[int] | list[list[int]], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def floats(values: list[float] | list[list[float]]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32, device=DEVICE)


def tables_of(prompts: list[list[int]], outputs: list[list[int]], vocab_size: int) -> TokenTables:
    tables = allocate_tables(len(prompts), vocab_size, DEVICE)
    for slot, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        add_prompt_tokens(tables, slot, integers(prompt, torch.int64))
        add_output_tokens(tables, integers([slot] * len(output)), integers(output, torch.int64))
    return tables


def penalise_with_numpy(
    row: np.ndarray, prompt: list[int], output: list[int], repetition: float, presence: float, frequency: float
) -> np.ndarray:
    row = row.astype(np.float64)
    for token in {*prompt, *output}:
        row[token] = row[token] / repetition if row[token] > 0 else row[token] * repetition
    for token, count in Counter(output).items():
        row[token] -= presence + frequency * count
    return row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [1, 7, 33, 3001])
def test_penalties_are_those_of_numpy(vocab_size: int, dtype: torch.dtype) -> None:
    generator = np.random.default_rng(vocab_size)
    prompts = [generator.integers(vocab_size, size=size).tolist() for size in (1, 40, 40, 3, 40)]
    outputs = [generator.integers(vocab_size, size=size).tolist() for size in (0, 60, 1, 60, 60)]
    repetition, presence, frequency = [1.0, 1.7, 0.6, 1.0, 1.2], [0.5, 0.4, 0.0, -0.3, 2.0], [0.2, 0.1, 0.0, 0.7, -0.5]
    slots = [3, 0, 4, 2, 1]
    logits = torch.from_numpy(generator.normal(size=(5, vocab_size)) * 3).to(DEVICE, dtype)
    expected = [
        penalise_with_numpy(row, prompts[slot], outputs[slot], *penalties)
        for row, slot, *penalties in zip(
            logits.double().cpu().numpy(), slots, repetition, presence, frequency, strict=True
        )
    ]
    arguments = (
        tables_of(prompts, outputs, vocab_size),
        integers(slots),
        floats(repetition),
        floats(presence),
        floats(frequency),
    )
    reference = apply_penalties_reference(logits, *arguments)
    apply_penalties_(logits, *arguments)
    torch.testing.assert_close(logits.double().cpu(), torch.from_numpy(np.stack(expected)), **TOLERANCES[dtype])
    torch.testing.assert_close(logits, reference, **TOLERANCES[dtype])


def test_example_rows_agree_with_the_reference() -> None:
    torch.manual_seed(0)
    logits, *arguments = example_inputs(6, 1000, device=DEVICE.type)
    expected = apply_penalties_reference(logits, *arguments)
    apply_penalties_(logits, *arguments)
    torch.testing.assert_close(logits, expected)


def test_neutral_and_padded_rows_stay_as_they_are() -> None:
    tables = tables_of([[1, 2, 3]], [[3, 3, 4]], 100)
    logits = torch.randn(3, 100, device=DEVICE)
    logits[:, 5] = torch.nan
    before = logits.clone()
    apply_penalties_(logits, tables, integers([0, -1, 0]), floats([1, 2, 1]), floats([0, 1, 0]), floats([0, 1, 0.0]))
    assert torch.equal(logits.nan_to_num(9), before.nan_to_num(9))


def test_penalties_leave_forbidden_tokens_forbidden_and_what_lies_beyond_a_row_alone() -> None:
    wide = torch.full((2, 64), 9.0, device=DEVICE)
    logits = wide[:, :40]
    logits[:, 3] = -torch.inf
    tables = tables_of([list(range(40))], [[3]], 40)
    apply_penalties_(logits, tables, integers([0, 0]), floats([3, 0.5]), floats([1, -1]), floats([0, 0]))
    assert logits[:, 3].tolist() == [-torch.inf] * 2
    assert (wide[:, 40:] == 9).all()
    assert logits[:, 0].tolist() == [3.0, 18.0]


def test_the_prompt_mask_has_a_bit_for_each_token() -> None:
    tables = allocate_tables(2, 70, DEVICE)
    add_prompt_tokens(tables, 1, integers([0, 31, 31], torch.int64))
    add_prompt_tokens(tables, 1, integers([32, 69, 0], torch.int64))
    words = [word % 2**32 for word in tables.prompt_mask[1].tolist()]
    assert words == [1 | 1 << 31, 1, 1 << 5]
    assert not tables.prompt_mask[0].any()


def test_counts_each_generated_token_and_skips_padding() -> None:
    slots, tokens = [0, 1, 1, -1, 0, 1, 1], [5, 5, 5, 5, -1, 6, 5]
    counted = [allocate_tables(2, 10, DEVICE) for _ in range(2)]
    add_output_tokens(counted[0], integers(slots), integers(tokens, torch.int64))
    add_output_tokens_reference(counted[1], integers(slots), integers(tokens, torch.int64))
    expected = torch.zeros(2, 10, dtype=torch.int32, device=DEVICE)
    expected[0, 5], expected[1, 5], expected[1, 6] = 1, 3, 1
    assert all(torch.equal(tables.output_counts, expected) for tables in counted)


def test_counts_more_tokens_than_one_program_takes() -> None:
    torch.manual_seed(1)
    tables = allocate_tables(3, 50, DEVICE)
    slots = torch.randint(-1, 3, (5000,), dtype=torch.int32, device=DEVICE)
    tokens = torch.randint(50, (5000,), device=DEVICE)
    add_output_tokens(tables, slots, tokens)
    assert tables.output_counts.sum(dim=1).tolist() == [int((slots == slot).sum()) for slot in range(3)]


def test_a_reset_slot_has_seen_nothing_and_the_others_keep_theirs() -> None:
    tables = tables_of([[1], [2]], [[3], [4]], 40)
    reset_slot(tables, 0)
    assert not tables.prompt_mask[0].any()
    assert not tables.output_counts[0].any()
    assert tables.prompt_mask[1].any()
    assert tables.output_counts[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bias_is_added_to_its_tokens_alone(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    logits = torch.randn(3, 50, device=DEVICE).to(dtype)
    rows, token_ids, bias = integers([0, 2, 0, 0]), integers([0, 3, 49, 7]), floats([1.5, -torch.inf, -100, 0.25])
    expected = add_logit_bias_reference(logits, rows, token_ids, bias)
    by_hand = logits.clone()
    by_hand[0, [0, 49, 7]] += bias[[0, 2, 3]].to(dtype)
    by_hand[2, 3] = -torch.inf
    add_logit_bias_(logits, rows, token_ids, bias)
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(logits, by_hand)


def test_a_bias_of_more_entries_than_one_program_takes() -> None:
    logits = torch.zeros(3, 3000, device=DEVICE)
    token_ids = torch.arange(3000, dtype=torch.int32, device=DEVICE)
    add_logit_bias_(logits, torch.ones_like(token_ids), token_ids, token_ids.float())
    assert torch.equal(logits[1], token_ids.float())
    assert not logits[[0, 2]].any()


def test_forbidden_tokens_are_impossible_and_the_others_unchanged() -> None:
    torch.manual_seed(3)
    logits = torch.randn(2, 50, device=DEVICE)
    expected = logits.clone()
    expected[0, [0, 49]] = -torch.inf
    logits[0, 49] = torch.nan
    forbid_tokens_(logits, integers([0, 0, 0]), integers([49, 0, 0]))
    assert torch.equal(logits, expected)


def test_tokens_outside_the_vocabulary_touch_no_other_row() -> None:
    outside = [10, 13, -1, -2147483648, 2147483647]
    rows, token_ids = integers([1] * 5), integers(outside)
    logits = torch.ones(3, 10, device=DEVICE)
    forbid_tokens_(logits, rows, token_ids)
    add_logit_bias_(logits, rows, token_ids, floats([1.0] * 5))
    assert (logits == 1).all()
    assert (add_logit_bias_reference(logits, rows, token_ids, floats([1.0] * 5)) == 1).all()
    tables = allocate_tables(3, 10, DEVICE)
    add_output_tokens(tables, rows, token_ids.long())
    add_output_tokens_reference(tables, rows, token_ids.long())
    assert not tables.output_counts.any()


def test_an_empty_list_or_batch_changes_nothing() -> None:
    logits = torch.ones(2, 5, device=DEVICE)
    forbid_tokens_(logits, integers([]), integers([]))
    add_logit_bias_(logits, integers([]), integers([]), floats([]))
    assert (logits == 1).all()
    nothing = floats([])
    apply_penalties_(logits[:0], allocate_tables(1, 5, DEVICE), integers([]), nothing, nothing, nothing)


def test_rejects_arguments_of_other_shapes_and_types() -> None:
    logits, ones = torch.zeros(2, 10, device=DEVICE), floats([1, 1])
    tables = allocate_tables(2, 11, DEVICE)
    with pytest.raises(ValueError, match="11 tokens"):
        apply_penalties_(logits, tables, integers([0, 1]), ones, ones, ones)
    tables = allocate_tables(2, 10, DEVICE)
    with pytest.raises(ValueError, match="presence"):
        apply_penalties_(logits, tables, integers([0, 1]), ones, ones[:1], ones)
    with pytest.raises(ValueError, match="token_ids"):
        add_output_tokens(tables, integers([0, 1]), integers([0, 1]))
    with pytest.raises(ValueError, match="bias"):
        add_logit_bias_(logits, integers([0]), integers([1]), ones)
    with pytest.raises(ValueError, match="token_ids"):
        forbid_tokens_(logits, integers([0]), integers([1], torch.int64))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_has_launch_parameters(variant: str) -> None:
    assert compile_examples(variant)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_the_reference_at_full_size(dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    logits, *arguments = example_inputs(512, 128256, device="cuda")
    logits = logits.to(dtype)
    for rows in torch.arange(512, device=DEVICE).split(32):
        tables, *columns = arguments
        part = logits[rows]
        apply_penalties_(part, tables, *(column[rows] for column in columns))
        expected = apply_penalties_reference(logits[rows], tables, *(column[rows] for column in columns))
        torch.testing.assert_close(part, expected, **TOLERANCES[dtype])
