"""Draws follow the filtered distribution, and a draw depends on its own row, seed, index and position alone."""

import dataclasses

import pytest
import torch
from octavo_kernels.launch import VARIANTS
from octavo_kernels.ops import argmax, sample_tokens
from octavo_kernels.ops import filter_thresholds as thresholds
from octavo_kernels.ops.filter_thresholds import filter_thresholds
from octavo_kernels.ops.filter_thresholds import reference as kept_tokens_reference
from octavo_kernels.ops.sample_tokens import philox_reference, sample_rows, sample_rows_reference
from octavo_kernels.ops.sampling_tensors import SamplingTensors, example_inputs

HAS_GPU = torch.cuda.is_available()
DEVICE = "cuda" if HAS_GPU else "cpu"
# Weights far below the best's are exp2 of what overflows to -inf: 0, as they should be. numpy, the interpreter, warns.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in multiply:RuntimeWarning")

# Shares that no number of equally likely tokens meets exactly: there, rounding decides.
FILTERS = {
    "none": {},
    "top_k": {"top_k": 5},
    "top_k of all": {"top_k": 10**6},
    "top_p": {"top_p": 0.8931},
    "little top_p": {"top_p": 1e-6},
    "min_p": {"min_p": 0.1},
    "min_p of 1": {"min_p": 1.0},
    "top_k, top_p": {"top_k": 40, "top_p": 0.6173},
    "all": {"top_k": 50, "top_p": 0.8931, "min_p": 0.01},
    "hot": {"temperatures": 3.0, "top_p": 0.9871},
    "cold": {"temperatures": 1e-3, "top_k": 3, "top_p": 0.99, "min_p": 0.2},
}


@pytest.fixture(autouse=True)
def implementation() -> str:
    return "triton"


def sampling_of(num_rows: int, **fields: float | list[float] | torch.Tensor) -> SamplingTensors:
    """Temperature 1, no filters and seeds 0, 1, ... unless `fields` says otherwise."""

    def column(name: str, default: float, dtype: torch.dtype) -> torch.Tensor:
        value = torch.as_tensor(fields.pop(name, default), dtype=dtype, device=DEVICE)
        return value.expand(num_rows).contiguous()

    sampling = SamplingTensors(
        temperatures=column("temperatures", 1.0, torch.float32),
        top_k=column("top_k", 0, torch.int32),
        top_p=column("top_p", 1.0, torch.float32),
        min_p=column("min_p", 0.0, torch.float32),
        seeds=torch.as_tensor(fields.pop("seeds", torch.arange(num_rows)), device=DEVICE).expand(num_rows).contiguous(),
        indices=column("indices", 0, torch.int32),
        positions=column("positions", 0, torch.int32),
    )
    assert not fields
    return sampling


def rows_of(sampling: SamplingTensors, rows: list[int]) -> SamplingTensors:
    columns = {field.name: getattr(sampling, field.name)[rows] for field in dataclasses.fields(sampling)}
    return SamplingTensors(**columns)


# Several programs for a row; the interpreter takes seconds for a real model's.
LARGE_VOCAB = 32003 if HAS_GPU else 5003


