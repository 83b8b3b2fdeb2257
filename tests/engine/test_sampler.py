"""Sampling: each parameter does what the APIs that define it say, and a draw depends on its own sequence alone."""

import numpy as np
import pytest
import torch
from octavo_engine.protocol import SamplingParams
from octavo_engine.request import Request
from octavo_engine.sampler import Sampler, pick_logprobs
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

VOCAB_SIZE = 1000
EOS = 7


def make_request(params: SamplingParams, prompt: list[int] | None = None, output: list[int] | None = None, **fields):
    prompt, output = prompt or [1, 2, 3], output or []
    return Request("r", fields.pop("index", 0), prompt + output, len(prompt), params, fields.pop("seed", 0), 0.0)


def sample(logits: torch.Tensor, *requests: Request) -> list[int]:
    return Sampler([EOS]).sample(logits.clone(), requests).tolist()


def draws(logits: torch.Tensor, params: SamplingParams, count: int) -> np.ndarray:
    """How often each token is drawn by `count` sequences that differ in their seed."""
    requests = [make_request(params, seed=seed) for seed in range(count)]
    return np.bincount(sample(logits.expand(count, -1), *requests), minlength=logits.shape[-1])


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(1, VOCAB_SIZE, generator=torch.Generator().manual_seed(0)) * 3


def test_temperature_zero_takes_the_likeliest(logits) -> None:
    assert sample(logits, make_request(SamplingParams(temperature=0))) == [logits.argmax().item()]


@pytest.mark.parametrize(
    ("params", "warpers"),
    [
        pytest.param(SamplingParams(temperature=1.0), [], id="plain"),
        pytest.param(SamplingParams(temperature=0.5), [TemperatureLogitsWarper(0.5)], id="temperature"),
        pytest.param(SamplingParams(top_k=5), [TopKLogitsWarper(5)], id="top_k"),
        pytest.param(SamplingParams(top_p=0.7), [TopPLogitsWarper(0.7)], id="top_p"),
        pytest.param(SamplingParams(min_p=0.2), [MinPLogitsWarper(0.2)], id="min_p"),
        pytest.param(
            SamplingParams(temperature=2.0, top_k=20, top_p=0.8),
            [TemperatureLogitsWarper(2.0), TopKLogitsWarper(20), TopPLogitsWarper(0.8)],
            id="all",
        ),
        pytest.param(
            SamplingParams(temperature=2.0, top_p=0.99),
            [TemperatureLogitsWarper(2.0), TopPLogitsWarper(0.99)],
            id="flat, so that the whole vocabulary is sorted",
        ),
    ],
)
def test_draws_follow_the_filtered_distribution(logits, params, warpers) -> None:
    scores = logits.double()
    for warper in warpers:
        scores = warper(torch.tensor([[1, 2, 3]]), scores)
    expected = scores.softmax(dim=-1)[0].numpy()
    count = 4000
    observed = draws(logits, params, count)
    assert not observed[expected == 0].any(), "a filtered token was drawn"
    # Each token's count is binomial; five standard deviations of the largest leave no room for a wrong weight.
    bound = 5 * np.sqrt(count * expected * (1 - expected)) + 5
    assert (np.abs(observed - count * expected) < bound).all()


def test_a_tiny_temperature_is_greedy(logits) -> None:
    assert sample(logits, make_request(SamplingParams(temperature=1e-6))) == [logits.argmax().item()]


def test_a_draw_depends_on_seed_index_and_position_only(logits) -> None:
    params = SamplingParams(temperature=2.0)
    mine = make_request(params, seed=42)
    alone = sample(logits, mine)
    others = [make_request(SamplingParams(temperature=1.5, top_k=3), seed=seed) for seed in range(7)]
    greedy = make_request(SamplingParams(temperature=0))
    crowd = sample(
        torch.randn(9, VOCAB_SIZE).index_copy(0, torch.tensor([4]), logits), *others[:4], mine, *others[4:], greedy
    )
    assert crowd[4] == alone[0]
    variants = {
        "seed": make_request(params, seed=43),
        "index": make_request(params, seed=42, index=1),
        "position": make_request(params, output=[5], seed=42),
    }
    flat = torch.zeros(1, 100_000)
    base = sample(flat, mine)
    assert all(sample(flat, each) != base for each in variants.values())


def test_repetition_penalty_is_that_of_transformers(logits) -> None:
    prompt, output = [1, 2, 3, 2], [4, 4, 500]
    request = make_request(SamplingParams(temperature=0, repetition_penalty=1.7), prompt, output)
    row = logits.clone()
    Sampler([EOS]).sample(row, [request])
    expected = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + output]), logits.clone())
    torch.testing.assert_close(row, expected)


def test_presence_and_frequency_count_generated_tokens_only(logits) -> None:
    params = SamplingParams(temperature=0, presence_penalty=0.5, frequency_penalty=0.25)
    row = logits.clone()
    Sampler([EOS]).sample(row, [make_request(params, [1, 1, 9], [4, 4, 9])])
    expected = logits.clone()
    expected[0, 4] -= 0.5 + 2 * 0.25
    expected[0, 9] -= 0.5 + 0.25
    torch.testing.assert_close(row, expected)


def test_logit_bias_and_min_tokens(logits) -> None:
    assert sample(logits, make_request(SamplingParams(temperature=0, logit_bias={123: 100.0}))) == [123]
    eager = logits.clone()
    eager[0, EOS] = 50
    assert sample(eager, make_request(SamplingParams(temperature=0))) == [EOS]
    assert sample(eager, make_request(SamplingParams(temperature=0, min_tokens=1))) != [EOS]
    assert sample(eager, make_request(SamplingParams(temperature=0, min_tokens=1), output=[5])) == [EOS]


def test_logprobs_are_log_softmax_and_sorted(logits) -> None:
    (result,) = pick_logprobs(logits.log_softmax(dim=-1), torch.tensor([17]), 3).read([3])
    expected = logits.log_softmax(dim=-1)[0]
    assert result.token_id == 17
    assert result.logprob == pytest.approx(expected[17].item())
    assert [token_id for token_id, _ in result.top] == expected.topk(3).indices.tolist()


@pytest.mark.parametrize("temperature", [1e-30, 1e-300, 1e-308, 5e-324])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}], ids=str)
def test_a_tiny_temperature_draws_the_likeliest(logits, temperature: float, filters: dict) -> None:
    params = SamplingParams(temperature=temperature, seed=1, **filters)
    assert sample(logits, make_request(params)) == sample(logits, make_request(SamplingParams(temperature=0)))
