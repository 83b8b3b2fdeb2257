"""Measures the engine in process, without HTTP: all requests at once, until the last has its last token.

Everything from the prompts' ids to the answers' ids is timed. Each repeat has prompts of its own, so that the prefix
cache helps only inside a repeat.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from octavo_engine.bench.measurement import Spread
from octavo_engine.bench.roofline import Floors, Load, ModelWork, Rates, floors
from octavo_engine.bench.workloads import BenchRequest, Workload, make_lengths, make_requests
from octavo_engine.core import EngineCore
from octavo_engine.errors import OctavoError
from octavo_engine.protocol import AddRequest, SamplingParams, SequenceOutput

# Seeds of the runs beside the timed repeats, which count from the plan's seed: no prompt is seen twice.
_WARM_UP_SEED, _FIRST_TOKEN_SEED = 1000, 100
_WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class OfflinePlan:
    """How a workload is run; None: the workload's own number."""

    num_requests: int | None = None
    num_repeats: int | None = None
    num_warm_ups: int = 1
    seed: int = 0


@dataclass(frozen=True, slots=True)
class OfflineResult:
    """The timed repeats of one workload.

    lengths:             (input, output) tokens of each request of the first repeat, a shared prefix included
    first_token_times_s: seconds until all requests had their first token, in runs of their own; () if not measured
    num_distinct_ends:   different last tokens among the answers; 1 for many requests means that the model collapsed
    """

    workload: Workload
    lengths: tuple[tuple[int, int], ...]
    times_s: tuple[float, ...]
    first_token_times_s: tuple[float, ...]
    num_distinct_ends: int

    @property
    def duration_s(self) -> Spread:
        """Over the repeats."""
        return Spread.of(self.times_s)

    @property
    def num_output_tokens(self) -> int:
        """Of all requests."""
        return sum(output for _, output in self.lengths)

    @property
    def output_tokens_per_s(self) -> float:
        """In the median repeat."""
        return self.num_output_tokens / self.duration_s.median

    @property
    def total_tokens_per_s(self) -> float:
        """In the median repeat, prompts included."""
        return sum(map(sum, self.lengths)) / self.duration_s.median

    @property
    def first_token_ms(self) -> float | None:
        """Median milliseconds until all had their first token."""
        return Spread.of(self.first_token_times_s).median * 1e3 if self.first_token_times_s else None

    @property
    def decode_ms_per_token(self) -> float | None:
        """Milliseconds of one decode step: what came after the first token, by the steps that took it."""
        num_steps = max(output for _, output in self.lengths) - 1
        if self.first_token_ms is None or not num_steps:
            return None
        return (self.duration_s.median * 1e3 - self.first_token_ms) / num_steps

    @property
    def load(self) -> Load:
        """The load as a lower bound needs it."""
        prefix = self.workload.num_prefix_tokens
        return Load([(num_input - prefix, output) for num_input, output in self.lengths], prefix)

    def floors(self, work: ModelWork, rates: Rates) -> Floors:
        """Lower bounds on `duration_s`."""
        return floors(work, self.load, rates)


def measure_workload(core: EngineCore, workload: Workload, plan: OfflinePlan, vocab_size: int) -> OfflineResult:
    """Warm up, time the repeats, and check every answer. Raises OctavoError if one is wrong."""
    runner = _Runner(core, workload, plan, vocab_size)
    for index in range(plan.num_warm_ups):
        runner.run(_WARM_UP_SEED + plan.seed + index, max_tokens=_WARM_UP_TOKENS)
    seeds = range(plan.seed, plan.seed + (plan.num_repeats or workload.num_repeats))
    runs = [runner.run(seed) for seed in seeds]
    split_seeds = [_FIRST_TOKEN_SEED + seed for seed in seeds] if workload.splits_prefill else []
    first_token_runs = [runner.run(seed, max_tokens=1) for seed in split_seeds]
    return OfflineResult(
        workload=workload,
        lengths=tuple(make_lengths(workload, plan.seed, runner.num_requests)),
        times_s=tuple(run.duration_s for run in runs),
        first_token_times_s=tuple(run.duration_s for run in first_token_runs),
        num_distinct_ends=len({answer[-1] for answer in runs[-1].answers}),
    )


def generate(core: EngineCore, requests: Sequence[BenchRequest]) -> list[list[int]]:
    """Answer all requests greedily, each with as many tokens as it wants. Raises OctavoError if one fails."""
    answers = add_requests(core, requests)
    while core.has_work:
        collect(core.step().outputs, answers)
    return list(answers.values())


def add_requests(core: EngineCore, requests: Sequence[BenchRequest]) -> dict[str, list[int]]:
    """Queue the requests; an empty answer for each, by its id, in their order."""
    now_s = time.monotonic()
    answers: dict[str, list[int]] = {}
    for number, request in enumerate(requests):
        params = SamplingParams(temperature=0.0, max_tokens=request.num_output_tokens, ignore_eos=True)
        name = f"bench-{number}"
        answers[name] = []
        core.add_request(AddRequest(name, list(request.prompt_token_ids), params, now_s))
    return answers


def collect(outputs: Sequence[SequenceOutput], answers: Mapping[str, list[int]]) -> None:
    """Append what a step brought. Raises OctavoError for a request that failed."""
    for output in outputs:
        if output.error is not None:
            raise OctavoError(f"the engine refused a request of the workload: {output.error}")
        answers[output.request_id] += output.token_ids


@dataclass(frozen=True, slots=True)
class _Run:
    duration_s: float
    answers: Sequence[Sequence[int]]


@dataclass(frozen=True, slots=True)
class _Runner:
    core: EngineCore
    workload: Workload
    plan: OfflinePlan
    vocab_size: int

    @property
    def num_requests(self) -> int:
        return self.plan.num_requests or self.workload.num_requests

    def run(self, seed: int, max_tokens: int | None = None) -> _Run:
        """Answer that seed's requests, with at most `max_tokens` each."""
        requests = make_requests(self.workload, seed, num_requests=self.num_requests, vocab_size=self.vocab_size)
        if max_tokens:
            requests = [replace(each, num_output_tokens=min(max_tokens, each.num_output_tokens)) for each in requests]
        start_s = time.perf_counter()
        answers = generate(self.core, requests)
        duration_s = time.perf_counter() - start_s
        self._check(requests, answers)
        return _Run(duration_s, answers)

    def _check(self, requests: Sequence[BenchRequest], answers: Sequence[Sequence[int]]) -> None:
        for request, answer in zip(requests, answers, strict=True):
            if len(answer) != request.num_output_tokens:
                raise OctavoError(f"an answer has {len(answer)} tokens instead of {request.num_output_tokens}")
            if not all(0 <= token_id < self.vocab_size for token_id in answer):
                raise OctavoError("an answer holds token ids that the vocabulary does not have")
