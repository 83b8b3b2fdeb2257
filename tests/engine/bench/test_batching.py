import pytest
from octavo_engine.bench import batching
from octavo_engine.bench.batching import BatchingResult, Served, run_continuous, run_static
from octavo_engine.bench.client import Endpoint, RequestResult
from octavo_engine.bench.workloads import BenchRequest
from octavo_engine.errors import OctavoError

ENDPOINT = Endpoint("127.0.0.1", 1, "fake")
REQUESTS = [BenchRequest((1,), length) for length in (1, 9, 2, 4)]


def answer(request: BenchRequest, start_s: float, error: str | None = None) -> RequestResult:
    """A request that gets a token a second."""
    length = request.num_output_tokens
    times_s = tuple(start_s + 1 + i for i in range(length))
    return RequestResult(start_s, start_s + length, times_s, 1, length, length, error)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed loop against a server of one token a second, worked out instead of waited for."""

    async def run_closed(
        endpoint: Endpoint, requests: list[BenchRequest], concurrency: int, time_limit_s: float
    ) -> list[RequestResult]:
        free_at_s = [0.0] * concurrency
        results = []
        for request in requests:
            start_s = min(free_at_s)
            results.append(answer(request, start_s))
            free_at_s[free_at_s.index(start_s)] = results[-1].end_s
        return results

    monkeypatch.setattr(batching, "run_closed", run_closed)


@pytest.mark.usefixtures("server")
def test_static_batches_wait_for_their_longest_request() -> None:
    result = run_static(ENDPOINT, REQUESTS, batch_size=2, time_limit_s=60, is_padded=False)
    assert [each.latency_s for each in result.served] == [9, 9, 4, 4]
    assert result.duration_s == 13
    assert result.output_tokens_per_s == pytest.approx(16 / 13)


@pytest.mark.usefixtures("server")
def test_padding_counts_as_time_and_not_as_tokens() -> None:
    # The fake server takes no longer for a padded row, so only the counts can differ: they must not.
    result = run_static(ENDPOINT, REQUESTS, batch_size=2, time_limit_s=60, is_padded=True)
    assert [each.num_output_tokens for each in result.served] == [1, 9, 2, 4]
    assert result.duration_s == 13


@pytest.mark.usefixtures("server")
def test_continuous_batching_answers_each_request_at_its_own_end() -> None:
    result = run_continuous(ENDPOINT, REQUESTS, batch_size=2, time_limit_s=60)
    assert [each.latency_s for each in result.served] == [1, 9, 2, 4]
    assert result.duration_s == 9
    assert result.worst_short_s_per_token == 1


def test_short_requests_are_the_quarter_with_the_shortest_answers() -> None:
    result = BatchingResult(10.0, tuple(Served(length, latency_s=length * 2.0) for length in (8, 1, 5, 3, 9, 7, 2, 4)))
    assert [each.num_output_tokens for each in result.short] == [1, 2]
    assert result.median_short_latency_s == 3.0


def test_a_failed_request_fails_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run_closed(*_: object) -> list[RequestResult]:
        return [answer(REQUESTS[0], 0.0, error="HTTP 500: no")]

    monkeypatch.setattr(batching, "run_closed", run_closed)
    with pytest.raises(OctavoError, match="HTTP 500"):
        run_continuous(ENDPOINT, REQUESTS, 2, 60)