def difficult_rows(vocab_size: int) -> dict[str, torch.Tensor]:
    normal = torch.randn(vocab_size)
    return {
        "random": normal * 3,
        "bfloat16, with ties": (normal * 3 + 20).bfloat16().float(),
        "coarse": normal.round(),
        "flat": torch.full((vocab_size,), -7.5),
        "peaked": torch.where(torch.arange(vocab_size) == vocab_size // 2, 50.0, normal),
        "ascending": torch.linspace(-9, 9, vocab_size),
        "zeros of both signs": torch.where(normal > 0, 0.0, -0.0),
        "tiny": normal * 1e-40,
        "mostly masked": torch.where(normal > 1, normal, -torch.inf),
        "mostly finfo.min": torch.where(normal > 1, normal, torch.finfo(torch.float32).min),
        "with NaN": torch.where(normal > 0, normal, torch.nan),
        "with inf": torch.where(normal > 2.5, torch.inf, normal),
        "nothing finite": torch.full((vocab_size,), -torch.inf),
    }


def chi_square(observed: torch.Tensor, expected: torch.Tensor) -> float:
    """In standard deviations above its mean."""
    possible = expected > 0
    assert not observed[~possible].any(), "a token that was filtered is drawn"
    freedom = int(possible.sum()) - 1
    statistic = ((observed - expected)[possible] ** 2 / expected[possible]).sum().item()
    return (statistic - freedom) / max(2 * freedom, 1) ** 0.5


def test_philox_gives_the_published_answers() -> None:
    # kat_vectors of Random123 (https://github.com/DEShawResearch/random123)
    cases = [
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (-1, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            0x299F31D0A4093822,
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for key, (c0, c1, c2, c3), expected in cases:
        words = philox_reference(torch.tensor(key), torch.tensor(c0), torch.tensor(c1), torch.tensor(c2), c3)
        assert words.tolist() == list(expected)


@pytest.mark.parametrize(("num_rows", "vocab_size"), [(0, 5), (6, 1), (24, 7), (12, 1000), (6, 5003)])
def test_draws_what_the_reference_draws(num_rows: int, vocab_size: int) -> None:
    torch.manual_seed(vocab_size)
    logits, sampling = example_inputs(num_rows, vocab_size, device=DEVICE)
    drawn = sample_rows(logits, sampling)
    assert drawn.dtype == torch.int64
    assert drawn.tolist() == sample_rows_reference(logits, sampling).tolist()


def test_draws_what_the_reference_draws_from_bfloat16_in_a_wider_matrix() -> None:
    torch.manual_seed(1)
    wide, sampling = example_inputs(12, 1100, device=DEVICE)
    wide[:, 1000:] = 1e9
    logits = wide.bfloat16()[:, :1000]
    assert sample_rows(logits, sampling).tolist() == sample_rows_reference(logits, sampling).tolist()


@pytest.mark.parametrize("kind", list(difficult_rows(1)))
def test_draws_what_the_reference_draws_from_difficult_rows(kind: str) -> None:
    torch.manual_seed(2)
    fields = [
        {"temperatures": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | each
        for each in (FILTERS["none"], FILTERS["all"])
    ]
    sampling = sampling_of(len(fields), **{name: [each[name] for each in fields] for name in fields[0]})
    logits = difficult_rows(700)[kind].to(DEVICE).expand(len(fields), -1).contiguous()
    assert sample_rows(logits, sampling).tolist() == sample_rows_reference(logits, sampling).tolist()


@pytest.mark.parametrize(
    ("vocab_size", "filters"),
    [
        *(
            pytest.param(size, filters, id=f"{size}-{name}")
            for size in (1, 7, 1000)
            for name, filters in FILTERS.items()
        ),
        *(pytest.param(LARGE_VOCAB, FILTERS[name], id=f"large-{name}") for name in ("top_k", "top_p", "all")),
    ],
)
def test_keeps_exactly_the_tokens_that_sorting_keeps(vocab_size: int, filters: dict[str, float]) -> None:
    torch.manual_seed(vocab_size)
    rows = difficult_rows(vocab_size)
    logits = torch.stack(list(rows.values())).to(DEVICE)
    sampling = sampling_of(len(rows), **filters)
    is_kept = logits >= filter_thresholds(logits, sampling)[:, None]
    expected = kept_tokens_reference(logits, sampling)
    # A token without weight, such as NaN, cannot be drawn, whether it is kept or not.
    possible = logits > -torch.inf
    differences = ((is_kept != expected) & possible).sum(dim=1).tolist()
    assert dict(zip(rows, differences, strict=True)) == dict.fromkeys(rows, 0)


def test_filters_apply_in_order() -> None:
    weights = torch.tensor([0.4, 0.2, 0.2, 0.1, 0.06, 0.04], device=DEVICE)
    kept = {
        "top-k keeps equals": ({"top_k": 2}, 3),
        "top-k off": ({"top_k": 0, "top_p": 0.99}, 6),
        "top-p crosses": ({"top_p": 0.85}, 4),
        "top-p of what top-k kept": ({"top_k": 4, "top_p": 0.85}, 3),  # 0.8 of 0.9
        "min-p of the best": ({"min_p": 0.24}, 4),
        "min-p after top-p": ({"top_p": 0.85, "min_p": 0.3}, 3),
        "min-p leaves top-p's share alone": ({"top_k": 4, "top_p": 0.95, "min_p": 0.3}, 3),
        "temperature first": ({"temperatures": 0.5, "top_p": 0.7}, 3),  # 0.16 of 0.2652 is 0.6
        "the best always": ({"top_p": 1e-9, "min_p": 1.0}, 1),
    }
    for name, (filters, count) in kept.items():
        sampling = sampling_of(1, **filters)
        logits = weights.log()[None]
        assert (logits >= filter_thresholds(logits, sampling)[:, None]).sum().item() == count, name
        assert kept_tokens_reference(logits, sampling).sum().item() == count, name


@pytest.mark.parametrize("filters", FILTERS.values(), ids=list(FILTERS))
def test_draws_follow_the_filtered_distribution(filters: dict[str, float]) -> None:
    """By the reference where there is no GPU: the kernel draws the same, and the interpreter is slow."""
    count = 20_000
    torch.manual_seed(3)
    logits = (torch.randn(50, device=DEVICE) * 2).expand(count, -1)
    sampling = sampling_of(count, **filters)
    drawn = sample_rows(logits, sampling) if HAS_GPU else sample_rows_reference(logits, sampling)
    kept = kept_tokens_reference(logits[:1], rows_of(sampling, [0]))[0]
    scores = (logits[0].double() / sampling.temperatures[0].double()).masked_fill(~kept, -torch.inf)
    assert chi_square(drawn.bincount(minlength=50), scores.softmax(dim=0) * count) < 4


@pytest.mark.parametrize("varied", ["seeds", "indices", "positions"])
def test_draws_of_a_flat_row_are_uniform_whichever_number_changes(varied: str) -> None:
    count, vocab_size = 20_000, 300
    numbers = torch.arange(count)
    sampling = sampling_of(count, **{"seeds": torch.tensor(7), varied: numbers})
    logits = torch.zeros(1, vocab_size, device=DEVICE).expand(count, -1)
    drawn = sample_rows(logits, sampling) if HAS_GPU else sample_rows_reference(logits, sampling)
    expected = torch.full((vocab_size,), count / vocab_size, dtype=torch.float64, device=DEVICE)
    assert chi_square(drawn.bincount(minlength=vocab_size), expected) < 4
    pairs = (drawn[1:] * vocab_size + drawn[:-1]).bincount(minlength=vocab_size**2)  # neighbours are independent
    assert chi_square(pairs, torch.full_like(pairs, (count - 1) / vocab_size**2, dtype=torch.float64)) < 4


def test_a_draw_does_not_depend_on_the_batch() -> None:
    torch.manual_seed(4)
    logits, sampling = example_inputs(12, 700, device=DEVICE)
    together = sample_rows(logits, sampling).tolist()
    for rows in ([11], [5, 4, 3], list(range(11, -1, -2))):
        assert sample_rows(logits[rows], rows_of(sampling, rows)).tolist() == [together[row] for row in rows]


def test_a_draw_does_not_depend_on_the_number_of_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(5)
    logits, sampling = example_inputs(6, 2100, device=DEVICE)
    split = sample_rows(logits, sampling).tolist()
    monkeypatch.setattr(argmax, "_NUM_PROGRAMS", 1)
    assert sample_rows(logits, sampling).tolist() == split


def test_the_promise_of_no_filters_changes_nothing() -> None:
    torch.manual_seed(6)
    logits, _ = example_inputs(8, 3000, device=DEVICE)
    sampling = sampling_of(8, temperatures=[0.0, 1.0] * 4)
    assert sample_rows(logits, sampling, any_filters=False).tolist() == sample_rows(logits, sampling).tolist()


def test_seed_index_and_position_each_change_the_draw() -> None:
    logits = torch.zeros(6, 3000, device=DEVICE)
    sampling = sampling_of(
        6,
        seeds=torch.tensor([42, 43, 42 + 2**40, -1, 42, 42]),
        indices=[0, 0, 0, 0, 1, 0],
        positions=[9, 9, 9, 9, 9, 10],
    )
    assert len(set(sample_rows(logits, sampling).tolist())) == 6


@pytest.mark.parametrize("filters", [{}, {"top_k": 50, "top_p": 0.95}], ids=["unfiltered", "filtered"])
@pytest.mark.parametrize("temperature", [0.0, 1e-38, 1e-6, 1e-3])
def test_a_tiny_temperature_is_greedy(temperature: float, filters: dict[str, float]) -> None:
    torch.manual_seed(7)
    logits = torch.randn(4, 300, device=DEVICE) * 3
    best = logits.argmax(dim=1)
    logits.scatter_(1, best[:, None], logits.amax(dim=1, keepdim=True) + 0.1)
    assert sample_rows(logits, sampling_of(4, temperatures=temperature, **filters)).tolist() == best.tolist()


def test_top_k_of_one_is_greedy_even_among_equals() -> None:
    logits = torch.zeros(8, 100, device=DEVICE)
    logits[:, [30, 60]] = 1
    assert sample_rows(logits, sampling_of(8, temperatures=5.0, top_k=1)).tolist() == [30] * 8


@pytest.mark.parametrize("filters", FILTERS.values(), ids=list(FILTERS))
def test_never_draws_what_is_forbidden(filters: dict[str, float]) -> None:
    logits = torch.full((8, 5000), -torch.inf, device=DEVICE)
    logits[4:] = torch.nan
    survivors = [0, 63, 64, 4999, 1, 2047, 2048, 4000]
    logits[range(8), survivors] = torch.tensor([-1e30, 0.0, 5.0, 1e30] * 2, device=DEVICE)
    assert sample_rows(logits, sampling_of(8, **filters)).tolist() == survivors


def test_a_row_without_any_finite_logit_gives_token_0() -> None:
    logits = torch.full((3, 300), -torch.inf, device=DEVICE)
    sampling = sampling_of(3, temperatures=[0.0, 1.0, 1.0], top_p=[1.0, 1.0, 0.5])
    assert sample_rows(logits, sampling).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "change", [{"top_k": torch.zeros(2).long()}, {"seeds": torch.zeros(3).long()}, {"min_p": torch.zeros(4)[::2]}]
)
def test_rejects_other_parameters(change: dict[str, torch.Tensor]) -> None:
    sampling = dataclasses.replace(sampling_of(2), **change)
    with pytest.raises(ValueError, match=next(iter(change))):
        sample_rows(torch.zeros(2, 10, device=DEVICE), sampling)


@pytest.mark.parametrize("module", [sample_tokens, thresholds])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_has_launch_parameters(variant: str, module) -> None:
    assert module.compile_examples(variant)


class TestAtFullSize:
    """512 rows of 128256 logits."""

    pytestmark = pytest.mark.gpu

    @pytest.mark.parametrize("spread", [0.3, 3.0])
    def test_keeps_what_sorting_keeps_but_for_rounding(self, spread: float) -> None:
        torch.manual_seed(8)
        logits = torch.randn(512, 128256, device=DEVICE) * spread
        _, sampling = example_inputs(512, 1, device=DEVICE)
        is_kept = logits >= filter_thresholds(logits, sampling)[:, None]
        for rows in torch.arange(512, device=DEVICE).split(64):
            part = rows_of(sampling, rows.tolist())
            expected = kept_tokens_reference(logits[rows], part)
            weights = (logits[rows].double() / part.temperatures.double()[:, None].clamp(min=1e-6)).softmax(dim=1)
            is_random = (part.temperatures > 0)[:, None]
            difference = (weights * ((is_kept[rows] != expected) & is_random)).sum(dim=1)
            assert difference.max().item() < 1e-5

    def test_draws_the_same_in_a_graph_with_other_parameters(self) -> None:
        torch.manual_seed(9)
        logits, sampling = example_inputs(512, 128256, device=DEVICE)
        sample_rows(logits, sampling)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            drawn = sample_rows(logits, sampling)
        for field in dataclasses.fields(sampling):
            column = getattr(sampling, field.name)
            column.copy_(column.roll(1))
        graph.replay()
        assert torch.equal(drawn, sample_rows(logits, sampling))

    def test_a_row_alone_draws_what_it_draws_among_511_others(self) -> None:
        torch.manual_seed(10)
        logits, sampling = example_inputs(512, 128256, device=DEVICE)
        together = sample_rows(logits, sampling)
        for row in (0, 1, 2, 3, 4, 5, 511):
            alone = sample_rows(logits[row : row + 1], rows_of(sampling, [row]))
            assert alone.item() == together[row].item()
