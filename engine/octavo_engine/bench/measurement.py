"""From the results of single requests to the figures of a run. Pure arithmetic; times in seconds, latencies in ms."""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from octavo_engine.bench.client import RequestResult


@dataclass(frozen=True, slots=True)
class Goal:
    """What a request must keep to count as good: time to first token and time per output token, in ms."""

    ttft_ms: float = 500.0
    tpot_ms: float = 30.0


@dataclass(frozen=True, slots=True)
class Distribution:
    """Median, 99th percentile, mean and maximum of some latencies in ms; all NaN if there were none."""

    p50: float
    p99: float
    mean: float
    maximum: float


@dataclass(frozen=True, slots=True)
class Measurement:
    """The figures of one run.

    duration_s runs from the first request's start to the last one's end. Token rates count successful requests only.
    goodput_per_s: requests per second that kept the goal. num_wrong_length: answers shorter or longer than asked for.
    chunks_per_request: arrivals with tokens; fewer than the tokens if the server sends several at once.
    """

    num_requests: int
    num_errors: int
    num_wrong_length: int
    duration_s: float
    num_input_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    output_tokens_per_s: float
    total_tokens_per_s: float
    requests_per_s: float
    goodput_per_s: float
    chunks_per_request: float
    ttft_ms: Distribution
    tpot_ms: Distribution
    itl_ms: Distribution
    e2e_ms: Distribution
    first_error: str | None


def ttft_ms(result: RequestResult) -> float:
    """Milliseconds from sending the request to the first chunk with tokens."""
    return (result.token_times_s[0] - result.start_s) * 1e3


def tpot_ms(result: RequestResult) -> float | None:
    """Milliseconds per output token after the first; None for a one-token answer.

    The first chunk may bring several tokens at once; it counts as one, so that its others are not given away.
    """
    if result.num_output_tokens < 2:
        return None
    return (result.token_times_s[-1] - result.token_times_s[0]) / (result.num_output_tokens - 1) * 1e3


def inter_token_latencies_ms(result: RequestResult) -> list[float]:
    """Gaps in ms between chunks, as the reader of the stream sees them; a chunk of several tokens is one arrival."""
    times_s = result.token_times_s
    return [(after - before) * 1e3 for before, after in itertools.pairwise(times_s)]


def measure(results: Sequence[RequestResult], goal: Goal) -> Measurement:
    """Sum up a run. Failed requests count as errors and enter no latency and no rate."""
    good = [result for result in results if result.error is None]
    failed = [result.error for result in results if result.error is not None]
    duration_s = max(result.end_s for result in results) - min(result.start_s for result in results)
    per_s = 1 / duration_s if duration_s > 0 else 0.0
    num_input = sum(result.num_input_tokens for result in good)
    num_output = sum(result.num_output_tokens for result in good)
    return Measurement(
        num_requests=len(results),
        num_errors=len(failed),
        num_wrong_length=sum(result.num_output_tokens != result.num_wanted_tokens for result in good),
        duration_s=duration_s,
        num_input_tokens=num_input,
        num_cached_tokens=sum(result.num_cached_tokens for result in good),
        num_output_tokens=num_output,
        output_tokens_per_s=num_output * per_s,
        total_tokens_per_s=(num_input + num_output) * per_s,
        requests_per_s=len(good) * per_s,
        goodput_per_s=sum(_keeps(result, goal) for result in good) * per_s,
        chunks_per_request=sum(len(result.token_times_s) for result in good) / max(len(good), 1),
        ttft_ms=distribution([ttft_ms(result) for result in good]),
        tpot_ms=distribution([value for result in good if (value := tpot_ms(result)) is not None]),
        itl_ms=distribution([value for result in good for value in inter_token_latencies_ms(result)]),
        e2e_ms=distribution([(result.end_s - result.start_s) * 1e3 for result in good]),
        first_error=failed[0] if failed else None,
    )


def distribution(values_ms: Sequence[float]) -> Distribution:
    """Percentiles by linear interpolation between ranks."""
    if not values_ms:
        return Distribution(*[float("nan")] * 4)
    p50, p99 = np.percentile(values_ms, [50, 99]).tolist()
    return Distribution(p50, p99, statistics.fmean(values_ms), max(values_ms))


def _keeps(result: RequestResult, goal: Goal) -> bool:
    per_token_ms = tpot_ms(result) or 0.0
    return ttft_ms(result) <= goal.ttft_ms and per_token_ms <= goal.tpot_ms


@dataclass(frozen=True, slots=True)
class Spread:
    """Median, lowest and highest of the repeats of one figure."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))
