"""A streaming client of any OpenAI-compatible server that takes as little of the CPU as it can.

Client and server share the cores of one machine, so whatever the client does while the server works is missing there.
The client therefore only notes when bytes came in; what they say is read after the run. It speaks HTTP/1.1 through
httptools on asyncio's own transports, a connection a request.
"""

import asyncio
import functools
import ipaddress
import json
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import urlsplit

import httptools

from octavo_engine.bench.workloads import BenchRequest
from octavo_engine.errors import ConfigError

_EVENT_PREFIX: Final = b"data:"
_LAST_EVENT: Final = b"[DONE]"
_MAX_ERROR_LENGTH: Final = 300


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where the server is and what it calls its model."""

    host: str
    port: int
    model: str
    uses_tls: bool = False
    path_prefix: str = ""
    api_key: str | None = None


@dataclass(frozen=True, slots=True)
class RequestResult:
    """What became of one request. Times are seconds on the run's clock, which starts at 0.

    token_times_s: when each chunk with tokens came in. num_output_tokens: as the server's usage counts them, since a
    chunk may carry several. num_cached_tokens: of the prompt, what the server says its prefix cache had, if it does.
    error: why the request failed, or None.
    """

    start_s: float
    end_s: float
    token_times_s: tuple[float, ...]
    num_input_tokens: int
    num_output_tokens: int
    num_wanted_tokens: int
    error: str | None = None
    num_cached_tokens: int = 0


def parse_url(url: str, model: str, *, allow_remote: bool, api_key: str | None = None) -> Endpoint:
    """The endpoint at `url`. Raises ConfigError if it is malformed, or not on this machine without `allow_remote`."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--url={url!r}: expected http://HOST:PORT")
    if not allow_remote and not _is_loopback(parts.hostname):
        raise ConfigError(f"--url={url!r} is another machine: a load test of it needs --allow-remote")
    uses_tls = parts.scheme == "https"
    path_prefix = parts.path.rstrip("/").removesuffix("/v1")
    return Endpoint(parts.hostname, parts.port or (443 if uses_tls else 80), model, uses_tls, path_prefix, api_key)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def run_closed(
    endpoint: Endpoint, requests: Sequence[BenchRequest], concurrency: int, time_limit_s: float
) -> list[RequestResult]:
    """Send all requests, never more than `concurrency` at once; the next starts when one ends.

    Requests that have not ended `time_limit_s` after the run's start fail.
    """
    waiting = iter(enumerate(requests))
    exchanges: dict[int, _Exchange] = {}
    run_start_s = time.perf_counter()

    async def worker() -> None:
        for index, request in waiting:
            exchanges[index] = await _send(endpoint, request, run_start_s + time_limit_s)

    await asyncio.gather(*(worker() for _ in range(min(concurrency, len(requests)))))
    return [exchanges[index].result(run_start_s) for index in range(len(requests))]


async def run_open(endpoint: Endpoint, requests: Sequence[BenchRequest], time_limit_s: float) -> list[RequestResult]:
    """Send each request at its own arrival time, however many are running; `time_limit_s` as in `run_closed`.

    What a request waits for is counted from that time, also where this client was too busy to send it then.
    """
    run_start_s = time.perf_counter()

    async def send_on_time(request: BenchRequest) -> _Exchange:
        due_s = run_start_s + request.arrival_s
        await asyncio.sleep(due_s - time.perf_counter())
        return await _send(endpoint, request, run_start_s + time_limit_s, due_s)

    exchanges = await asyncio.gather(*(send_on_time(request) for request in requests))
    return [exchange.result(run_start_s) for exchange in exchanges]


async def get_json(endpoint: Endpoint, path: str, timeout_s: float) -> Any:
    """The JSON answer to a GET of `path`. Raises OSError if the server cannot be reached or answers an error."""
    response = _Response()
    async with asyncio.timeout(timeout_s):
        await _exchange(endpoint, response, _head("GET", path, endpoint, 0))
    body = b"".join(chunk for _, chunk in response.chunks)
    if response.status != 200:
        raise OSError(f"GET {path} answered {response.status}")
    return json.loads(body)


async def _send(
    endpoint: Endpoint, request: BenchRequest, deadline_s: float, due_s: float | None = None
) -> "_Exchange":
    """Send one request and note what comes.

    deadline_s: when it fails; due_s: when it starts, if not when it is sent; both on perf_counter's clock
    """
    exchange = _Exchange(request)
    message = _completion_message(endpoint, request)
    exchange.start_s = time.perf_counter() if due_s is None else due_s
    try:
        async with asyncio.timeout(deadline_s - time.perf_counter()):
            await _exchange(endpoint, exchange.response, message)
    except TimeoutError:
        exchange.error = "the answer had not ended at the time limit"
    except (OSError, httptools.HttpParserError) as failure:
        exchange.error = str(failure) or type(failure).__name__
    exchange.end_s = time.perf_counter()
    return exchange


