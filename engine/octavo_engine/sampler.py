"""From logits to tokens: penalties, temperature, filters, and one draw per sequence.

A sequence's draw depends on its seed, its index and its position alone, never on what else is in the batch: the random
number is a hash of the three, and the token is where it falls in the cumulative distribution. Only the rows that ask
for something are touched by it; a batch of greedy requests is one argmax. A GPU has a sampler of its own
(`gpu_sampler.py`), which draws other numbers: a seed repeats on the same kind of device.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from octavo_engine.protocol import SamplingParams, TokenLogprobs
from octavo_engine.request import Request

Words = np.ndarray[Any, np.dtype[np.uint64]]
Floats = np.ndarray[Any, np.dtype[np.float64]]

Draw = Callable[[torch.Tensor, Sequence[Request]], torch.Tensor]

# A top-p filter first looks at this many of the likeliest tokens; only a flatter distribution is sorted whole.
NUM_LIKELIEST: Final = 256


class Sampler:
    """Samples for the sequences of one step. `eos_token_ids` end a sequence, so `min_tokens` suppresses them."""

    def __init__(self, eos_token_ids: Sequence[int]) -> None:
        self._eos_token_ids = tuple(eos_token_ids)

    def sample(self, logits: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
        """One token for each sequence: [len(requests)] int64 on the device of the logits.

        logits: [len(requests), vocab_size] float32; rows that ask for constraints are changed in place
        """
        self._apply_constraints(logits, requests)
        token_ids = logits.argmax(dim=-1)
        for draw, rows in _random_rows(requests):
            drawn = draw(logits[rows], [requests[i] for i in rows])
            token_ids[rows] = drawn
        return token_ids

    def _apply_constraints(self, logits: torch.Tensor, requests: Sequence[Request]) -> None:
        for i, request in enumerate(requests):
            params = request.params
            if params.logit_bias:
                token_ids = torch.tensor(list(params.logit_bias), device=logits.device)
                logits[i, token_ids] += torch.tensor(list(params.logit_bias.values()), device=logits.device)
            if forbidden := forbidden_tokens(request, self._eos_token_ids):
                logits[i, list(forbidden)] = -torch.inf
            if params.has_penalties:
                _penalise(logits[i], request)


def is_greedy(request: Request) -> bool:
    """Whether a sequence's next token is the likeliest one, whatever came before it, and nothing else is asked for."""
    params = request.params
    is_plain = params.temperature == 0 and params.logprobs is None and not params.logit_bias
    return is_plain and not params.has_penalties and request.num_output_tokens >= params.min_tokens


def forbidden_tokens(request: Request, eos_token_ids: Sequence[int]) -> Sequence[int]:
    """What must not come next: that which would end a sequence before it has `min_tokens`."""
    if request.num_output_tokens >= request.params.min_tokens:
        return ()
    return (*eos_token_ids, *request.params.stop_token_ids)


def has_filters(params: SamplingParams) -> bool:
    """Whether a draw is from a part of the tokens only."""
    return params.top_k > 0 or params.top_p < 1 or params.min_p > 0


@dataclass(frozen=True, slots=True)
class LogprobRows:
    """Log probabilities of chosen tokens and of the likeliest ones, on the host, or on their way there.

    token_ids, chosen:    [num_rows]
    top_ids, top_values:  [num_rows, most that a row asks for]
    """

    token_ids: torch.Tensor
    chosen: torch.Tensor
    top_ids: torch.Tensor
    top_values: torch.Tensor

    def read(self, num_top: Sequence[int]) -> list[TokenLogprobs]:
        """Each row's token, and its `num_top[i]` likeliest. What computes them must have ended."""
        rows = (each.tolist() for each in (self.token_ids, self.chosen, self.top_ids, self.top_values))
        return [
            TokenLogprobs(token_id, logprob, list(zip(ids[:count], tops[:count], strict=True)))
            for token_id, logprob, ids, tops, count in zip(*rows, num_top, strict=True)
        ]


def pick_logprobs(logprobs: torch.Tensor, token_ids: torch.Tensor, num_top: int) -> LogprobRows:
    """Send the host what it wants to know of each row, without waiting.

    logprobs:  [num_rows, vocab_size] float32
    token_ids: [num_rows] int64, on the same device
    """
    top_values, top_ids = logprobs.topk(max(1, num_top), dim=-1)
    picked = (token_ids, logprobs.gather(1, token_ids[:, None])[:, 0], top_ids, top_values)
    return LogprobRows(*(each.to("cpu", non_blocking=True) for each in picked))


