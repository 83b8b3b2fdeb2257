"""The largest logit of a row, wherever it lies and however the row is split."""

import pytest
import torch
from octavo_kernels.launch import VARIANTS
from octavo_kernels.ops import argmax
from octavo_kernels.ops.argmax import argmax_rows, argmax_rows_reference, compile_examples, example_inputs, split_rows

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def implementation() -> str:
    return "triton"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_rows", "vocab_size"), [(0, 7), (1, 1), (3, 7), (2, 1000), (2, 2048), (3, 32003)])
def test_agrees_with_torch(num_rows: int, vocab_size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = example_inputs(num_rows, vocab_size, device=DEVICE).to(dtype)
    tokens = argmax_rows(logits)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == argmax_rows_reference(logits).tolist()
    assert torch.equal(logits.float().gather(1, tokens[:, None])[:, 0], logits.float().amax(dim=1))


def test_takes_the_lowest_of_equals() -> None:
    logits = torch.zeros(4, 5000, device=DEVICE)
    logits[1, [4999, 2047, 2049]] = 1
    logits[2] = -torch.inf
    logits[3, 1::2] = -0.0
    logits[3, 0] = -0.0
    assert argmax_rows(logits).tolist() == argmax_rows_reference(logits).tolist() == [0, 2047, 0, 0]


def test_nan_never_wins_and_infinity_does() -> None:
    logits = torch.full((4, 3000), torch.nan, device=DEVICE)
    logits[1, 2999] = -1e30
    logits[2, 5] = -torch.inf
    logits[3, [7, 2500]] = torch.tensor([torch.finfo(torch.float32).max / 2, torch.inf], device=DEVICE)
    expected = [0, 2999, 0, 2500]
    assert argmax_rows(logits).tolist() == expected
    assert argmax_rows_reference(logits).tolist() == expected


def test_reads_rows_of_a_wider_matrix() -> None:
    torch.manual_seed(1)
    wide = example_inputs(3, 1100, device=DEVICE)
    wide[:, 1000:] = 1e9
    assert argmax_rows(wide[:, :1000]).tolist() == wide[:, :1000].argmax(dim=1).tolist()


def test_the_number_of_splits_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    logits = example_inputs(2, 10_000, device=DEVICE).bfloat16()  # with ties
    split = argmax_rows(logits).tolist()
    monkeypatch.setattr(argmax, "_NUM_PROGRAMS", 1)
    assert split_rows(2, 10_000, 2048) == (1, 5)
    assert argmax_rows(logits).tolist() == split


@pytest.mark.parametrize("num_rows", [1, 7, 64, 512, 5000])
@pytest.mark.parametrize("vocab_size", [1, 32003, 128256, 262144])
def test_splits_cover_a_row_and_one_row_uses_many(num_rows: int, vocab_size: int) -> None:
    num_splits, tiles_per_split = split_rows(num_rows, vocab_size, 2048)
    assert (num_splits - 1) * tiles_per_split * 2048 < vocab_size <= num_splits * tiles_per_split * 2048
    assert num_splits == -(-vocab_size // 2048) or num_rows * num_splits >= 1024


@pytest.mark.parametrize(
    "logits",
    [torch.zeros(3), torch.zeros(3, 0), torch.zeros(3, 4).double(), torch.zeros(4, 3).T],
    ids=["one dimension", "no vocabulary", "float64", "transposed"],
)
def test_rejects_other_logits(logits: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="logits"):
        argmax_rows(logits)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_has_launch_parameters(variant: str) -> None:
    assert compile_examples(variant)


@pytest.mark.gpu
@pytest.mark.parametrize("num_rows", [1, 64, 512])
def test_agrees_with_torch_at_full_size(num_rows: int) -> None:
    torch.manual_seed(3)
    logits = example_inputs(num_rows, 128256, device="cuda").bfloat16()
    assert torch.equal(argmax_rows(logits), argmax_rows_reference(logits))
