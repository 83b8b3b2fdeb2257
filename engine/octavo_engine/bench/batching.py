"""Continuous against static batching of one and the same server.

Both policies keep at most `batch_size` requests in the server. Continuous: the next request takes the place of each one
that ends. Static, the baseline: `batch_size` requests start together, and the next ones start when the last has ended;
answers are handed out then. The server stops computing a request at its end in both, which favours the baseline: a
classic static batch pads every request to the longest. Source of the comparison: Orca (OSDI 2022).
"""

from collections.abc import Sequence
from dataclasses import dataclass

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
    results = uvloop.run(run_closed(endpoint, requests, batch_size, time_limit_s))
    return _to_result([results], answers_together=False)


def run_static(
    endpoint: Endpoint, requests: Sequence[BenchRequest], batch_size: int, time_limit_s: float
) -> BatchingResult:
    """Batch by batch; each answer is out when its batch's last token is."""
    batches = [requests[start : start + batch_size] for start in range(0, len(requests), batch_size)]
    results = [uvloop.run(run_closed(endpoint, batch, len(batch), time_limit_s)) for batch in batches]
    return _to_result(results, answers_together=True)


def _to_result(batches: Sequence[Sequence[RequestResult]], *, answers_together: bool) -> BatchingResult:
    served, duration_s = [], 0.0
    for batch in batches:
        errors = [result.error for result in batch if result.error]
        if errors:
            raise OctavoError(f"{len(errors)} requests failed, the first with: {errors[0]}")
        end_s = max(result.end_s for result in batch)
        duration_s += end_s - min(result.start_s for result in batch)
        for result in batch:
            answered_s = end_s if answers_together else result.end_s
            served.append(Served(result.num_output_tokens, answered_s - result.start_s))
    return BatchingResult(duration_s, tuple(served))
