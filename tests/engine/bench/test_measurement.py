import math
from dataclasses import replace

import pytest
from octavo_engine.bench.client import RequestResult
from octavo_engine.bench.machine import CpuShares
from octavo_engine.bench.measurement import (
    Goal,
    Spread,
    distribution,
    inter_token_latencies_ms,
    measure,
    tpot_ms,
    ttft_ms,
)
from octavo_engine.bench.report import print_serving
from octavo_engine.bench.serving import Repeat, ServingPlan
from octavo_engine.bench.workloads import fixed
from rich.console import Console


def result(
    *times_s: float,
    start_s: float = 0.0,
    num_output: int | None = None,
    wanted: int | None = None,
    error: str | None = None,
) -> RequestResult:
    count = len(times_s) if num_output is None else num_output
    return RequestResult(
        start_s=start_s,
        end_s=times_s[-1] if times_s else start_s,
        token_times_s=times_s,
        num_input_tokens=10,
        num_output_tokens=count,
        num_wanted_tokens=count if wanted is None else wanted,
        error=error,
    )


def test_latencies_of_one_token_a_chunk() -> None:
    one = result(1.1, 1.2, 1.4, start_s=1.0)
    assert ttft_ms(one) == pytest.approx(100)
    assert tpot_ms(one) == pytest.approx(150)
    assert inter_token_latencies_ms(one) == pytest.approx([100, 200])


def test_tpot_counts_tokens_and_itl_counts_chunks() -> None:
    one = result(0.1, 0.5, num_output=5)
    assert tpot_ms(one) == pytest.approx(400 / 4)
    assert inter_token_latencies_ms(one) == pytest.approx([400])


def test_one_token_has_no_time_per_further_token() -> None:
    assert tpot_ms(result(0.1)) is None
    assert measure([result(0.1)], Goal()).goodput_per_s == pytest.approx(10)


def test_rates_span_first_start_to_last_end() -> None:
    figures = measure([result(1.5, 2.0, start_s=1.0), result(2.0, 4.0, 5.0, start_s=2.0)], Goal())
    assert figures.duration_s == 4.0
    assert figures.output_tokens_per_s == pytest.approx(5 / 4)
    assert figures.total_tokens_per_s == pytest.approx((20 + 5) / 4)


def test_failed_requests_are_counted_and_enter_no_figure() -> None:
    figures = measure([result(0.1, 0.2), result(9.0, error="HTTP 500: no")], Goal())
    assert figures.num_errors == 1
    assert figures.first_error == "HTTP 500: no"
    assert figures.num_output_tokens == 2
    assert figures.ttft_ms.maximum == pytest.approx(100)


def test_answers_of_another_length_are_counted() -> None:
    assert measure([result(0.1, 0.2, wanted=3), result(0.1, 0.2)], Goal()).num_wrong_length == 1


def test_goodput_needs_both_goals() -> None:
    slow_start, slow_tokens, good = result(0.6, 0.61), result(0.1, 0.2), result(0.1, 0.11, 0.12)
    figures = measure([slow_start, slow_tokens, good], Goal(ttft_ms=500, tpot_ms=30))
    assert figures.goodput_per_s == pytest.approx(1 / figures.duration_s)


def test_a_run_without_success_has_no_latency() -> None:
    figures = measure([result(error="refused")], Goal())
    assert math.isnan(figures.ttft_ms.p50)
    assert figures.num_errors == 1


def test_distribution_and_spread() -> None:
    values = distribution([1.0, 2.0, 3.0, 4.0])
    assert (values.p50, values.mean, values.maximum) == (2.5, 2.5, 4.0)
    assert values.p99 == pytest.approx(3.97)
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(median=2.0, lowest=1.0, highest=3.0)


def test_chunks_are_counted_per_good_request() -> None:
    figures = measure([result(0.1, 0.2, num_output=4), result(0.1), result(error="no")], Goal())
    assert figures.chunks_per_request == 1.5


def test_says_when_prompts_came_from_a_cache() -> None:
    measurement = measure([replace(result(0.1), num_cached_tokens=4), result(0.1)], Goal())
    assert (measurement.num_input_tokens, measurement.num_cached_tokens) == (20, 4)
    console = Console(record=True, width=200)
    plan = ServingPlan(fixed(10, 1, 2), num_requests=2, concurrency=2)
    print_serving(console, "server", plan, [Repeat(0, measurement, CpuShares(0.0, 0.0, 0.0))])
    assert "20% of the prompts' tokens came from the server's prefix cache" in console.export_text()