def _penalise(row: torch.Tensor, request: Request) -> None:
    """Repetition (CTRL, arXiv:1909.05858): over all tokens. Presence, frequency (OpenAI): over generated tokens."""
    params = request.params
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted(set(request.token_ids)), device=row.device)
        scores = row[seen]
        row[seen] = torch.where(scores > 0, scores / params.repetition_penalty, scores * params.repetition_penalty)
    if request.num_output_tokens:
        token_ids, counts = np.unique(request.output_token_ids, return_counts=True)
        penalties = params.presence_penalty + params.frequency_penalty * counts
        row[torch.from_numpy(token_ids)] -= torch.from_numpy(penalties).to(row)


def _random_rows(requests: Sequence[Request]) -> Iterator[tuple[Draw, list[int]]]:
    """The rows that draw, by how they draw: a row's filters decide alone, so that its neighbours' cannot matter."""
    plain: list[int] = []
    filtered: list[int] = []
    for i, request in enumerate(requests):
        if request.params.temperature > 0:
            (filtered if has_filters(request.params) else plain).append(i)
    if plain:
        yield _draw, plain
    if filtered:
        yield _draw_filtered, filtered


def _draw(logits: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    return _invert(_probabilities(logits, requests), requests)


def _probabilities(logits: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """Temperature, then softmax. A tiny temperature sharpens to a greedy choice: below the largest there is overflow
    to -inf at most."""
    temperatures = torch.tensor([each.params.temperature for each in requests], dtype=torch.float64)
    below = (logits - logits.amax(dim=-1, keepdim=True)).double()
    return (below / temperatures.to(logits.device)[:, None]).softmax(dim=-1)


def _draw_filtered(logits: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """Draw from the top-k, of these from the smallest set that reaches top-p, with at least min-p of the best."""
    probabilities = _probabilities(logits, requests)
    device, vocab_size = logits.device, logits.shape[-1]
    top_k = torch.tensor([min(each.params.top_k or vocab_size, vocab_size) for each in requests], device=device)
    top_p = torch.tensor([each.params.top_p for each in requests], dtype=torch.float64, device=device)
    min_p = torch.tensor([each.params.min_p for each in requests], dtype=torch.float64, device=device)
    width = min(NUM_LIKELIEST, vocab_size)
    ordered, token_ids = probabilities.topk(width)
    decides = (top_k <= width) | (ordered.sum(dim=-1) >= top_p) | (ordered[:, -1] < min_p * ordered[:, 0])
    if not bool(decides.all()):
        ordered, token_ids = probabilities.sort(descending=True)
    ranks = torch.arange(ordered.shape[-1], device=device)
    kept = torch.where(ranks < top_k[:, None], ordered, 0)
    total = torch.where(top_k < vocab_size, kept.sum(dim=-1), 1)  # what is beyond `width` counts where top-k is off
    before = (kept.cumsum(dim=-1) - kept) / total[:, None]
    is_kept = (before < top_p[:, None]) & (ordered >= min_p[:, None] * ordered[:, :1])
    is_kept[:, 0] = True
    drawn = _invert(kept * is_kept, requests)
    return token_ids.gather(1, drawn[:, None])[:, 0]


def _invert(weights: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
    """The index at which each row's cumulative weight passes its share of the total; never one of weight 0."""
    uniforms = torch.from_numpy(_uniforms(requests)).to(weights.device)
    cumulative = weights.cumsum(dim=-1)
    targets = uniforms * cumulative[:, -1]
    return torch.searchsorted(cumulative, targets[:, None], right=True)[:, 0].clamp_(max=weights.shape[-1] - 1)


def _uniforms(requests: Sequence[Request]) -> Floats:
    """A number in [0, 1) for each sequence from its seed, its index and its position."""
    keys = np.array([[request.seed % 2**64, request.index, request.num_tokens] for request in requests], np.uint64)
    state = _mix(_mix(_mix(keys[:, 0]) + keys[:, 1]) + keys[:, 2])
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(values: Words) -> Words:
    """SplitMix64: neighbouring inputs give unrelated outputs. Source: doi:10.1145/2714064.2660195."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
