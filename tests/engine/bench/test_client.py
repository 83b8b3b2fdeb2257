import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from octavo_engine.bench.client import Endpoint, RequestResult, get_json, parse_url, run_closed, run_open
from octavo_engine.bench.workloads import BenchRequest, fixed, make_requests
from octavo_engine.errors import ConfigError

Writer = asyncio.StreamWriter
Answer = Callable[[dict[str, object], Writer], Awaitable[None]]
OK_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def event(**fields: object) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text(value: str, finish_reason: str | None = None) -> bytes:
    return event(choices=[{"text": value, "finish_reason": finish_reason}], usage=None)


def usage(count: int, **details: object) -> bytes:
    return event(choices=[], usage={"completion_tokens": count, **details}) + b"data: [DONE]\n\n"


async def send(writer: Writer, piece: bytes) -> None:
    writer.write(b"%x\r\n%s\r\n" % (len(piece), piece))
    await writer.drain()


@asynccontextmanager
async def serving(answer: Answer) -> AsyncIterator[Endpoint]:
    """A server on loopback that reads one request a connection and lets `answer` write the reply, byte by byte."""

    connections: dict[asyncio.Task[None], Writer] = {}

    async def handle(reader: asyncio.StreamReader, writer: Writer) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.split("content-length: ")[1].split("\r\n")[0])
        body = json.loads(await reader.readexactly(length) or b"{}")
        await answer(body, writer)
        writer.close()

    def accept(reader: asyncio.StreamReader, writer: Writer) -> None:
        connections[asyncio.create_task(handle(reader, writer))] = writer

    async with await asyncio.start_server(accept, "127.0.0.1", 0) as server:
        yield Endpoint("127.0.0.1", server.sockets[0].getsockname()[1], "fake")
    for connection, writer in connections.items():
        writer.transport.abort()
        connection.cancel()
    await asyncio.gather(*connections, return_exceptions=True)


async def stream(pieces: list[bytes], writer: Writer) -> None:
    writer.write(OK_HEAD)
    for piece in pieces:
        await send(writer, piece)
        await asyncio.sleep(0.01)
    await send(writer, b"")


async def ask(answer: Answer, *, time_limit_s: float = 10.0, num_output: int = 3) -> RequestResult:
    async with serving(answer) as endpoint:
        return (await run_closed(endpoint, [BenchRequest((1, 2), num_output)], 1, time_limit_s))[0]


async def test_notes_each_chunk_and_counts_tokens_by_usage() -> None:
    async def answer(_: dict[str, object], writer: Writer) -> None:
        await stream([text("a"), text("b"), text("c", "length"), usage(3)], writer)

    result = await ask(answer)
    assert result.error is None
    assert len(result.token_times_s) == result.num_output_tokens == 3
    assert result.start_s < result.token_times_s[0] < result.token_times_s[1] < result.end_s


async def test_a_chunk_of_several_tokens_is_one_arrival() -> None:
    async def answer(_: dict[str, object], writer: Writer) -> None:
        await stream([text("a"), text("bcd", "length"), usage(4)], writer)

    result = await ask(answer)
    assert (len(result.token_times_s), result.num_output_tokens) == (2, 4)


@pytest.mark.parametrize(("details", "cached"), [({"cached_tokens": 2}, 2), ({"cached_tokens": None}, 0), (None, 0)])
async def test_notes_what_the_prefix_cache_had(details: object, cached: int) -> None:
    async def answer(_: dict[str, object], writer: Writer) -> None:
        await stream([text("a", "length"), usage(1, prompt_tokens_details=details)], writer)

    assert (await ask(answer, num_output=1)).num_cached_tokens == cached


async def test_a_chunk_without_text_counts_unless_it_only_closes() -> None:
    async def answer(_: dict[str, object], writer: Writer) -> None:
        await stream([text("a"), text(""), text("", "length"), usage(2)], writer)

    assert len((await ask(answer)).token_times_s) == 2


async def test_events_may_be_split_and_joined_anywhere() -> None:
    whole = text("a") + text("b") + usage(2)

    async def answer(_: dict[str, object], writer: Writer) -> None:
        await stream([whole[:20], whole[20:90], whole[90:]], writer)

    result = await ask(answer, num_output=2)
    assert result.error is None
    assert (len(result.token_times_s), result.num_output_tokens) == (2, 2)


