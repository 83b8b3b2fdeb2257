"""Benchmarks a running server: warm up, repeat with fresh prompts, measure. The I/O edge of `octavo bench serve`."""

import contextlib
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import uvloop

from octavo_engine.bench.client import Endpoint, RequestResult, get_json, parse_url, run_closed, run_open
from octavo_engine.bench.local_server import LocalServer, free_port, octavo_command, running
from octavo_engine.bench.machine import CpuMeter, CpuShares
from octavo_engine.bench.measurement import Goal, Measurement, measure
from octavo_engine.bench.workloads import DEFAULT_VOCAB_SIZE, Workload, make_requests
from octavo_engine.errors import ConfigError

DEFAULT_URL: Final = "http://127.0.0.1:8000"
_ASK_TIMEOUT_S: Final = 10.0
_POLL_INTERVAL_S: Final = 0.5
# Prompts of a warm-up come from seeds that no timed repeat uses.
_WARM_UP_SEED: Final = 1 << 31


@dataclass(frozen=True, slots=True)
class ServingPlan:
    """What is sent. Exactly one of `concurrency` and `requests_per_second` is set.

    time_limit_s bounds each repeat. server_pids: the server's processes if it runs here, for the CPU account.
    """

    workload: Workload
    num_requests: int
    concurrency: int | None = None
    requests_per_second: float | None = None
    num_repeats: int = 1
    num_warm_ups: int = 1
    seed: int = 0
    vocab_size: int = DEFAULT_VOCAB_SIZE
    time_limit_s: float = 600.0
    goal: Goal = field(default_factory=Goal)
    server_pids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Repeat:
    """One timed repeat, and who used the CPU meanwhile."""

    seed: int
    measurement: Measurement
    cpu: CpuShares


@contextlib.contextmanager
def started_server(model: str, flags: Sequence[str] = ()) -> Iterator[LocalServer]:
    """This environment's `octavo serve MODEL` on a free port of loopback, until the block ends."""
    port = free_port()
    with (
        tempfile.TemporaryDirectory(prefix="octavo-bench-") as folder,
        running(octavo_command(model, port, flags), port, Path(folder) / "server.log") as server,
    ):
        yield server


def find_endpoint(
    url: str, model: str | None, *, allow_remote: bool, api_key: str | None, wait_s: float = 0.0
) -> Endpoint:
    """The endpoint at `url`; without `model`, the first that the server lists.

    wait_s: how long a server that starts may take until it is healthy
    Raises ConfigError if none answers, or none is healthy by then.
    """
    endpoint = parse_url(url, model or "", allow_remote=allow_remote, api_key=api_key)
    if model and not wait_s:
        return endpoint
    deadline_s = time.monotonic() + wait_s
    if wait_s:
        _wait_until_healthy(endpoint, url, deadline_s)
    listed = _list_models(endpoint, url, deadline_s)
    return parse_url(url, model or str(listed["data"][0]["id"]), allow_remote=allow_remote, api_key=api_key)


def _wait_until_healthy(endpoint: Endpoint, url: str, deadline_s: float) -> None:
    """A server lists its model before it can run it; `/health`, which all of them have, turns to 200 after that."""
    while True:
        try:
            uvloop.run(get_json(endpoint, "/health", _ASK_TIMEOUT_S))
        except ValueError:  # a 200 whose body is not JSON
            return
        except (OSError, TimeoutError) as error:
            if time.monotonic() > deadline_s:
                raise ConfigError(f"the server at {url} is not healthy in time: {error}") from None
        else:
            return
        time.sleep(_POLL_INTERVAL_S)


def _list_models(endpoint: Endpoint, url: str, deadline_s: float) -> Any:
    while True:
        try:
            return uvloop.run(get_json(endpoint, "/v1/models", _ASK_TIMEOUT_S))
        except (OSError, TimeoutError, ValueError) as error:
            if time.monotonic() > deadline_s:
                raise ConfigError(f"no OpenAI-compatible server answers at {url}: {error}") from None
        time.sleep(_POLL_INTERVAL_S)


def run_repeats(endpoint: Endpoint, plan: ServingPlan) -> Iterator[Repeat]:
    """Warm up, then yield each repeat when it is done. Each has prompts of its own: no cache carries over."""
    for index in range(plan.num_warm_ups):
        _run_once(endpoint, plan, _WARM_UP_SEED + plan.seed + index)
    for index in range(plan.num_repeats):
        seed = plan.seed + index
        meter = CpuMeter(plan.server_pids)
        results = _run_once(endpoint, plan, seed)
        shares = meter.read()
        yield Repeat(seed, measure(results, plan.goal), shares)


def _run_once(endpoint: Endpoint, plan: ServingPlan, seed: int) -> Sequence[RequestResult]:
    requests = make_requests(
        plan.workload,
        seed,
        num_requests=plan.num_requests,
        vocab_size=plan.vocab_size,
        requests_per_second=plan.requests_per_second,
    )
    if plan.concurrency is None:
        run = run_open(endpoint, requests, plan.time_limit_s)
    else:
        run = run_closed(endpoint, requests, plan.concurrency, plan.time_limit_s)
    results: Sequence[RequestResult] = uvloop.run(run)
    return results
