"""Metrics in Prometheus' format: `octavo_*`, and the `vllm:*` names that dashboards, autoscalers and gateways read.

Gauges and counters are read from the engine's latest statistics when somebody scrapes; only the histograms cost
anything while tokens flow. Aliases are copies made at the scrape.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from octavo_engine.async_engine import AsyncEngine, FinishedSequence
from octavo_engine.protocol import EngineStats

LABEL: Final = "model_name"
QUEUE_BUCKETS: Final = (
    0.001, 0.005, 0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0,
    120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip
TTFT_BUCKETS: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)  # fmt: skip
TOKEN_TIME_BUCKETS: Final = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
E2E_BUCKETS: Final = (
    0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)  # fmt: skip
TOKEN_COUNT_BUCKETS: Final = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))


@dataclass(frozen=True, slots=True)
class _Reading:
    """A number of the engine's statistics under its own name and, where there is one, its alias."""

    name: str
    alias: str | None
    help: str
    read: Callable[[EngineStats], float]


GAUGES: Final = (
    _Reading("octavo_num_requests_waiting", "vllm:num_requests_waiting", "Sequences that wait for a place.",
             lambda stats: stats.num_waiting),
    _Reading("octavo_num_requests_running", "vllm:num_requests_running", "Sequences in the running batch.",
             lambda stats: stats.num_running),
    _Reading("octavo_kv_cache_usage_ratio", "vllm:kv_cache_usage_perc", "Share of KV blocks in use; 1 is all.",
             lambda stats: stats.num_used_kv_blocks / max(1, stats.num_kv_blocks)),
    _Reading("octavo_step_time_seconds", None, "Duration of the last step.", lambda stats: stats.last_step_time_s),
    _Reading("octavo_step_roofline_ratio", None, "Predicted limit over measured time of the last step; 1 is the limit.",
             lambda stats: stats.last_step_roofline_ratio),
)  # fmt: skip
COUNTERS: Final = (
    _Reading("octavo_steps", None, "Steps that the engine finished.", lambda stats: stats.num_steps),
    _Reading("octavo_prompt_tokens", "vllm:prompt_tokens", "Prompt tokens computed.",
             lambda stats: stats.num_prompt_tokens),
    _Reading("octavo_generation_tokens", "vllm:generation_tokens", "Tokens generated.",
             lambda stats: stats.num_generation_tokens),
    _Reading("octavo_num_preemptions", "vllm:num_preemptions", "Sequences that gave their blocks up for others.",
             lambda stats: stats.num_preemptions),
    _Reading("octavo_prefix_cache_queries", "vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.",
             lambda stats: stats.num_prefix_cache_queries),
    _Reading("octavo_prefix_cache_hits", "vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.",
             lambda stats: stats.num_prefix_cache_hits),
)  # fmt: skip


class Metrics:
    """One server's metrics, in a registry of their own. It observes the engine's sequences."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self._histograms: list[Histogram] = []
        self._queue = self._histogram("request_queue_time_seconds", "From arrival to the first step.", QUEUE_BUCKETS)
        self._ttft = self._histogram("time_to_first_token_seconds", "From arrival to first token.", TTFT_BUCKETS)
        self._itl = self._histogram("inter_token_latency_seconds", "Between two tokens.", TOKEN_TIME_BUCKETS)
        self._tpot = self._histogram(
            "request_time_per_output_token_seconds", "Mean time between an answer's tokens.", TOKEN_TIME_BUCKETS
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "From arrival to the end.", E2E_BUCKETS)
        self._prompt = self._histogram("request_prompt_tokens", "Tokens of a prompt.", TOKEN_COUNT_BUCKETS)
        self._generation = self._histogram("request_generation_tokens", "Tokens of an answer.", TOKEN_COUNT_BUCKETS)
        # Not registered: its alias is made beside it, in `_Aliases`.
        self._finished = Counter(
            "octavo_request_success", "Answers, by how they ended.", [LABEL, "finished_reason"], registry=None
        )
        self.registry.register(_Aliases([*self._histograms, self._finished]))

    def _histogram(self, name: str, help_text: str, buckets: Sequence[float]) -> Histogram:
        """A histogram with its one label set; `_Aliases` collects it, so the registry must not."""
        histogram = Histogram(f"octavo_{name}", help_text, [LABEL], buckets=buckets, registry=None)
        self._histograms.append(histogram)
        return histogram.labels(self._model_name)

    def watch(self, engine: AsyncEngine) -> None:
        """Read this engine's statistics at each scrape."""
        self.registry.register(_EngineCollector(engine, self._model_name))

    def observe_queue_time(self, seconds: float) -> None:
        """The time from a request's arrival to its first step."""
        self._queue.observe(seconds)

    def observe_first_token(self, seconds: float) -> None:
        """The time from a request's arrival to its first token."""
        self._ttft.observe(seconds)

    def observe_next_tokens(self, seconds: float, num_tokens: int) -> None:
        """The time that the next tokens took together."""
        for _ in range(num_tokens):
            self._itl.observe(seconds / num_tokens)

    def observe_finished(self, sequence: FinishedSequence) -> None:
        """A sequence's end."""
        self._finished.labels(self._model_name, sequence.finish_reason).inc()
        self._e2e.observe(sequence.e2e_s)
        self._prompt.observe(sequence.num_prompt_tokens)
        self._generation.observe(sequence.num_generation_tokens)
        if sequence.num_generation_tokens > 1:
            self._tpot.observe(sequence.decode_s / (sequence.num_generation_tokens - 1))

    def render(self) -> bytes:
        """All metrics as text."""
        return generate_latest(self.registry)