async def test_an_answer_of_another_length_is_none() -> None:
    async def answer(_: dict[str, object], writer: Writer) -> None:
        await stream([text("a"), usage(3)], writer)

    assert (await ask(answer, num_output=7)).error == "the answer has 3 tokens where 7 were asked for"


async def test_sends_token_ids_and_forces_the_length() -> None:
    seen: dict[str, object] = {}

    async def answer(body: dict[str, object], writer: Writer) -> None:
        seen.update(body)
        await stream([text("a"), usage(1)], writer)

    await ask(answer, num_output=7)
    assert seen["prompt"] == [1, 2]
    assert (seen["model"], seen["max_tokens"], seen["ignore_eos"], seen["stream"]) == ("fake", 7, True, True)


async def reply_500(_: dict[str, object], writer: Writer) -> None:
    writer.write(b"HTTP/1.1 500 Oops\r\nContent-Length: 4\r\n\r\nbusy")
    await writer.drain()


async def report_error(_: dict[str, object], writer: Writer) -> None:
    await stream([text("a"), event(error={"message": "out of blocks"})], writer)


async def break_off(_: dict[str, object], writer: Writer) -> None:
    writer.write(OK_HEAD)
    await send(writer, text("a"))


async def never_end(_: dict[str, object], writer: Writer) -> None:
    writer.write(OK_HEAD)
    await send(writer, text("a"))
    await asyncio.sleep(3)


async def no_tokens(_: dict[str, object], writer: Writer) -> None:
    await stream([usage(0)], writer)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (reply_500, "HTTP 500: busy"),
        (report_error, "out of blocks"),
        (break_off, "closed the connection"),
        (never_end, "time limit"),
        (no_tokens, "no token"),
    ],
    ids=["status", "error-event", "broken-off", "time-limit", "no-tokens"],
)
async def test_a_failure_says_what_went_wrong(answer: Answer, message: str) -> None:
    result = await ask(answer, time_limit_s=0.5)
    assert message in (result.error or "")


async def test_no_server_is_an_error_of_each_request() -> None:
    endpoint = Endpoint("127.0.0.1", 1, "fake")
    results = await run_closed(endpoint, [BenchRequest((1,), 1)] * 2, 1, 5.0)
    assert [result.error is None for result in results] == [False, False]


async def test_closed_loop_never_exceeds_its_concurrency() -> None:
    running, most = 0, 0

    async def answer(_: dict[str, object], writer: Writer) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await stream([text("a"), usage(1)], writer)
        running -= 1

    async with serving(answer) as endpoint:
        results = await run_closed(endpoint, make_requests(fixed(2, 1, 9), 0), 3, 10.0)
    assert most == 3
    assert [result.error for result in results] == [None] * 9


async def test_open_loop_counts_from_the_arrival_times() -> None:
    came_s: list[float] = []

    async def answer(_: dict[str, object], writer: Writer) -> None:
        came_s.append(time.perf_counter())
        await stream([text("a"), usage(1)], writer)

    requests = [BenchRequest((1,), 1, arrival_s) for arrival_s in (0.0, 0.05, 0.1)]
    async with serving(answer) as endpoint:
        asyncio.get_running_loop().call_later(0.02, time.sleep, 0.2)  # a client that is too busy
        begun_s = time.perf_counter()
        results = await run_open(endpoint, requests, 10.0)
    assert [result.start_s for result in results] == pytest.approx([0.0, 0.05, 0.1], abs=1e-6)
    assert came_s[-1] - begun_s > 0.2
    assert results[-1].token_times_s[0] > 0.2


async def test_get_json_reads_a_plain_answer() -> None:
    async def answer(_: dict[str, object], writer: Writer) -> None:
        writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\n{"a": 1}')
        await writer.drain()

    async with serving(answer) as endpoint:
        assert await get_json(endpoint, "/v1/models", 5.0) == {"a": 1}


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", "http://localhost", "http://[::1]:1/v1"])
def test_this_machine_is_allowed(url: str) -> None:
    assert parse_url(url, "m", allow_remote=False).model == "m"


@pytest.mark.parametrize("url", ["http://192.0.2.1:80", "http://example.org", "https://model.example:8443/v1"])
def test_another_machine_needs_leave(url: str) -> None:
    with pytest.raises(ConfigError, match="--allow-remote"):
        parse_url(url, "m", allow_remote=False)
    assert not parse_url(url, "m", allow_remote=True).path_prefix


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://127.0.0.1", "http://"])
def test_a_malformed_url_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="--url"):
        parse_url(url, "m", allow_remote=False)
