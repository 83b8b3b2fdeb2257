"""Continuous against static batching of one and the same server.

Every policy keeps at most `batch_size` requests in the server. Continuous: the next request takes the place of each one
that ends. Static, the baseline: `batch_size` requests start together, and the next ones start when the last has ended;
answers are handed out then. There are two of it. Padded, as static batching engines do it: every row is computed until
the longest one ends. Shrinking: a request's row goes when it ends, which is more than such engines do and favours the
baseline wherever a smaller batch makes a faster step. Source of the comparison: Orca (OSDI 2022).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import uvloop

from octavo_engine.bench.client import Endpoint, RequestResult, run_closed
from octavo_engine.bench.workloads import BenchRequest
from octavo_engine.errors import OctavoError


@dataclass(frozen=True, slots=True)
class Served:
    """One request as its client saw it: answer length in tokens, seconds from its start in a batch to its answer."""

    num_output_tokens: int
    latency_s: float

    @property
    def s_per_token(self) -> float:
        """Latency per token of the answer (Orca's normalised latency)."""
        return self.latency_s / self.num_output_tokens


@dataclass(frozen=True, slots=True)
class BatchingResult:
    """One policy's run. `short` are the requests with the shortest quarter of answers."""

    duration_s: float
    served: tuple[Served, ...]

    @property
    def output_tokens_per_s(self) -> float:
        """Throughput over the whole run."""
        return sum(each.num_output_tokens for each in self.served) / self.duration_s

    @property
    def short(self) -> list[Served]:
        """The quarter of the requests with the shortest answers."""
        return sorted(self.served, key=lambda each: each.num_output_tokens)[: max(1, len(self.served) // 4)]

    @property
    def median_short_latency_s(self) -> float:
        """Median latency of the short requests."""
        return float(np.median([each.latency_s for each in self.short]))

    @property
    def worst_short_s_per_token(self) -> float:
        """Worst latency per token among the short requests: high if one waited for a long one."""
        return max(each.s_per_token for each in self.short)


def run_continuous(
    endpoint: Endpoint, requests: Sequence[BenchRequest], batch_size: int, time_limit_s: float
) -> BatchingResult:
    """Keep the server full; each answer is out when its own last token is."""
    results = _checked(uvloop.run(run_closed(endpoint, requests, batch_size, time_limit_s)))
    served = tuple(Served(result.num_output_tokens, result.end_s - result.start_s) for result in results)
    return BatchingResult(max(result.end_s for result in results), served)


def run_static(
    endpoint: Endpoint, requests: Sequence[BenchRequest], batch_size: int, time_limit_s: float, *, is_padded: bool
) -> BatchingResult:
    """Batch by batch; each answer is out when its batch's last token is. Tokens of padding do not count."""
    served: list[Served] = []
    duration_s = 0.0
    for batch in (requests[start : start + batch_size] for start in range(0, len(requests), batch_size)):
        sent = _padded(batch) if is_padded else batch
        results = _checked(uvloop.run(run_closed(endpoint, sent, len(sent), time_limit_s)))
        end_s = max(result.end_s for result in results)
        duration_s += end_s - min(result.start_s for result in results)
        served += [
            Served(request.num_output_tokens, end_s - result.start_s)
            for request, result in zip(batch, results, strict=True)
        ]
    return BatchingResult(duration_s, tuple(served))


def _padded(batch: Sequence[BenchRequest]) -> list[BenchRequest]:
    """The batch with every answer as long as its longest."""
    longest = max(request.num_output_tokens for request in batch)
    return [replace(request, num_output_tokens=longest) for request in batch]


def _checked(results: Sequence[RequestResult]) -> Sequence[RequestResult]:
    errors = [result.error for result in results if result.error]
    if errors:
        raise OctavoError(f"{len(errors)} of {len(results)} requests failed, the first with: {errors[0]}")
    return results