def _completion_message(endpoint: Endpoint, request: BenchRequest) -> bytes:
    body = json.dumps(
        {
            "model": endpoint.model,
            "prompt": list(request.prompt_token_ids),
            "max_tokens": request.num_output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    return _head("POST", "/v1/completions", endpoint, len(body)) + body


def _head(method: str, path: str, endpoint: Endpoint, content_length: int) -> bytes:
    lines = [
        f"{method} {endpoint.path_prefix}{path} HTTP/1.1",
        f"Host: {endpoint.host}:{endpoint.port}",
        "Content-Type: application/json",
        f"Content-Length: {content_length}",
        "Connection: close",
    ]
    if endpoint.api_key:
        lines.append(f"Authorization: Bearer {endpoint.api_key}")
    return "\r\n".join([*lines, "", ""]).encode()


@dataclass(slots=True)
class _Response:
    """Status, and each piece of the body with its arrival time (perf_counter seconds)."""

    status: int = 0
    chunks: list[tuple[float, bytes]] = field(default_factory=list)


class _Protocol(asyncio.Protocol):
    """Receives one response; `done` is set when it ended, or failed when the connection broke before that."""

    def __init__(self, response: _Response) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._response = response
        self._parser = httptools.HttpResponseParser(self)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._finish(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish(exc or ConnectionResetError("the server closed the connection before the answer ended"))

    def on_headers_complete(self) -> None:
        self._response.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._response.chunks.append((time.perf_counter(), body))

    def on_message_complete(self) -> None:
        self._finish(None)

    def _finish(self, error: Exception | None) -> None:
        if self.done.done():
            return
        if error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(error)


@functools.cache
def _tls_context() -> ssl.SSLContext:
    """Read once: the certificates of all authorities take milliseconds."""
    return ssl.create_default_context()


async def _exchange(endpoint: Endpoint, response: _Response, message: bytes) -> None:
    """Send `message` over a connection of its own and fill `response` until it ends."""
    tls = _tls_context() if endpoint.uses_tls else None
    transport, protocol = await asyncio.get_running_loop().create_connection(
        lambda: _Protocol(response), endpoint.host, endpoint.port, ssl=tls
    )
    try:
        transport.write(message)
        await protocol.done
    finally:
        transport.close()


@dataclass(slots=True)
class _Exchange:
    """A request, what came back, and when, on perf_counter's clock."""

    request: BenchRequest
    response: _Response = field(default_factory=_Response)
    start_s: float = 0.0
    end_s: float = 0.0
    error: str | None = None

    def result(self, run_start_s: float) -> RequestResult:
        """Read what arrived: which chunks carried tokens, how many there were, what went wrong."""
        stream = _read_events(self.response.chunks)
        return RequestResult(
            start_s=self.start_s - run_start_s,
            end_s=self.end_s - run_start_s,
            token_times_s=tuple(at_s - run_start_s for at_s in stream.token_times_s),
            num_input_tokens=len(self.request.prompt_token_ids),
            num_output_tokens=stream.num_output_tokens,
            num_wanted_tokens=self.request.num_output_tokens,
            error=self.error or self._status_error() or stream.error or stream.missing(self.request.num_output_tokens),
            num_cached_tokens=stream.num_cached_tokens,
        )

    def _status_error(self) -> str | None:
        if self.response.status == 200:
            return None
        body = b"".join(chunk for _, chunk in self.response.chunks).decode(errors="replace")
        return f"HTTP {self.response.status}: {body[:_MAX_ERROR_LENGTH]}"


@dataclass(slots=True)
class _Stream:
    token_times_s: list[float] = field(default_factory=list)
    num_output_tokens: int = 0
    num_cached_tokens: int = 0
    error: str | None = None

    def missing(self, num_wanted_tokens: int) -> str | None:
        """What a whole answer has and this one lacks."""
        if not self.token_times_s:
            return "the answer carried no token"
        if not self.num_output_tokens:
            return "the answer carried no usage"
        if self.num_output_tokens != num_wanted_tokens:
            return f"the answer has {self.num_output_tokens} tokens where {num_wanted_tokens} were asked for"
        return None


def _read_events(chunks: Sequence[tuple[float, bytes]]) -> _Stream:
    """Parse server-sent events. An event split over two pieces counts as come when its last byte came."""
    stream = _Stream()
    rest = b""
    for at_s, piece in chunks:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(_EVENT_PREFIX):
                _read_event(line[len(_EVENT_PREFIX) :].strip(), at_s, stream)
    return stream


def _read_event(data: bytes, at_s: float, stream: _Stream) -> None:
    if data == _LAST_EVENT:
        return
    try:
        event = json.loads(data)
    except ValueError:
        stream.error = f"an event that is not JSON: {data.decode(errors='replace')[:_MAX_ERROR_LENGTH]}"
        return
    if "error" in event:
        stream.error = f"the server reported: {json.dumps(event['error'])[:_MAX_ERROR_LENGTH]}"
    if usage := event.get("usage"):
        stream.num_output_tokens = usage.get("completion_tokens", 0)
        stream.num_cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    if any(_carries_tokens(choice) for choice in event.get("choices") or ()):
        stream.token_times_s.append(at_s)


def _carries_tokens(choice: dict[str, Any]) -> bool:
    """Whether a chunk brings tokens.

    One without text may: its token's bytes are no whole character yet. A closing chunk without text brings none.
    """
    return bool(choice.get("text") or choice.get("token_ids")) or choice.get("finish_reason") is None
