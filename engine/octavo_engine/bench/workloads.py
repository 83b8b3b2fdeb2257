"""Seeded workloads: which prompts arrive when, and how many tokens each wants back. No engine, no clock, no network.

Prompts are lists of token ids drawn uniformly, since no data set is at hand and an engine's work does not depend on
what the ids mean. Equal seeds make equal workloads on every machine.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from octavo_engine.errors import ConfigError

# Ids below are special tokens in many vocabularies; a prompt of them would be no ordinary prompt.
FIRST_TOKEN_ID: Final = 256
# Every vocabulary that is served holds these many, so that all engines can be given the same ids.
DEFAULT_VOCAB_SIZE: Final = 32_000

# Prompts of the peer comparison stay below this: ids from here on are special tokens in a vocabulary of 128,256.
_PEER_VOCAB_SIZE: Final = 128_000

# One stream of random numbers per purpose: more requests or another rate must not change the prompts.
_LENGTHS_STREAM, _PROMPTS_STREAM, _ARRIVALS_STREAM, _PREFIX_STREAM = range(4)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Token counts: always `mean`, or lognormal with that mean and `sigma` (of the logarithm), clipped."""

    mean: float
    sigma: float = 0.0
    minimum: int = 1
    maximum: int = 1 << 20

    @property
    def longest(self) -> int:
        """The largest length that can be drawn."""
        return self.maximum if self.sigma else round(self.mean)

    def draw(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        """`count` lengths in tokens. Clipping shifts a lognormal's mean a little; the shift is not undone."""
        if self.sigma == 0:
            return np.full(count, round(self.mean), dtype=np.int64)
        location = math.log(self.mean) - self.sigma**2 / 2
        lengths = np.rint(rng.lognormal(location, self.sigma, count)).astype(np.int64)
        return np.clip(lengths, self.minimum, self.maximum)


@dataclass(frozen=True, slots=True)
class Workload:
    """A named load. With a shared prefix, every prompt begins with the same `num_prefix_tokens` ids.

    num_repeats:    timed repeats of an offline measurement, unless it is told otherwise
    peer_seed:      set for the workloads of the comparison with vLLM and SGLang: prompts are drawn as that comparison
                    draws them, so that every engine gets the very same ids
    splits_prefill: whether an offline measurement takes the first token's time apart, by runs that generate only it
    """

    name: str
    what: str
    input_tokens: Lengths
    output_tokens: Lengths
    num_requests: int
    num_prefix_tokens: int = 0
    num_repeats: int = 3
    peer_seed: int | None = None
    splits_prefill: bool = False

    @property
    def longest_context(self) -> int:
        """Tokens of the longest request that can be drawn, prompt and answer together."""
        return self.num_prefix_tokens + self.input_tokens.longest + self.output_tokens.longest


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """One request: its prompt, the tokens to generate, and when it arrives in seconds after the run's start."""

    prompt_token_ids: tuple[int, ...]
    num_output_tokens: int
    arrival_s: float = 0.0


def fixed(num_input_tokens: int, num_output_tokens: int, num_requests: int) -> Workload:
    """A workload whose requests are all of one shape."""
    name = f"{num_input_tokens}/{num_output_tokens}"
    what = f"{num_input_tokens} tokens in, {num_output_tokens} out"
    return Workload(name, what, Lengths(num_input_tokens), Lengths(num_output_tokens), num_requests)


def _sharegpt(name: str, what: str, num_requests: int, scale: float = 1.0) -> Workload:
    """Lengths as in ShareGPT's first turns (means 220 in, 205 out), with its long tails, times `scale`."""
    maximum = round(1024 * scale)
    return Workload(
        name,
        what,
        input_tokens=Lengths(220 * scale, sigma=1.0, minimum=4, maximum=maximum),
        output_tokens=Lengths(205 * scale, sigma=0.9, minimum=4, maximum=maximum),
        num_requests=num_requests,
    )


def _peer(name: str, what: str, shape: tuple[int, int, int, int], peer_seed: int, num_repeats: int = 3) -> Workload:
    """A workload of the peer comparison. shape: requests, own prompt tokens, shared prefix tokens, output tokens."""
    count, own, prefix, output = shape
    splits_prefill = name.startswith("D") or count == 1
    return Workload(name, what, Lengths(own), Lengths(output), count, prefix, num_repeats, peer_seed, splits_prefill)


WORKLOADS: Final[dict[str, Workload]] = {
    workload.name: workload
    for workload in (
        Workload("latency", "one short prompt", Lengths(128), Lengths(256), 8),
        Workload("short", "128 in, 128 out", Lengths(128), Lengths(128), 16),
        Workload("throughput", "offline throughput, 512 in, 256 out", Lengths(512), Lengths(256), 512),
        Workload("decode", "decode-heavy, 32 in, 512 out", Lengths(32), Lengths(512), 256),
        Workload("prefill", "long prompts, 8192 in, 64 out", Lengths(8192), Lengths(64), 32),
        Workload("shared-prefix", "2048 shared, 128 own, 128 out", Lengths(128), Lengths(128), 256, 2048),
        _sharegpt("sharegpt", "lognormal lengths, means 220 in, 205 out, at most 1024 each", 1000),
        _sharegpt("sharegpt-small", "sharegpt with all lengths halved, for a CPU", 96, scale=0.5),
        Workload("online", "512 in, 128 out: for Poisson arrivals", Lengths(512), Lengths(128), 256),
        _peer("W1", "offline throughput: 512 requests, 512 in, 256 out", (512, 512, 0, 256), 101),
        _peer("W2", "decode-heavy: 256 requests, 32 in, 512 out", (256, 32, 0, 512), 202),
        _peer("W3", "latency: one request, 128 in, 256 out", (1, 128, 0, 256), 303, num_repeats=5),
        _peer("W4", "long prompts: 32 requests, 8192 in, 64 out", (32, 8192, 0, 64), 404),
        _peer("W5", "shared prefix: 256 requests, 2048 shared, 128 own, 128 out", (256, 128, 2048, 128), 505),
        _peer("D1", "decode at batch 1: 128 in, 128 out", (1, 128, 0, 128), 601),
        _peer("D4", "decode at batch 4: 128 in, 128 out", (4, 128, 0, 128), 604),
        _peer("D16", "decode at batch 16: 128 in, 128 out", (16, 128, 0, 128), 616),
        _peer("D32", "decode at batch 32: 128 in, 128 out", (32, 128, 0, 128), 632),
        _peer("D128", "decode at batch 128: 32 in, 256 out", (128, 32, 0, 256), 728),
        _peer("T0", "self test: 3 requests, 4 shared, 5 own, 4 out", (3, 5, 4, 4), 1, num_repeats=2),
    )
}


def named(name: str) -> Workload:
    """The workload of that name. Raises ConfigError that lists the names."""
    if name not in WORKLOADS:
        raise ConfigError(f"no workload is named {name!r}; there are: {', '.join(WORKLOADS)}")
    return WORKLOADS[name]


def make_lengths(workload: Workload, seed: int, num_requests: int) -> list[tuple[int, int]]:
    """(input, output) tokens of each request, the shared prefix included in the input."""
    rng = np.random.default_rng([seed, _LENGTHS_STREAM])
    inputs = workload.input_tokens.draw(rng, num_requests) + workload.num_prefix_tokens
    outputs = workload.output_tokens.draw(rng, num_requests)
    return list(zip(inputs.tolist(), outputs.tolist(), strict=True))


def make_requests(
    workload: Workload,
    seed: int,
    *,
    num_requests: int | None = None,
    vocab_size: int = DEFAULT_VOCAB_SIZE,
    requests_per_second: float | None = None,
    prompt_seed: int | None = None,
) -> list[BenchRequest]:
    """The workload's requests in order of arrival.

    Without `requests_per_second` all arrive at 0; with it, arrivals are a Poisson process that starts at 0.
    With `prompt_seed`, lengths and arrivals are those of `seed`, but the prompts' ids are others.
    """
    count = workload.num_requests if num_requests is None else num_requests
    ids_seed = seed if prompt_seed is None else prompt_seed
    draw_prompts = _prompts if workload.peer_seed is None else _peer_prompts
    lengths = make_lengths(workload, seed, count)
    prompts = draw_prompts(workload, ids_seed, [num_input for num_input, _ in lengths], vocab_size)
    arrivals = poisson_arrivals(requests_per_second, count, seed) if requests_per_second else [0.0] * count
    return [
        BenchRequest(tuple(prompt), num_output, arrival_s)
        for prompt, (_, num_output), arrival_s in zip(prompts, lengths, arrivals, strict=True)
    ]


def _prompts(workload: Workload, seed: int, lengths: Sequence[int], vocab_size: int) -> list[list[int]]:
    """Prefix and own ids come from streams of their own."""
    prefix_rng, rng = (np.random.default_rng([seed, stream]) for stream in (_PREFIX_STREAM, _PROMPTS_STREAM))
    return _draw_prompts(workload, prefix_rng, rng, lengths, vocab_size)


def _peer_prompts(workload: Workload, seed: int, lengths: Sequence[int], vocab_size: int) -> list[list[int]]:
    """Prefix and own ids come one after the other from one stream, of the workload's seed and the repeat's."""
    assert workload.peer_seed is not None
    rng = np.random.default_rng([workload.peer_seed, seed])
    return _draw_prompts(workload, rng, rng, lengths, min(vocab_size, _PEER_VOCAB_SIZE))


def _draw_prompts(
    workload: Workload,
    prefix_rng: np.random.Generator,
    rng: np.random.Generator,
    lengths: Sequence[int],
    vocab_size: int,
) -> list[list[int]]:
    first = FIRST_TOKEN_ID if vocab_size > 2 * FIRST_TOKEN_ID else 0
    prefix = prefix_rng.integers(first, vocab_size, workload.num_prefix_tokens).tolist()
    return [
        prefix + rng.integers(first, vocab_size, num_input - workload.num_prefix_tokens).tolist()
        for num_input in lengths
    ]


def poisson_arrivals(requests_per_second: float, count: int, seed: int) -> Sequence[float]:
    """Seconds after the start at which `count` independent clients call; the first gap is random too."""
    rng = np.random.default_rng([seed, _ARRIVALS_STREAM])
    arrivals: list[float] = np.cumsum(rng.exponential(1 / requests_per_second, count)).tolist()
    return arrivals