class _Aliases(Collector):
    """Collects metrics under their own names and again under their `vllm:` names."""

    def __init__(self, metrics: Sequence[Histogram | Counter]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterator[Metric]:
        for metric in self._metrics:
            for family in metric.collect():
                yield family
                yield _renamed(family, "octavo_", "vllm:")


def _renamed(family: Metric, prefix: str, new_prefix: str) -> Metric:
    def rename(name: str) -> str:
        return new_prefix + name.removeprefix(prefix)

    alias = Metric(rename(family.name), family.documentation, family.type)
    alias.samples = [Sample(rename(sample.name), *sample[1:]) for sample in family.samples]
    return alias


class _EngineCollector(Collector):
    """Reads the engine when somebody scrapes."""

    def __init__(self, engine: AsyncEngine, model_name: str) -> None:
        self._engine = engine
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        stats = self._engine.stats
        for reading in GAUGES:
            for name in filter(None, (reading.name, reading.alias)):
                yield self._gauge(name, reading.help, [], [((), reading.read(stats))])
        for reading in COUNTERS:
            for name in filter(None, (reading.name, reading.alias)):
                counter = CounterMetricFamily(name, reading.help, labels=[LABEL])
                counter.add_metric([self._model_name], reading.read(stats))
                yield counter
        yield self._kv_blocks(stats)
        yield from self._start_up()

    def _gauge(
        self, name: str, help_text: str, labels: Sequence[str], values: Sequence[tuple[Sequence[str], float]]
    ) -> Metric:
        gauge = GaugeMetricFamily(name, help_text, labels=[LABEL, *labels])
        for label_values, value in values:
            gauge.add_metric([self._model_name, *label_values], value)
        return gauge

    def _kv_blocks(self, stats: EngineStats) -> Metric:
        used, cached = stats.num_used_kv_blocks, stats.num_cached_kv_blocks
        free = stats.num_kv_blocks - used - cached
        blocks = [(("used",), float(used)), (("cached",), float(cached)), (("free",), float(free))]
        return self._gauge("octavo_kv_blocks", "Blocks of the KV cache by state.", ["state"], blocks)

    def _start_up(self) -> Iterator[Metric]:
        """What the engine settled on while it loaded."""
        ready = self._engine.ready
        if ready is None:
            return
        memory = [((pool, kind), float(size)) for pool, sizes in ready.memory.items() for kind, size in sizes.items()]
        yield self._gauge("octavo_memory_bytes", "Memory by pool, predicted and actual.", ["pool", "kind"], memory)
        limits = {
            "max_model_len": ready.max_model_len,
            "max_num_seqs": ready.max_num_seqs,
            "max_num_batched_tokens": ready.max_num_batched_tokens,
        }
        values = [((name,), float(value)) for name, value in limits.items()]
        yield self._gauge("octavo_limit", "Limits that the engine settled on.", ["limit"], values)
        kernels = ",".join(f"{op}={kernel}" for op, kernel in sorted(ready.kernels.items()))
        info = [((ready.hardware, kernels), 1.0)]
        yield self._gauge("octavo_engine_info", "Hardware row and kernels in use.", ["hardware", "kernels"], info)
        cache = [((str(ready.block_size), str(ready.num_kv_blocks)), 1.0)]
        yield self._gauge("vllm:cache_config_info", "Size of the KV cache.", ["block_size", "num_gpu_blocks"], cache)
        adapters = [(("0", "", ""), 1.0)]
        labels = ["max_lora", "running_lora_adapters", "waiting_lora_adapters"]
        yield self._gauge("vllm:lora_requests_info", "LoRA adapters in use: none are served.", labels, adapters)
        if self._engine.ready_after_s is not None:
            seconds = [((), self._engine.ready_after_s)]
            yield self._gauge("octavo_startup_seconds", "From the start to readiness.", [], seconds)
            phases = [((name,), seconds) for name, seconds in self._engine.phase_seconds().items()]
            yield self._gauge("octavo_startup_phase_seconds", "Phases of the start.", ["phase"], phases)
